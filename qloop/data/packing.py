"""Packs documents into blocks: an index of (document, first, length) slices; numpy only.

A document of n tokens has n-1 places from which a next token can be predicted: positions 0 to n-2.
Packing deals out these positions, each exactly once, whatever the document's length. The label of
position i is token i+1 of the *document*, so a cut between two slices costs nothing:

    tokens    10 11 12 13 14 15 99      n = 7, with 99 the end of the document; 6 positions
    slice A   10 11 12 13               labels 11 12 13 14
    slice B               14 15         labels             15 99

The last token is never an input, since nothing follows it: every position of every block is a
target, or padding, or part of a prompt.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockIndex:
    """The slices of all blocks, in block order; block b holds slices `starts[b]:starts[b + 1]`."""

    block_length: int
    """Tokens in a block, of which the last may be padding."""
    starts: Integers  # [blocks + 1]
    document: Integers  # [slices]
    first: Integers  # [slices], position in the document
    length: Integers  # [slices]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def padding_tokens(self) -> int:
        """Positions of all blocks that no slice fills."""
        return len(self) * self.block_length - int(self.length.sum())

    def pieces_of(self, block_ids: Integers) -> Integers:
        """Gives the numbers of the slices of some blocks, block by block."""
        first, counts = self.starts[block_ids], self.starts[block_ids + 1] - self.starts[block_ids]
        begins = np.cumsum(counts) - counts  # where each block's slices start among the result's
        pieces: Integers = np.arange(counts.sum()) + np.repeat(first - begins, counts)
        return pieces

    def lengths_of(self, block_ids: Integers) -> tuple[Integers, Integers]:
        """Gives the lengths of all slices of some blocks, and the padding of each block.

        Two blocks of 8 with slices 5, 2 and 6 give [5, 2, 6] and [1, 2].
        """
        lengths = self.length[self.pieces_of(block_ids)]
        counts = self.starts[block_ids + 1] - self.starts[block_ids]
        return lengths, self.block_length - np.add.reduceat(lengths, np.cumsum(counts) - counts)


def pack_best_fit(positions: Integers, block_length: int) -> BlockIndex:
    """Packs best-fit-decreasing: a document up to the block's length stays whole.

    A longer one is cut into full blocks and a rest. The rests and the short documents go, longest
    first, each into the block that has the least room left for it (Ding et al. 2024, arXiv
    2404.10830).

    The work is done by lengths, not by documents: all pieces of one length are alike, and so are
    all blocks with the same room. With room for 10 and 3 blocks of that kind, 7 pieces of length 4
    go 2, 2 into the first two... each step moves whole groups, so that ten million documents take
    seconds.

    Args:
        positions: Input positions of each document, n-1 for n tokens; at least 1 each. [documents]
        block_length: Tokens in a block.
    """
    document, first, length = _cut(positions, block_length)
    order = np.argsort(-length, kind="stable")
    counts = np.bincount(length, minlength=block_length + 1)

    block_of_piece = np.empty(len(length), dtype=np.int64)
    rooms: dict[int, list[Integers]] = {}  # room left -> groups of blocks that have it
    num_blocks = 0
    next_piece = 0
    for piece_length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[piece_length])
        for room in sorted(room for room in rooms if room >= piece_length):
            if not remaining:
                break
            blocks = np.concatenate(rooms.pop(room))
            placed = _place(blocks, room, piece_length, remaining, rooms)
            block_of_piece[order[next_piece : next_piece + len(placed)]] = placed
            next_piece += len(placed)
            remaining -= len(placed)
        if remaining:
            per_block = block_length // piece_length
            blocks = np.arange(num_blocks, num_blocks - (-remaining // per_block), dtype=np.int64)
            num_blocks += len(blocks)
            placed = _place(blocks, block_length, piece_length, remaining, rooms)
            block_of_piece[order[next_piece : next_piece + len(placed)]] = placed
            next_piece += len(placed)
    assert next_piece == len(length), "every piece has a block"

    by_block = np.lexsort((first, document, block_of_piece))
    starts = np.searchsorted(block_of_piece[by_block], np.arange(num_blocks + 1))
    return BlockIndex(
        block_length, starts.astype(np.int64), document[by_block], first[by_block], length[by_block]
    )


def _place(
    blocks: Integers,
    room: int,
    piece_length: int,
    count: int,
    rooms: dict[int, list[Integers]],
) -> Integers:
    """Deals up to `count` pieces to blocks of equal room; notes the room that each block has left.

    Returns:
        The block of each piece that was placed, at most `count` of them.
    """
    per_block = room // piece_length
    full, rest = divmod(min(count, len(blocks) * per_block), per_block)
    groups = (
        (blocks[:full], room - per_block * piece_length),
        (blocks[full : full + 1] if rest else blocks[:0], room - rest * piece_length),
        (blocks[full + 1 :] if rest else blocks[full:], room),
    )
    for group, room_left in groups:
        if len(group) and room_left:
            rooms.setdefault(room_left, []).append(group)
    return np.concatenate(
        [np.repeat(blocks[:full], per_block), np.repeat(blocks[full:], rest)[:rest]]
    )


def pack_wrapped(positions: Integers, block_length: int) -> BlockIndex:
    """Packs documents one after another, cutting where a block ends; only the last block is padded.

    Args:
        positions: Input positions of each document, n-1 for n tokens; at least 1 each. [documents]
        block_length: Tokens in a block.
    """
    ends = np.cumsum(positions)
    begins = ends - positions
    # A slice starts where a document starts and where a block starts: with documents of 3 and 4
    # positions and blocks of 5, at 0, 3 and 5, in blocks 0, 0 and 1.
    first_block = begins // block_length
    document, number = _number_pieces((ends - 1) // block_length - first_block + 1)
    block = first_block[document] + number
    slice_begins = np.maximum(begins[document], block * block_length)
    return BlockIndex(
        block_length,
        np.append(0, np.cumsum(np.bincount(block))),
        document,
        slice_begins - begins[document],
        np.diff(np.append(slice_begins, ends[-1])),
    )


def _cut(positions: Integers, block_length: int) -> tuple[Integers, Integers, Integers]:
    """Cuts documents into pieces of at most a block: document, first and length of each."""
    document, number = _number_pieces(-(-positions // block_length))
    first = number * block_length
    return document, first, np.minimum(positions[document] - first, block_length)


def _number_pieces(pieces: Integers) -> tuple[Integers, Integers]:
    """Names each piece by document and number in it: for 2 and 3 pieces, 0 0 1 1 1 and 0 1 0 1 2.

    Args:
        pieces: Pieces of each document. [documents]
    """
    document = np.repeat(np.arange(len(pieces), dtype=np.int64), pieces)
    firsts = np.repeat(np.cumsum(pieces) - pieces, pieces)
    return document, np.arange(len(document), dtype=np.int64) - firsts
