"""`qloop` with a fault on one rank: tests/distributed/faults.py FAULT train ...

Each fault is put where the real one would come from: a loss, a disk, a file, a network. All other
ranks run what everybody runs.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

if "true" in (os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")):
    import on_cpu  # noqa: F401  (changes what accelerate takes the machine for)

import torch

import qloop.distributed.peers
import qloop.model.build
import qloop.run
import qloop.train
from qloop.storage.filesystem import FileSystem

RANK = int(os.environ["RANK"])
FAULTY = 1
AT_STEP = 6


def at_step(function: Callable, change: Callable, micro_batches: int = 4) -> Callable:
    """Changes what a function gives in the first micro-batch of a step, on the faulty rank."""
    calls = 0

    def changed(*values):
        nonlocal calls
        result = function(*values)
        calls += 1
        is_due = calls == (AT_STEP - 1) * micro_batches + 1
        return change(result) if is_due and RANK == FAULTY else result

    return changed


def change_losses(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    build_target_loss = qloop.run.build_target_loss

    def build_spoilt(*values, **keys):
        loss = build_target_loss(*values, **keys)
        loss.sum = at_step(loss.sum, change)
        return loss

    qloop.run.build_target_loss = build_spoilt


def nan_loss() -> None:
    change_losses(lambda value: value * torch.nan)


def infinite_gradient() -> None:
    """The loss stays finite."""

    def spoil(value):
        value.register_hook(lambda gradient: gradient * torch.inf)
        return value

    change_losses(spoil)


def full_disk() -> None:
    """Refuses a rank's first file of tensors; later there is room."""
    create = FileSystem.create
    refused = []

    def create_or_refuse(self, path: Path) -> int:
        if RANK == FAULTY and path.suffix == ".safetensors" and not refused:
            refused.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return create(self, path)

    FileSystem.create = create_or_refuse


def bad_file() -> None:
    """One rank's copy of the base cannot be read."""
    auto = qloop.model.build.AutoModelForCausalLM
    load = auto.from_pretrained

    def load_or_refuse(*values, **keys):
        if RANK == FAULTY:
            raise OSError("Input/output error")
        return load(*values, **keys)

    auto.from_pretrained = load_or_refuse


def waits_for_ever() -> None:
    """As NCCL does: a collective whose peer has died gives no error, and no signal is looked at."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    run_steps = qloop.train.run_steps

    def run_or_wait(*values) -> None:
        try:
            run_steps(*values)
        except RuntimeError:
            time.sleep(600)

    qloop.train.run_steps = run_or_wait


def lost_machine() -> None:
    """Every rank has a machine to itself, and the dead one leaves nobody there to tell."""
    qloop.distributed.peers.name_machine = lambda: f"machine-{RANK}"
    waits_for_ever()


FAULTS = (nan_loss, infinite_gradient, full_disk, bad_file, waits_for_ever, lost_machine)

if __name__ == "__main__":
    from qloop.cli import main

    fault = sys.argv.pop(1)
    {function.__name__: function for function in FAULTS}[fault]()
    main()
