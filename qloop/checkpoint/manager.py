"""Saves a run as step directories, at once or behind the loop, and puts a run's moments back.

    checkpoint-100/
      model.safetensors, config.json       full: `from_pretrained` loads the folder as it is
      adapter_model.safetensors, ...       lora, qlora: `PeftModel.from_pretrained` does
      tokenizer.json, ...
      optimizer.safetensors                moments by parameter name: `lm_head.weight/exp_avg`
      progress.json                        counters, config, and what the run was made of
      manifest.json, COMMIT                see store.py, which writes them

There are no random states: every forward pass is seeded from (seed, step, micro-batch).
"""

import contextlib
import dataclasses
import functools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator

from qloop.checkpoint.store import CheckpointStore, Kept, show_bytes
from qloop.checkpoint.tensors import HostCopies, encode_tensors, load_tensors, read_kinds
from qloop.config import CheckpointConfig
from qloop.errors import CheckpointError, LockedError
from qloop.model.saving import collect_weights
from qloop.progress import Progress

OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")

# What the ranks tell each other of a save; the main one knows, the others add nothing.
_RUNNING, _COMMITTED, _REFUSED, _FENCED, _CRASHED = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Origins:
    """What a run was made of; a run goes on only with the same."""

    config: dict[str, Any]
    """The config, by section."""
    fingerprints: dict[str, str]
    """Of the corpus, the tokenizer and the frozen base."""
    step_blocks: int
    """Blocks that a step reads, over all ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """A step directory and what its progress.json says."""

    path: Path
    progress: Progress
    origins: Origins


class _Committed(NamedTuple):
    kept: Kept
    messages: list[str]


class CheckpointManager:
    """The checkpoints of one run; every rank calls, the main one writes."""

    def __init__(
        self,
        store: CheckpointStore,
        settings: CheckpointConfig,
        accelerator: Accelerator,
        origins: Origins,
        files: Mapping[str, bytes],
        say: Callable[[str], None],
    ) -> None:
        """Takes what stays the same over the run.

        Args:
            store: The directories.
            settings: How often, how many, and whether behind the loop.
            accelerator: Knows the ranks.
            origins: What the run is made of.
            files: What else a checkpoint holds beside tensors and progress, by name.
            say: Tells the person.
        """
        self._store = store
        self._settings = settings
        self._accelerator = accelerator
        self._origins = origins
        self._files = files
        self._say = say
        self._copies = HostCopies()
        self._is_async = settings.async_checkpoint
        self._pending: Future[_Committed] | None = None  # on the main rank
        self._is_pending = False  # on every rank
        self._failed_saves = 0
        self.stood_still_seconds = 0.0
        """How long the last save kept the loop waiting, its commit left out if it was behind it."""

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        loss: float,
        held_out_loss: float | None,
        must_succeed: bool,
    ) -> None:
        """Takes the run's state; it is committed now, or behind the loop.

        Args:
            model: As prepared.
            optimizer: As prepared.
            progress: After the step.
            loss: Of the step.
            held_out_loss: Measured after this very step, or None.
            must_succeed: The run ends here: the commit is waited for, and one failure is enough.

        Raises:
            CheckpointError: The disk refused `max_failed_saves` times in a row, or this time where
                it must succeed. Every older checkpoint is as it was.
            LockedError: Another process has taken the run's folder.
        """
        self.settle(wait=True)
        started = time.perf_counter()
        state = self._accelerator.get_state_dict(model)
        if self._accelerator.is_main_process:
            plain = self._accelerator.unwrap_model(model)
            weights_file, weights = collect_weights(plain, state)
            tensors = {weights_file: weights, OPTIMIZER: name_moments(plain, optimizer)}
            behind = self._is_async and not must_succeed and self._fits_in_memory(tensors)
            if behind:
                tensors = {name: self._copies.take(name, part) for name, part in tensors.items()}
            files = {**self._files, PROGRESS: self._dump_progress(progress)}
            commit = functools.partial(
                self._commit, progress.step, tensors, files, loss, held_out_loss
            )
            self._pending = _run(commit, behind)
        self._is_pending = True
        self.stood_still_seconds = time.perf_counter() - started
        if must_succeed or not self._is_async:
            self.settle(wait=True, must_succeed=must_succeed)

    def settle(self, wait: bool = False, must_succeed: bool = False) -> None:
        """Learns, on every rank alike, how the save behind the loop went, if it has ended.

        Args:
            wait: Whether to wait for its end.
            must_succeed: Whether its failure ends the run.

        Raises:
            CheckpointError: It failed, and that was the last attempt.
            LockedError: Another process has taken the run's folder.
        """
        if not self._is_pending:
            return
        outcome = self._agree(wait)
        if outcome == _RUNNING:
            return
        self._is_pending = False
        pending, self._pending = self._pending, None
        if outcome == _CRASHED:
            raise _failure(pending)
        if outcome == _FENCED:
            raise LockedError(str(_failure(pending)))
        if outcome == _COMMITTED:
            self._failed_saves = 0
            if pending:
                self._report(pending.result())
            return
        self._failed_saves += 1
        text = f"{self._store.folder}: a checkpoint could not be saved: {_failure(pending)}"
        if must_succeed or self._failed_saves >= self._settings.max_failed_saves:
            raise CheckpointError(
                f"{text}; {_count(self._failed_saves, 'save')} in a row failed, every older "
                "checkpoint is untouched; make room, and type the same command again"
            )
        self._say(
            f"{text}; every older checkpoint is untouched; training goes on and the next save "
            f"tries again, {_count(self._settings.max_failed_saves - self._failed_saves, 'more')} "
            "failed in a row will end the run"
        )

    def close(self) -> None:
        """Lets a save behind the loop end, when the run ends by an error; asks no other rank."""
        if self._pending and not self._pending.exception():
            self._report(self._pending.result())
        elif self._pending:
            self._say(f"{self._store.folder}: the last save failed: {self._pending.exception()}")
        self._pending, self._is_pending = None, False

    def warn_of_space(self, model: torch.nn.Module, step: int, last_step: int) -> list[str]:
        """Says so if the free space will not hold the checkpoints that the run is to make."""
        _, weights = collect_weights(self._accelerator.unwrap_model(model))
        moments = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
        size = sum(tensor.nbytes for tensor in weights.values()) + moments
        size += sum(map(len, self._files.values()))
        saves = math.ceil((last_step - step) / self._settings.save_steps)
        kept = self._settings.keep_checkpoints + int(self._settings.keep_best)
        if self._settings.keep_every:
            kept += last_step // self._settings.keep_every - step // self._settings.keep_every
        # One more than is kept: the oldest goes only after the newest is whole.
        needed = size * min(saves, kept + 1)
        free = self._store.count_free_bytes()
        if needed <= free:
            return []
        return [
            f"space      {self._store.folder}: {show_bytes(free)} are free, but the checkpoints to "
            f"come need {show_bytes(needed)} ({show_bytes(size)} each); make room, or keep fewer"
        ]

    def _fits_in_memory(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
        size = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        free = count_free_memory() + self._copies.nbytes
        if size < 0.8 * free:
            return True
        self._say(
            f"async_checkpoint: a copy of {show_bytes(size)} does not fit in the "
            f"{show_bytes(free)} of free memory; the loop waits for this save"
        )
        return False

    def _dump_progress(self, progress: Progress) -> bytes:
        content = {
            **dataclasses.asdict(progress),
            **dataclasses.asdict(self._origins),
            "num_processes": self._accelerator.num_processes,
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    def _commit(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        files: Mapping[str, bytes],
        loss: float,
        held_out_loss: float | None,
    ) -> _Committed:
        contents = [(name, encode_tensors(part)) for name, part in tensors.items()]
        texts = [(name, iter([memoryview(text)])) for name, text in files.items()]
        kept = self._store.write(step, [*contents, *texts], {"loss": loss}, held_out_loss)
        messages: list[str] = []
        settings = self._settings
        try:
            self._store.rotate(
                settings.keep_checkpoints, settings.keep_every, settings.keep_best, messages.append
            )
        except OSError as error:  # what was saved stays saved
            messages.append(f"{self._store.folder}: an old checkpoint could not go: {error}")
        return _Committed(kept, messages)

    def _agree(self, wait: bool) -> int:
        """Gives every rank what the main one knows."""
        outcome = _RUNNING
        if self._pending and (wait or self._pending.done()):
            error = self._pending.exception()
            outcome = _COMMITTED
            if isinstance(error, OSError):
                outcome = _REFUSED
            elif isinstance(error, LockedError):
                outcome = _FENCED
            elif error:
                outcome = _CRASHED
        told = torch.tensor(outcome, device=self._accelerator.device)
        return int(self._accelerator.reduce(told, "sum"))

    def _report(self, committed: _Committed) -> None:
        path, manifest = committed.kept
        for message in committed.messages:
            self._say(message)
        self._say(
            f"saved {path} ({show_bytes(manifest.total_bytes)}; the loop stood still for "
            f"{self.stood_still_seconds:.2f} s)"
        )


def count_free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Counts the host memory, in bytes, that this process can still take: of machine or container.

    Args:
        cgroup: Where a container's limits are (version 2).
    """
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        lines = (cgroup / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])  # given back when asked
        free = min(free, limit - used + cached)
    return free


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads what a step directory says of itself; it was verified before.

    Raises:
        CheckpointError: It is no checkpoint of qloop.
    """
    try:
        content = json.loads((path / PROGRESS).read_bytes())
        counters = {field.name: content[field.name] for field in dataclasses.fields(Progress)}
        origins = {field.name: content[field.name] for field in dataclasses.fields(Origins)}
        return Checkpoint(path, Progress(**counters), Origins(**origins))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no checkpoint to go on from: {PROGRESS}: {error}; give a checkpoint-N folder"
        ) from error


def restore_optimizer(
    checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Puts the saved moments into the optimizer, each to the parameter of its name.

    Args:
        checkpoint: Where they are.
        model: Unwrapped.
        optimizer: Over the model's trained parameters.

    Raises:
        CheckpointError: The names, types or shapes are not those of this model; nothing was put.
    """
    file = checkpoint.path / OPTIMIZER
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = read_kinds(file)
    moments: dict[str, list[str]] = {name: [] for name in trained}
    for key, kind in kinds.items():
        name, _, moment = key.rpartition("/")
        shapes = (tuple(trained[name].shape), ()) if name in trained else ()
        if kind.shape not in shapes or kind.dtype != "F32":
            raise CheckpointError(
                f"{file}: {key} of {kind.dtype} {list(kind.shape)} fits no trained parameter of "
                "this model"
            )
        moments[name].append(moment)
    common = max(moments.values(), key=len, default=[])
    short = [name for name, found in moments.items() if not found or set(found) != set(common)]
    if short:
        raise CheckpointError(
            f"{file}: lacks moments of {len(short)} trained parameters, the first {short[0]}"
        )
    tensors = load_tensors(file, kinds)
    for name, parameter in trained.items():
        # A step count stays where AdamW keeps it: fused, it is beside its parameter.
        optimizer.state[parameter] = {
            moment: tensors[f"{name}/{moment}"].to(parameter.device) for moment in moments[name]
        }


def name_moments(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Gives the optimizer's tensors, each under its parameter's name and its own."""
    return {
        f"{name}/{moment}": tensor
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for moment, tensor in optimizer.state[parameter].items()
    }


def _run(commit: Callable[[], _Committed], behind: bool) -> "Future[_Committed]":
    """Runs a commit now, or in a thread that does not keep the process from ending."""
    future: Future[_Committed] = Future()

    def work() -> None:
        try:
            future.set_result(commit())
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)

    if behind:
        threading.Thread(target=work, name="checkpoint", daemon=True).start()
    else:
        work()
    return future


def _failure(pending: "Future[_Committed] | None") -> BaseException:
    error = pending.exception() if pending else None
    return error or CheckpointError("the main process met an error; see its message")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 and noun != 'more' else ''}"
