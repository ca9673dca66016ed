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

    def __init__(self, step: int, loss: float, grad_norm: float, block_ids: list[int]) -> None:
        super().__init__(
            f"step {step}: loss is {loss}, grad_norm {grad_norm}; the update was not made, the "
            f"weights are those after step {step - 1}; its blocks are {block_ids}; lower "
            "learning_rate or raise warmup_steps, and go on from the newest checkpoint"
        )


class StoppedError(QloopError):
    """The run was asked to stop; all that it has done is saved, and the same command goes on."""

    exit_code = 75
    state = "stopped"


class LockedError(QloopError):
    """Another process uses the run's folder."""

    exit_code = 77


def join_names(names: list[str], last: str = "or") -> str:
    """Joins names as one would say them: `full, lora or qlora`."""
    return f" {last} ".join(", ".join(names).rsplit(", ", 1))
