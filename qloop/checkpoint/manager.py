"""Saves a run as checkpoints, in the background or synchronously.

    checkpoint-100/
      model.safetensors, config.json       full: `from_pretrained` loads the folder as it is
      adapter_model.safetensors, ...       lora, qlora: `PeftModel.from_pretrained` does
      tokenizer.json, ...
      optimizer.safetensors                moments by parameter name: `lm_head.weight/exp_avg`
      progress.json                        counters, config and provenance of the run
      manifest.json, COMMIT                see store.py, which writes them

Checkpoints larger than `share_above_gb` are written by all ranks, each to its own files
(`model-00001-of-00004.safetensors`), with the index that `from_pretrained` reads. Tensors are never
split, so a reader needs to know neither the number of ranks nor the engine.

Random states are not saved: every forward pass is seeded from (seed, step, micro-batch).
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from qloop.checkpoint.resume import MOMENTS, PROGRESS, Provenance
from qloop.checkpoint.shares import Share, share_of
from qloop.checkpoint.store import CheckpointStore, File, GoodCheckpoint
from qloop.config.keys import CheckpointConfig
from qloop.distributed.engine import Engine
from qloop.distributed.ranks import on_all, on_main
from qloop.errors import CheckpointError
from qloop.hardware import count_free_memory
from qloop.steps import Progress
from qloop.storage.folders import show_bytes
from qloop.storage.tensors import INDEX, HostCopies, encode_tensors, gather_mine

T = TypeVar("T")

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")


class RefusedSaveError(CheckpointError):
    """The disk refused a part of a save; counted as a failed save on every rank."""


@contextlib.contextmanager
def _refusing_the_save() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusedSaveError(str(error)) from error


class CheckpointManager:
    """Saves the checkpoints of one run; every rank calls every method.

    Each rank writes its share of a save, in the background if host memory can hold a copy. Once all
    ranks have written, the main rank commits, which blocks the loop.
    """

    def __init__(
        self,
        *,
        store: CheckpointStore,
        settings: CheckpointConfig,
        accelerator: Accelerator,
        provenance: Provenance,
        files: Mapping[str, bytes],
        say: Callable[[str], None],
    ) -> None:
        """Stores the arguments; `files` go into every checkpoint: model config, tokenizer."""
        self._store = store
        self._settings = settings
        self._accelerator = accelerator
        self._provenance = provenance
        self._files = files
        self._say = say
        self._copies = HostCopies()
        self._save: _Save | None = None
        self._failed_saves = 0

    def save(
        self,
        engine: Engine,
        progress: Progress,
        loss: float,
        held_out_loss: float | None,
        must_succeed: bool,
    ) -> None:
        """Saves the run's state, or copies it and starts a background save.

        `held_out_loss` is None if it was not measured after this step. `must_succeed`, for the end
        of a run, saves synchronously and raises on any failure.

        Raises:
            CheckpointError: The disk refused `max_failed_saves` saves in a row, or this one if it
                must succeed. Every older checkpoint is untouched.
            LockedError: Another process has taken the run's folder.
        """
        self.poll(wait=True)
        started = time.perf_counter()
        try:
            unfinished = on_main(self._accelerator, lambda: self._begin(progress.step))
        except RefusedSaveError as refused:
            self._fail(str(refused), must_succeed)
            return
        shares = self._deal_out(engine)
        may_wait = self._settings.async_checkpoint and not must_succeed
        in_background = may_wait and self._fits_in_memory(shares)
        contents: list[tuple[Share, Iterable[torch.Tensor]]] = [
            (share, gather_mine(share.tensors, share.mine)) for share in shares
        ]
        if in_background:
            contents = [
                (share, self._copies.take(share.file, share.mine, tensors))
                for share, tensors in contents
            ]
        texts = self._collect_texts(progress, shares)
        messages: list[str] = []

        def write() -> dict[str, File]:
            self._rotate(messages)  # postponed by the commit of a background save
            return self._write(unfinished, contents, texts)

        self._save = _Save(
            unfinished=unfinished,
            step=progress.step,
            loss=loss,
            held_out_loss=held_out_loss,
            in_background=in_background,
            is_by_main_alone=not any(share.index_file for share in shares),
            writing=_run(write, in_background),
            messages=messages,
            blocking_seconds=time.perf_counter() - started,
        )
        if not in_background:
            self.poll(wait=True, must_succeed=must_succeed)

    def poll(self, wait: bool = False, must_succeed: bool = False) -> None:
        """Commits the save if all ranks have written their files; `wait` waits until they have.

        Raises:
            CheckpointError: The save failed, and it must succeed or was the last attempt.
            LockedError: Another process has taken the run's folder.
        """
        save = self._save
        if save is None or not self._all(wait or save.writing.done()):
            return
        self._save = None
        started = time.perf_counter()
        saved, refusal = None, ""
        try:
            written = on_all(self._accelerator, save.writing.result)
            files = dict(gather_object(list(written.items())))
            saved = on_main(self._accelerator, lambda: self._commit(save, files))
        except RefusedSaveError as refused:
            refusal = str(refused)
        save.blocking_seconds += time.perf_counter() - started
        if saved:
            self._failed_saves = 0
            self._report(save, saved)
            return
        for message in save.messages:
            self._say(message)
        if self._is_main:
            self._store.abandon(save.unfinished)
        self._fail(refusal, must_succeed)

    def close(self) -> None:
        """Finishes the background save of a run that an error ends; communicates with no rank.

        The main rank commits the save if it has written all files itself. Otherwise it cannot,
        because it does not know the hashes of the other ranks' files.
        """
        save, self._save = self._save, None
        if save is None or not self._is_main:
            return
        if not save.is_by_main_alone:
            self._say(f"{self._store.folder}: the last save was not finished")
            return
        try:
            saved = self._commit(save, save.writing.result())
        except Exception as error:  # the error that ends the run is the one to raise
            self._say(f"{self._store.folder}: the last save failed: {error}")
        else:
            self._report(save, saved)

    def describe_space(self, engine: Engine, step: int, last_step: int) -> list[str]:
        """Returns a warning if the disk cannot hold the coming checkpoints; else an empty list."""
        _, weights = engine.collect_weights()
        size = sum(tensor.spec.nbytes for tensor in weights.values())
        size += sum(spec.nbytes for spec in engine.moment_specs().values())
        size += sum(map(len, self._files.values()))
        saves = math.ceil((last_step - step) / self._settings.save_steps)
        kept = self._settings.keep_checkpoints + int(self._settings.keep_best)
        if self._settings.keep_every:
            kept += last_step // self._settings.keep_every - step // self._settings.keep_every
        # One more than are kept: the oldest is deleted after the newest is committed.
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

    @_refusing_the_save()
    def _begin(self, step: int) -> Path:
        return self._store.begin(step)

    def _deal_out(self, engine: Engine) -> list[Share]:
        """Returns this rank's shares: the main rank writes all tensors, or each rank a part."""
        stem, weights = engine.collect_weights()
        groups = {stem: weights, MOMENTS: engine.collect_moments()}
        size = sum(tensor.spec.nbytes for group in groups.values() for tensor in group.values())
        is_large = size > self._settings.share_above_gb * 1e9
        num_writers = self._accelerator.num_processes if is_large else 1
        rank = self._accelerator.process_index
        return [share_of(rank, num_writers, name, tensors) for name, tensors in groups.items()]

    def _fits_in_memory(self, shares: list[Share]) -> bool:
        """Whether every rank has memory for a copy of its share."""
        size = sum(spec.nbytes for share in shares for spec in share.mine.values())
        # Earlier copies are overwritten; the ranks of a machine share its memory.
        more = torch.tensor([max(0, size - self._copies.nbytes)], device=self._accelerator.device)
        first = self._accelerator.process_index - self._accelerator.local_process_index
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = int(self._accelerator.gather(more)[first : first + local].sum())
        free = count_free_memory()
        if self._all(needed < 0.8 * free):
            return True
        self._say(
            f"async_checkpoint: a copy of {show_bytes(needed)} does not fit in the "
            f"{show_bytes(free)} of free memory; this save blocks the loop"
        )
        return False

    def _all(self, answer: bool) -> bool:
        """Whether the answer is True on all ranks."""
        count = torch.tensor(int(answer), device=self._accelerator.device)
        return bool(self._accelerator.reduce(count, "sum") == self._accelerator.num_processes)

    @_refusing_the_save()
    def _write(
        self,
        unfinished: Path,
        contents: list[tuple[Share, Iterable[torch.Tensor]]],
        texts: Mapping[str, bytes],
    ) -> dict[str, File]:
        """Writes this rank's files; if that fails, still takes part in gathering the others."""
        files: dict[str, File] = {}
        try:
            for share, tensors in contents:
                encoded = encode_tensors(share.mine, tensors)
                if share.mine:
                    files[share.file] = self._store.write_file(unfinished, share.file, encoded)
            for name, text in texts.items():
                files[name] = self._store.write_file(unfinished, name, [memoryview(text)])
            return files
        finally:
            for _, tensors in contents:
                for _ in tensors:
                    pass

    def _collect_texts(self, progress: Progress, shares: list[Share]) -> dict[str, bytes]:
        """Returns the files without tensors, by name; only the main rank writes them."""
        if not self._is_main:
            return {}
        content = {
            **dataclasses.asdict(progress),
            **dataclasses.asdict(self._provenance),
            "num_processes": self._accelerator.num_processes,
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        text = (json.dumps(content, indent=2) + "\n").encode()
        indexes = {f"{share.stem}{INDEX}": share.index_file for share in shares}
        indexes = {name: index for name, index in indexes.items() if index}
        return {**self._files, PROGRESS: text, **indexes}

    @_refusing_the_save()
    def _commit(self, save: "_Save", files: Mapping[str, File]) -> GoodCheckpoint:
        saved = self._store.commit(
            save.unfinished, save.step, files, {"loss": save.loss}, save.held_out_loss
        )
        # Deleting large files takes seconds, so after a background save the next save does it, in
        # the background. Until then one more checkpoint exists, which `describe_space` counts.
        if not save.in_background:
            self._rotate(save.messages)
        return saved

    def _rotate(self, messages: list[str]) -> None:
        """Deletes old checkpoints on the main rank; a failure does not fail the save."""
        if not self._is_main:
            return
        keep = self._settings
        try:
            self._store.rotate(
                keep.keep_checkpoints, keep.keep_every, keep.keep_best, messages.append
            )
        except OSError as error:
            messages.append(f"{self._store.folder}: an old checkpoint could not go: {error}")

    def _report(self, save: "_Save", saved: GoodCheckpoint) -> None:
        for message in save.messages:
            self._say(message)
        self._say(
            f"saved {saved.path} ({show_bytes(saved.manifest.total_bytes)}; blocked the loop for "
            f"{save.blocking_seconds:.2f} s)"
        )

    def _fail(self, refusal: str, must_succeed: bool) -> None:
        """Counts a failed save; raises if that was the last attempt."""
        self._failed_saves += 1
        text = f"{self._store.folder}: a checkpoint could not be saved: {refusal}"
        if must_succeed or self._failed_saves >= self._settings.max_failed_saves:
            saves = "1 save" if self._failed_saves == 1 else f"{self._failed_saves} saves"
            raise CheckpointError(
                f"{text}; {saves} in a row failed, every older checkpoint is untouched; make room, "
                "and type the same command again"
            )
        self._say(
            f"{text}; every older checkpoint is untouched; training goes on and the next save "
            f"tries again, {self._settings.max_failed_saves - self._failed_saves} more failed in a "
            "row will end the run"
        )


@dataclass
class _Save:
    """A save whose files are being written."""

    unfinished: Path
    step: int
    loss: float
    held_out_loss: float | None
    in_background: bool
    is_by_main_alone: bool
    writing: "Future[dict[str, File]]"
    messages: list[str]
    """From the rotation; shown to the user once the writing has ended."""
    blocking_seconds: float


def _run(function: Callable[[], T], in_background: bool) -> "Future[T]":
    """Calls the function now, or in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # raised by `result()`
            future.set_exception(error)

    if in_background:
        threading.Thread(target=work, name="checkpoint", daemon=True).start()
    else:
        work()
    return future
