"""Errors: those of the disk say what to do, and all of them survive pickling."""

import errno
import importlib
import inspect
import os
import pickle
import pkgutil
from pathlib import Path

import pytest

import qloop
from qloop.errors import CheckpointError, ConfigError, QloopError, explaining_disk_errors


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


def find_errors(base: type[QloopError] = QloopError) -> list[type[QloopError]]:
    return [base, *(error for child in base.__subclasses__() for error in find_errors(child))]


for module in pkgutil.walk_packages(qloop.__path__, "qloop."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

ARGUMENTS = {"str": "rank 1", "int": 7, "float": float("nan"), "list[int]": [3, 1]}


def build_error(kind: type[QloopError]) -> QloopError:
    """Builds an error from arguments of the types that its `__init__` is annotated with."""
    if "__init__" not in {name for base in kind.__mro__[:-3] for name in vars(base)}:
        return kind("config.toml: what is wrong")
    parameters = inspect.signature(kind).parameters.values()
    shown = [inspect.formatannotation(parameter.annotation) for parameter in parameters]
    missing = set(shown) - ARGUMENTS.keys()
    assert not missing, f"add a value of type {missing}, for {kind.__name__}, to ARGUMENTS"
    return kind(*(ARGUMENTS[name] for name in shown))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", find_errors(), ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind, protocol):
    error = build_error(kind)
    error.rank = 3
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error) != ""
    assert (again.args, again.rank) == (error.args, 3)
    assert (again.exit_code, again.state) == (error.exit_code, error.state)
