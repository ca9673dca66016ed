"""Saves a run as step directories, at once or behind the loop, and puts a run's moments back.

    checkpoint-100/
      model.safetensors, config.json       full: `from_pretrained` loads the folder as it is
      adapter_model.safetensors, ...       lora, qlora: `PeftModel.from_pretrained` does
      tokenizer.json, ...
      optimizer.safetensors                moments by parameter name: `lm_head.weight/exp_avg`
      progress.json                        counters, config, and what the run was made of
      manifest.json, COMMIT                see store.py, which writes them

Above `share_above_gb` every rank writes whole tensors of its own, of weights and of moments:
`model-00001-of-00004.safetensors` and so on, with the index that `from_pretrained` reads. How many
ranks wrote, and by which engine, matters to nobody who reads: no tensor is cut.

There are no random states: every forward pass is seeded from (seed, step, micro-batch).
"""

import dataclasses
import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from qloop.checkpoint.resume import MOMENTS, PROGRESS, Provenance
from qloop.checkpoint.shares import Share, share_of
from qloop.checkpoint.store import CheckpointStore, File, GoodCheckpoint
from qloop.config.keys import CheckpointConfig
from qloop.distributed.engine import Engine
from qloop.errors import CheckpointError, LockedError
from qloop.hardware import count_free_memory
from qloop.steps import Progress
from qloop.storage.folders import show_bytes
from qloop.storage.tensors import (
    INDEX,
    HostCopies,
    encode_tensors,
    gather_mine,
)

T = TypeVar("T")

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")

# What the ranks tell each other of a commit; the main one knows, the others add nothing.
_RUNNING, _COMMITTED, _REFUSED, _FENCED, _CRASHED = 0, 1, 2, 3, 4


class _Committed(NamedTuple):
    kept: GoodCheckpoint
    messages: list[str]


class _Written(NamedTuple):
    """What a rank has written of a save, or why it could not."""

    files: dict[str, File]
    refused: str
    """The disk's reason."""
    crashed: bool


