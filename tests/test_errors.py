"""Errors of the disk: whose fault they are, and what to do."""

import errno
import os
from pathlib import Path

import pytest

from qloop.errors import CheckpointError, ConfigError, explaining_disk_errors


@pytest.mark.parametrize(
    ("number", "kind", "code", "todo"),
    [
        (errno.ENOSPC, CheckpointError, 74, "make room and type the same command again"),
        (errno.EDQUOT, CheckpointError, 74, "make room and type the same command again"),
        (errno.EIO, CheckpointError, 74, "make room and type the same command again"),
        (errno.EACCES, ConfigError, 78, "give another folder"),
        (errno.EROFS, ConfigError, 78, "give another folder"),
        (errno.ENOTDIR, ConfigError, 78, "give another folder"),
    ],
)
def test_a_disk_that_refuses_ends_in_a_message_and_its_exit_code(number, kind, code, todo):
    with pytest.raises(kind) as error, explaining_disk_errors(Path("output/run")):
        raise OSError(number, os.strerror(number))
    assert error.value.exit_code == code
    assert str(error.value) == f"output/run: cannot be written: {os.strerror(number)}; {todo}"
