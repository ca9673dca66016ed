"""Which blocks a step reads, and their tensors; a pure function of the blocks seen before it.

There is no loader and no state: the blocks of any step of any run can be asked for, in any order,
on any number of processes.

    >>> block_ids_at(0, step_blocks=4, num_blocks=6, seed=1).tolist()
    [4, 0, 2, 1]
    >>> block_ids_at(4, step_blocks=4, num_blocks=6, seed=1).tolist()  # the epoch ends in mid-step
    [5, 3, 1, 4]
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from qloop.data.packing import BlockIndex, Integers
from qloop.data.tokens import TokenStore

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

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies to a device."""
        tensors = (self.input_ids, self.labels, self.position_ids)
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def block_ids_at(blocks_seen: int, step_blocks: int, num_blocks: int, seed: int) -> Integers:
    """Gives the blocks of a step, over all ranks, in their global order.

    Every epoch is a permutation of all blocks, drawn from (seed, epoch). A step may span the end of
    one and the start of the next.

    Args:
        blocks_seen: Blocks read before the step; steps of one size: their number times that size.
        step_blocks: Blocks in a step: batch_size * gradient_accumulation_steps * ranks.
        num_blocks: Blocks of the corpus.
        seed: The run's.
    """
    places = np.arange(blocks_seen, blocks_seen + step_blocks)
    epochs, offsets = np.divmod(places, num_blocks)
    ids = np.empty(step_blocks, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        ids[epochs == epoch] = _permutation(num_blocks, seed, epoch)[offsets[epochs == epoch]]
    return ids


@functools.lru_cache(maxsize=2)
def _permutation(num_blocks: int, seed: int, epoch: int) -> Integers:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_blocks)
    order.setflags(write=False)
    return order


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


def count_targets(micro_batches: list[MicroBatch]) -> int:
    """Counts the positions that have a label."""
    return sum(int((micro_batch.labels != IGNORED).sum()) for micro_batch in micro_batches)