class CheckpointManager:
    """The checkpoints of one run; every rank calls, and each writes its share.

    A save goes in two steps. Every rank writes the tensors that are dealt to it, behind the loop if
    there is memory for a copy. When all have ended, and none failed, the main rank commits.
    """

    def __init__(
        self,
        store: CheckpointStore,
        settings: CheckpointConfig,
        accelerator: Accelerator,
        provenance: Provenance,
        files: Mapping[str, bytes],
        say: Callable[[str], None],
    ) -> None:
        """Takes what stays the same over the run.

        Args:
            store: The directories.
            settings: How often, how many, and whether behind the loop.
            accelerator: Knows the ranks.
            provenance: What the run is made of.
            files: What else a checkpoint holds beside tensors and progress, by name.
            say: Tells the person.
        """
        self._store = store
        self._settings = settings
        self._accelerator = accelerator
        self._provenance = provenance
        self._files = files
        self._say = say
        self._copies = HostCopies()
        self._is_async = settings.async_checkpoint
        self._save: _Save | None = None
        self._failed_saves = 0
        self.stood_still_seconds = 0.0
        """How long the last save kept the loop waiting, its commit left out if it was behind it."""

    def save(
        self,
        engine: Engine,
        progress: Progress,
        loss: float,
        held_out_loss: float | None,
        must_succeed: bool,
    ) -> None:
        """Takes the run's state; it is committed now, or behind the loop.

        Args:
            engine: Holds model and optimizer.
            progress: After the step.
            loss: Of the step.
            held_out_loss: Measured after this very step, or None.
            must_succeed: The run ends here: the commit is waited for, and one failure is enough.

        Raises:
            CheckpointError: The disk refused `max_failed_saves` times in a row, or this time where
                it must succeed. Every older checkpoint is as it was.
            LockedError: Another process has taken the run's folder.
        """
        self.poll(wait=True)
        started = time.perf_counter()
        unfinished, refused = _on_main(self._accelerator, lambda: self._store.begin(progress.step))
        if unfinished is None:
            self._fail(refused, must_succeed)
            return
        shares = self._deal_out(engine)
        behind = self._is_async and not must_succeed and self._fits_in_memory(shares)
        tensors = [_Tensors(share, gather_mine(share.pieces, share.mine)) for share in shares]
        if behind:
            tensors = [
                _Tensors(share, self._copies.take(share.file, share.mine, gathered))
                for share, gathered in tensors
            ]
        texts = {**self._files, PROGRESS: self._dump_progress(progress)}
        texts |= {f"{share.stem}{INDEX}": share.index_file for share in shares if share.index_file}

        def write() -> _Written:
            return self._write(unfinished, tensors, texts if self._is_main else {})

        self._save = _Save(
            unfinished=unfinished,
            step=progress.step,
            loss=loss,
            held_out_loss=held_out_loss,
            started=started,
            behind=behind,
            is_by_main_alone=not any(share.index_file for share in shares),
            writing=_run(write, behind),
        )
        self.stood_still_seconds = time.perf_counter() - started
        if not behind:
            self.poll(wait=True, must_succeed=must_succeed)

    def poll(self, wait: bool = False, must_succeed: bool = False) -> None:
        """Learns, on every rank alike, how the save behind the loop went, if it has ended.

        Args:
            wait: Whether to wait for its end.
            must_succeed: Whether its failure ends the run.

        Raises:
            CheckpointError: It failed, and that was the last attempt.
            LockedError: Another process has taken the run's folder.
        """
        save = self._save
        if save is None:
            return
        if save.committing is None and self._all(wait or save.writing.done()):
            self._seal_or_fail(save, must_succeed)
        if self._save is None or save.committing is None:
            return
        outcome = self._agree(save.committing, wait)
        if outcome == _RUNNING:
            return
        self._save = None
        if outcome == _CRASHED:
            raise _failure(save.committing)
        if outcome == _FENCED:
            raise LockedError(str(_failure(save.committing)))
        if outcome == _REFUSED:
            self._fail(str(_failure(save.committing)), must_succeed)
            return
        self._failed_saves = 0
        if not save.behind:
            self.stood_still_seconds = time.perf_counter() - save.started
        if self._is_main:
            self._report(save.committing.result())

    def _seal_or_fail(self, save: "_Save", must_succeed: bool) -> None:
        """Commits what all ranks have written; or counts the save as failed on all of them."""
        crash = save.writing.exception()
        mine = _Written({}, repr(crash), crashed=True) if crash else save.writing.result()
        parts: list[_Written] = gather_object([mine])
        refused = next((part.refused for part in parts if part.refused), "")
        if any(part.crashed for part in parts):
            self._save = None
            raise crash or CheckpointError(f"a process could not write its part: {refused}")
        if refused:
            self._save = None
            if self._is_main:
                self._store.abandon(save.unfinished)
            self._fail(refused, must_succeed)
            return
        files = {name: file for part in parts for name, file in part.files.items()}
        commit = functools.partial(self._commit, save, files)
        save.committing = _run(commit, save.behind) if self._is_main else Future()

    def _fail(self, refused: str, must_succeed: bool) -> None:
        """Counts a failed save; raises if that was the last attempt."""
        self._failed_saves += 1
        text = f"{self._store.folder}: a checkpoint could not be saved: {refused}"
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
        """Lets a save behind the loop end, when the run ends by an error; asks no other rank.

        What the main rank has written alone it commits; of parts, none knows of the others'.
        """
        save, self._save = self._save, None
        if save is None or not self._is_main:
            return
        if save.committing is None and save.is_by_main_alone and not save.writing.exception():
            written = save.writing.result()
            if not written.refused:
                save.committing = _run(lambda: self._commit(save, written.files), behind=False)
        if save.committing is None:
            self._say(f"{self._store.folder}: the last save was not finished")
        elif error := save.committing.exception():
            self._say(f"{self._store.folder}: the last save failed: {error}")
        else:
            self._report(save.committing.result())

    def describe_space(self, engine: Engine, step: int, last_step: int) -> list[str]:
        """Says so if the free space will not hold the checkpoints that the run is to make."""
        _, weights = engine.collect_weights()
        size = sum(piece.kind.nbytes for piece in weights.values())
        size += sum(kind.nbytes for kind in engine.moment_kinds().values())
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

    @property
    def _is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    def _deal_out(self, engine: Engine) -> list["Share"]:
        """Decides who writes what: the main rank all, or each rank its part where that is much."""
        stem, weights = engine.collect_weights()
        groups = {stem: weights, MOMENTS: engine.collect_moments()}
        size = sum(piece.kind.nbytes for group in groups.values() for piece in group.values())
        is_large = size > self._settings.share_above_gb * 1e9
        writers = self._accelerator.num_processes if is_large else 1
        rank = self._accelerator.process_index
        return [share_of(rank, writers, name, pieces) for name, pieces in groups.items()]

    def _fits_in_memory(self, shares: list["Share"]) -> bool:
        """Whether every rank has the memory for a copy of what it writes."""
        size = sum(kind.nbytes for share in shares for kind in share.mine.values())
        # Copies of an earlier save are written over; the ranks of one machine share its memory.
        more = torch.tensor([max(0, size - self._copies.nbytes)], device=self._accelerator.device)
        first = self._accelerator.process_index - self._accelerator.local_process_index
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = int(self._accelerator.gather(more)[first : first + local].sum())
        free = count_free_memory()
        if self._all(needed < 0.8 * free):
            return True
        self._say(
            f"async_checkpoint: a copy of {show_bytes(needed)} does not fit in the "
            f"{show_bytes(free)} of free memory; the loop waits for this save"
        )
        return False

    def _all(self, answer: bool) -> bool:
        """Whether all ranks say yes."""
        told = torch.tensor(int(answer), device=self._accelerator.device)
        return bool(self._accelerator.reduce(told, "sum") == self._accelerator.num_processes)

    def _write(
        self, unfinished: Path, tensors: list["_Tensors"], texts: Mapping[str, bytes]
    ) -> _Written:
        """Writes this rank's files; where that fails, still takes part in gathering the others'."""
        files: dict[str, File] = {}
        try:
            for share, gathered in tensors:
                content = encode_tensors(share.mine, gathered)
                if share.mine:
                    files[share.file] = self._store.write_file(unfinished, share.file, content)
            for name, text in texts.items():
                files[name] = self._store.write_file(unfinished, name, iter([memoryview(text)]))
            return _Written(files, "", crashed=False)
        except OSError as error:
            return _Written({}, str(error), crashed=False)
        finally:
            for _, gathered in tensors:
                for _ in gathered:
                    pass

    def _dump_progress(self, progress: Progress) -> bytes:
        content = {
            **dataclasses.asdict(progress),
            **dataclasses.asdict(self._provenance),
            "num_processes": self._accelerator.num_processes,
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    def _commit(self, save: "_Save", files: Mapping[str, File]) -> _Committed:
        kept = self._store.commit(
            save.unfinished, save.step, files, {"loss": save.loss}, save.held_out_loss
        )
        messages: list[str] = []
        settings = self._settings
        try:
            self._store.rotate(
                settings.keep_checkpoints, settings.keep_every, settings.keep_best, messages.append
            )
        except OSError as error:  # what was saved stays saved
            messages.append(f"{self._store.folder}: an old checkpoint could not go: {error}")
        return _Committed(kept, messages)

    def _agree(self, committing: "Future[_Committed]", wait: bool) -> int:
        """Gives every rank what the main one knows."""
        outcome = _RUNNING
        if self._is_main and (wait or committing.done()):
            error = committing.exception()
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


class _Tensors(NamedTuple):
    share: Share
    tensors: Iterable[torch.Tensor]


@dataclass
class _Save:
    """A save under way."""

    unfinished: Path
    step: int
    loss: float
    held_out_loss: float | None
    started: float
    behind: bool
    is_by_main_alone: bool
    writing: "Future[_Written]"
    committing: "Future[_Committed] | None" = None
    """Set when all ranks have written; on ranks other than the main one it never ends."""


def _on_main(accelerator: Accelerator, function: Callable[[], Path]) -> tuple[Path | None, str]:
    """Calls it on the main rank; every rank gets its result, or the disk's reason."""
    outcome: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except OSError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    return outcome[0], outcome[1]


def _run(function: Callable[[], T], behind: bool) -> "Future[T]":
    """Calls it now, or in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)

    if behind:
        threading.Thread(target=work, name="checkpoint", daemon=True).start()
    else:
        work()
    return future


def _failure(committing: "Future[_Committed]") -> BaseException:
    error = committing.exception() if committing.done() else None
    return error or CheckpointError("the main process met an error; see its message")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 and noun != 'more' else ''}"
