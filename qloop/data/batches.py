"""Which blocks a step reads, and their tensors; a pure function of the blocks seen before it.

There is no loader and no state: the blocks of any step of any run can be asked for, in any order,
on any number of processes.

    >>> block_ids_at(0, step_blocks=4, num_blocks=6, seed=1).tolist()
    [4, 0, 2, 1]
    >>> block_ids_at(4, step_blocks=4, num_blocks=6, seed=1).tolist()  # the epoch ends in mid-step
    [5, 3, 1, 4]
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
from qloop.steps import block_ids_at

IGNORED = -100
"""The label of a position that is no target; the value that torch's cross-entropy passes over."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads; each tensor is int64 of shape [batch, sequence]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """The token that follows each position in its document, or IGNORED; already shifted."""
    position_ids: torch.Tensor
    """Place within the slice, from 0: where it starts anew, another document starts."""

    @functools.cached_property
    def boundaries(self) -> torch.Tensor:
        """Where slices start in the flattened batch, and its end; int32, [slices + 1].

        Found on the CPU: a GPU would have to be waited for, to know how many there are.
        """
        assert self.position_ids.device.type == "cpu"
        starts = (self.position_ids.flatten() == 0).nonzero()[:, 0]
        return torch.cat([starts, torch.tensor([self.position_ids.numel()])]).int()

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies to a device, without waiting for it if this one is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "MicroBatch":
        """Copies to memory that a GPU can read by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        changed = MicroBatch(*map(change, (self.input_ids, self.labels, self.position_ids)))
        vars(changed)["boundaries"] = change(self.boundaries)
        return changed


def build_micro_batch(store: TokenStore, index: BlockIndex, block_ids: Integers) -> MicroBatch:
    """Gathers the slices of some blocks into tensors.

    Padding has no label, and starts at position 0 like a document of its own, so that nothing
    attends to it.
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
            # Tokens before the first learned one are read but are no targets: a prompt.
            untrained = int(store.first_targets[document]) - (first + 1)
            labels[row, column : column + min(max(untrained, 0), length)] = IGNORED
            position_ids[row, here] = np.arange(length)
            column += length
        position_ids[row, column:] = np.arange(index.block_length - column)
    return MicroBatch(*(torch.from_numpy(array) for array in (input_ids, labels, position_ids)))


def count_targets(store: TokenStore, index: BlockIndex, block_ids: Integers) -> int:
    """Counts the positions of some blocks that have a label, without reading a token."""
    pieces = index.pieces_of(block_ids)
    length = index.length[pieces]
    untrained = store.first_targets[index.document[pieces]] - (index.first[pieces] + 1)
    return int((length - np.clip(untrained, 0, length)).sum())


class StepBatches(NamedTuple):
    """What a step reads."""

    block_ids: Integers
    """Of all ranks."""
    micro_batches: list[MicroBatch]
    """Of this rank."""
    target_tokens: int
    """Of all ranks."""


class StepReader:
    """Gives a rank the batches of any step, and meanwhile builds those of the next one."""

    def __init__(
        self,
        store: TokenStore,
        index: BlockIndex,
        step_blocks: int,
        accumulation: int,
        rank: int,
        num_ranks: int,
        seed: int,
        pins: bool,
    ) -> None:
        """Takes what decides a step's batches.

        Args:
            store: The corpus.
            index: Its blocks.
            step_blocks: Blocks in a step, over all ranks.
            accumulation: Micro-batches in a step of a rank.
            rank: This one.
            num_ranks: Of the run. Micro-batch m of a rank is number m * num_ranks + rank of the
                step.
            seed: The run's.
            pins: Whether batches go to memory that a GPU reads by itself.
        """
        self._store, self._index, self._step_blocks, self._seed = store, index, step_blocks, seed
        self._accumulation, self._rank, self._num_ranks = accumulation, rank, num_ranks
        self._pins = pins
        # A thread starts out on the first GPU, where its pinning would take memory from another
        # rank.
        on_gpu = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pins else (None, ())
        self._thread = ThreadPoolExecutor(1, "step reader", *on_gpu)
        self._next: tuple[int, Future[StepBatches]] | None = None

    def read(self, blocks_seen: int) -> StepBatches:
        """Gives the batches of the step that follows so many blocks."""
        if self._next is not None and self._next[0] == blocks_seen:
            batches = self._next[1].result()
        else:
            batches = self._build(blocks_seen)
        after = blocks_seen + self._step_blocks
        self._next = (after, self._thread.submit(self._build, after))
        return batches

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _build(self, blocks_seen: int) -> StepBatches:
        block_ids = block_ids_at(blocks_seen, self._step_blocks, len(self._index), self._seed)
        rank_ids = block_ids.reshape(self._accumulation, self._num_ranks, -1)[:, self._rank]
        micro_batches = [build_micro_batch(self._store, self._index, ids) for ids in rank_ids]
        if self._pins:
            micro_batches = [micro_batch.pin() for micro_batch in micro_batches]
        return StepBatches(
            block_ids, micro_batches, count_targets(self._store, self._index, block_ids)
        )
