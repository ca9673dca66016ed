"""The errors a user can cause or meet, each with the exit code that its command ends with.

A message says where, what is wrong, the values, and what to do; the command line prints it without
a traceback. Anything else that escapes is a crash: a traceback and exit code 1.
"""


class QloopError(Exception):
    """An end of the command that has a reason to tell."""

    exit_code = 1
    """The process's."""
    state = "failed"
    """What status.json calls it."""


class ConfigError(QloopError):
    """A key, a flag, or what one names cannot be used."""

    exit_code = 78


class DataError(QloopError):
    """The corpus cannot be used."""

    exit_code = 78


class CheckpointError(QloopError):
    """A checkpoint cannot be written or continued from."""

    exit_code = 74


class DivergenceError(QloopError):
    """A step's loss or gradient norm is not finite; the weights are those of the step before."""

    exit_code = 76
    state = "diverged"


class StoppedError(QloopError):
    """The run was asked to stop, saved itself, and can be continued by the same command."""

    exit_code = 75
    state = "stopped"


def join_names(names: list[str], last: str = "or") -> str:
    """Joins names as one would say them: `full, lora or qlora`."""
    return f" {last} ".join(", ".join(names).rsplit(", ", 1))
