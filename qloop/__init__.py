"""qloop: continued pretraining of causal language models on Q (kdb+) code.

As a library, with the same keys as flags:

    import qloop

    with qloop.open_run("configs/demo.toml", max_steps=20) as run:
        record = qloop.make_step(run)   # one optimizer update
        record.loss, run.model, run.batches.read(run.progress.blocks_seen)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["make_step", "open_run"]


def __getattr__(name: str) -> Any:
    """Imports torch on first use, so that `qloop --help` answers at once."""
    if name == "open_run":
        from qloop.run import open_run

        return open_run
    if name == "make_step":
        from qloop.train import make_step

        return make_step
    raise AttributeError(f"module 'qloop' has no attribute {name!r}")
