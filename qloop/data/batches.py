"""Tensors of blocks, and the reader that builds the micro-batches of any step in the background.

There is no data loader and no state to save: `steps.block_ids_at` chooses the blocks of a step.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from qloop.data.packing import BlockIndex, Integers
from qloop.data.tokens import TokenStore
from qloop.steps import StepLayout, block_ids_at

IGNORED = -100
"""The label of a position that is no target; `ignore_index` of torch's cross-entropy."""


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass; each tensor is int64 of shape [batch, sequence]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """The token that follows each position in its document, or IGNORED; already shifted."""
    position_ids: torch.Tensor
    """Position within the slice, from 0; each 0 starts another slice, or padding."""

    @functools.cached_property
    def boundaries(self) -> torch.Tensor:
        """Where slices start in the flattened batch, and its end; int32, [slices + 1].

        Computed on the CPU: their number decides the shape, so a GPU would block the loop.
        """
        assert self.position_ids.device.type == "cpu"
        starts = (self.position_ids.flatten() == 0).nonzero()[:, 0]
        return torch.cat([starts, torch.tensor([self.position_ids.numel()])]).int()

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies to a device; does not block if this batch is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "MicroBatch":
        """Copies to pinned memory, which a GPU reads without the CPU."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        changed = MicroBatch(*map(change, (self.input_ids, self.labels, self.position_ids)))
        vars(changed)["boundaries"] = change(self.boundaries)
        return changed


def build_micro_batch(store: TokenStore, index: BlockIndex, block_ids: Integers) -> MicroBatch:
    """Gathers the slices of some blocks into tensors; `block_ids` ([batch]) may repeat.

    Padding has no label, and its positions start at 0 like a document's, so nothing attends to it.
    """
    shape = (len(block_ids), index.block_length)
    input_ids = np.full(shape, store.end_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for row, block in enumerate(block_ids.tolist()):
        column = 0
        for piece in range(int(index.starts[block]), int(index.starts[block + 1])):
            document, first = int(index.document[piece]), int(index.first[piece])
            length = int(index.length[piece])
            here = slice(column, column + length)
            begin = int(store.offsets[document]) + first
            tokens = store.tokens[begin : begin + length + 1].astype(np.int64)
            input_ids[row, here] = tokens[:-1]
            labels[row, here] = tokens[1:]
            # A prompt's tokens are read but are no targets.
            untrained = int(store.first_targets[document]) - (first + 1)
            labels[row, column : column + min(max(untrained, 0), length)] = IGNORED
            position_ids[row, here] = np.arange(length)
            column += length
        position_ids[row, column:] = np.arange(index.block_length - column)
    return MicroBatch(*(torch.from_numpy(array) for array in (input_ids, labels, position_ids)))


def count_targets(store: TokenStore, index: BlockIndex, block_ids: Integers) -> int:
    """Counts the positions of some blocks that have a label, without reading any tokens."""
    pieces = index.pieces_of(block_ids)
    length = index.length[pieces]
    untrained = store.first_targets[index.document[pieces]] - (index.first[pieces] + 1)
    return int((length - np.clip(untrained, 0, length)).sum())


class StepBatches(NamedTuple):
    """The data of one step."""

    block_ids: Integers
    """Of all ranks, in their global order."""
    micro_batches: list[MicroBatch]
    """Of this rank."""
    target_tokens: int
    """Over all ranks."""


class StepReader:
    """Builds a rank's batches of any step, and in the background those of the next step.

    Micro-batch m of a rank is number m * num_ranks + rank of the step. `pins` copies the batches to
    pinned memory.
    """

    def __init__(
        self,
        store: TokenStore,
        index: BlockIndex,
        step: StepLayout,
        *,
        rank: int,
        num_ranks: int,
        seed: int,
        pins: bool,
    ) -> None:
        self._store, self._index, self._step, self._seed = store, index, step, seed
        self._rank, self._num_ranks, self._pins = rank, num_ranks, pins
        # A new thread uses the first GPU; pinning there would take memory from another rank.
        on_gpu = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pins else (None, ())
        self._thread = ThreadPoolExecutor(1, "step reader", *on_gpu)
        self._next: tuple[int, Future[StepBatches]] | None = None

    def read(self, blocks_seen: int) -> StepBatches:
        """Returns the batches of the step that starts after this many blocks of the run."""
        if self._next is not None and self._next[0] == blocks_seen:
            batches = self._next[1].result()
        else:
            batches = self._build(blocks_seen)
        after = blocks_seen + self._step.blocks
        self._next = (after, self._thread.submit(self._build, after))
        return batches

    def close(self) -> None:
        """Stops the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _build(self, blocks_seen: int) -> StepBatches:
        block_ids = block_ids_at(blocks_seen, self._step.blocks, len(self._index), self._seed)
        rank_ids = block_ids.reshape(self._step.accumulation, self._num_ranks, -1)[:, self._rank]
        micro_batches = [build_micro_batch(self._store, self._index, ids) for ids in rank_ids]
        if self._pins:
            micro_batches = [micro_batch.pin() for micro_batch in micro_batches]
        return StepBatches(
            block_ids, micro_batches, count_targets(self._store, self._index, block_ids)
        )
