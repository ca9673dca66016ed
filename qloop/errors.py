"""The errors that a user can cause or meet, each with the exit code of its command.

A message says where, what is wrong, the values, and what to do; the command line prints it without
a traceback. Anything else that escapes is a crash: a traceback and exit code 1.
"""

import contextlib
import copyreg
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class QloopError(Exception):
    """An end of the command for a reason that its message explains."""

    exit_code = 1
    """The exit code of the process."""
    state = "failed"
    """The state in status.json."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the message as it is: ranks send each other errors of any `__init__`."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigError(QloopError):
    """A key, a flag, or something that it names cannot be used."""

    exit_code = 78


class PlanError(ConfigError):
    """The memory that a run needs cannot be computed; it may train all the same."""


class DataError(QloopError):
    """The corpus cannot be used."""

    exit_code = 78


class CheckpointError(QloopError):
    """A checkpoint cannot be written, or a run cannot continue from it."""

    exit_code = 74


class DivergenceError(QloopError):
    """A step's loss or gradient norm is not finite; the weights are those of the step before."""

    exit_code = 76
    state = "diverged"

    def __init__(self, step: int, loss: float, grad_norm: float, block_ids: list[int]) -> None:
        super().__init__(
            f"step {step}: loss is {loss}, grad_norm {grad_norm}; the update was not made, the "
            f"weights are those after step {step - 1}; its blocks are {block_ids}; lower "
            "learning_rate or raise warmup_steps, and go on from the newest checkpoint"
        )


class MemoryFullError(QloopError):
    """The device has no memory left; saved checkpoints are whole."""


class StoppedError(QloopError):
    """The run was asked to stop; all its steps are saved, and the same command goes on."""

    exit_code = 75
    state = "stopped"


class LockedError(QloopError):
    """Another process uses the run's folder."""

    exit_code = 77


class PeerError(QloopError):
    """Another process of the run has ended, and this one cannot go on without it."""

    def __init__(self, dead: str) -> None:
        super().__init__(
            f"{dead} has ended, and no other process can go on without it; its own message says "
            "why, or nothing if it was killed; the newest checkpoint is whole, the same command "
            "goes on from there"
        )


@contextlib.contextmanager
def explaining_disk_errors(path: Path) -> Iterator[None]:
    """Turns the OSErrors of writing to a path into errors that say what to do.

    Raises:
        CheckpointError: The disk is full or broken.
        ConfigError: The path cannot be written, by this user or by anybody.
    """
    try:
        yield
    except OSError as error:
        is_storage = error.errno in _FULL_OR_BROKEN
        kind = CheckpointError if is_storage else ConfigError
        todo = "make room and type the same command again" if is_storage else "give another folder"
        raise kind(f"{path}: cannot be written: {error.strerror}; {todo}") from error


def join_names(names: list[str], last: str = "or") -> str:
    """Joins names as in a sentence: `full, lora or qlora`."""
    return f" {last} ".join(", ".join(names).rsplit(", ", 1))
