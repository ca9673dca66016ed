"""Packing: each position of each document exactly once, and as few blocks as promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qloop.data.packing import BlockIndex, pack_best_fit, pack_wrapped

both_packings = pytest.mark.parametrize("pack", [pack_best_fit, pack_wrapped])
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)
block_lengths = st.integers(1, 24)
some_cases = settings(deadline=None, max_examples=150)


def pack_lengths(pack, positions: list[int], block_length: int) -> BlockIndex:
    return pack(np.array(positions, dtype=np.int64), block_length)


def slices_of(index: BlockIndex) -> list[list[tuple[int, int, int]]]:
    """Gives (document, first, length) of each slice, by block."""
    slices = np.stack([index.document, index.first, index.length], axis=1).tolist()
    starts = index.starts.tolist()
    return [
        [tuple(slices[i]) for i in range(starts[block], starts[block + 1])]
        for block in range(len(index))
    ]


def fills_of(index: BlockIndex) -> list[int]:
    return [sum(length for _, _, length in block) for block in slices_of(index)]


def best_fit_decreasing(positions: list[int], block_length: int) -> list[int]:
    """Gives the fill of each block, piece by piece, as the algorithm is told in words."""
    pieces = []
    for length in positions:
        pieces += [block_length] * (length // block_length)
        pieces += [length % block_length] if length % block_length else []
    fills: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [block for block, fill in enumerate(fills) if fill + piece <= block_length]
        if fitting:
            fills[max(fitting, key=lambda block: fills[block])] += piece
        else:
            fills.append(piece)
    return fills


# Examples


def test_wrapped_cuts_where_a_block_ends():
    index = pack_lengths(pack_wrapped, [3, 4], 5)
    assert slices_of(index) == [[(0, 0, 3), (1, 0, 2)], [(1, 2, 2)]]
    assert index.padding_tokens == 3


def test_best_fit_keeps_both_documents_whole():
    index = pack_lengths(pack_best_fit, [3, 4], 5)
    assert slices_of(index) == [[(1, 0, 4)], [(0, 0, 3)]]
    assert index.padding_tokens == 3


def test_the_index_of_the_wrapped_example_in_full():
    index = pack_lengths(pack_wrapped, [3, 4], 5)
    assert len(index) == 2
    assert index.block_length == 5
    assert index.starts.tolist() == [0, 2, 3]
    assert index.document.tolist() == [0, 1, 1]
    assert index.first.tolist() == [0, 0, 2]
    assert index.length.tolist() == [3, 2, 2]


def test_wrapped_cuts_a_long_document_into_blocks():
    index = pack_lengths(pack_wrapped, [2, 9, 1], 4)
    assert slices_of(index) == [[(0, 0, 2), (1, 0, 2)], [(1, 2, 4)], [(1, 6, 3), (2, 0, 1)]]
    assert index.padding_tokens == 0


def test_best_fit_cuts_a_long_document_into_full_blocks_and_a_rest():
    index = pack_lengths(pack_best_fit, [7, 2], 3)
    assert slices_of(index) == [[(0, 0, 3)], [(0, 3, 3)], [(0, 6, 1), (1, 0, 2)]]
    assert index.padding_tokens == 0


def test_best_fit_takes_the_block_with_the_least_room_not_the_first_that_fits():
    index = pack_lengths(pack_best_fit, [12, 9, 9, 2], 20)
    assert slices_of(index) == [[(0, 0, 12)], [(1, 0, 9), (2, 0, 9), (3, 0, 2)]]


def test_best_fit_deals_out_many_documents_of_one_length():
    index = pack_lengths(pack_best_fit, [4] * 7, 10)
    assert fills_of(index) == [8, 8, 8, 4]


def test_best_fit_fills_the_rooms_that_longer_documents_left():
    index = pack_lengths(pack_best_fit, [7, 7, 7, 3, 3], 10)
    assert sorted(fills_of(index)) == [7, 10, 10]


@both_packings
def test_a_document_as_long_as_a_block_is_a_block(pack):
    index = pack_lengths(pack, [5], 5)
    assert slices_of(index) == [[(0, 0, 5)]]
    assert index.padding_tokens == 0


@both_packings
def test_a_document_of_two_blocks_has_no_rest(pack):
    assert slices_of(pack_lengths(pack, [10], 5)) == [[(0, 0, 5)], [(0, 5, 5)]]


@both_packings
def test_a_single_position_makes_one_padded_block(pack):
    index = pack_lengths(pack, [1], 8)
    assert slices_of(index) == [[(0, 0, 1)]]
    assert index.padding_tokens == 7


# Laws


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_every_position_of_every_document_occurs_exactly_once(pack, positions, block_length):
    index = pack_lengths(pack, positions, block_length)
    found = [
        (document, position)
        for block in slices_of(index)
        for document, first, length in block
        for position in range(first, first + length)
    ]
    assert sorted(found) == [(d, i) for d, length in enumerate(positions) for i in range(length)]


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_no_block_is_empty_or_over_full(pack, positions, block_length):
    index = pack_lengths(pack, positions, block_length)
    assert all(1 <= fill <= block_length for fill in fills_of(index))


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_no_slice_is_empty(pack, positions, block_length):
    assert pack_lengths(pack, positions, block_length).length.min() >= 1


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_starts_rise_from_zero_to_the_number_of_slices(pack, positions, block_length):
    index = pack_lengths(pack, positions, block_length)
    assert index.starts[0] == 0
    assert index.starts[-1] == len(index.document) == len(index.first) == len(index.length)
    assert (np.diff(index.starts) > 0).all()


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_a_block_holds_a_document_at_most_once_and_in_document_order(pack, positions, block_length):
    for block in slices_of(pack_lengths(pack, positions, block_length)):
        documents = [document for document, _, _ in block]
        assert documents == sorted(set(documents))


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_padding_is_what_the_blocks_have_more_than_the_documents(pack, positions, block_length):
    index = pack_lengths(pack, positions, block_length)
    assert index.padding_tokens == len(index) * block_length - sum(positions)
    assert index.padding_tokens == sum(block_length - fill for fill in fills_of(index))


@both_packings
@some_cases
@given(positions=lengths, block_length=block_lengths, data=st.data())
def test_lengths_of_some_blocks_are_those_of_their_slices(pack, positions, block_length, data):
    index = pack_lengths(pack, positions, block_length)
    block_ids = data.draw(st.lists(st.integers(0, len(index) - 1), min_size=1, max_size=9))
    found, padding = index.lengths_of(np.array(block_ids))
    slices = slices_of(index)
    assert found.tolist() == [length for block in block_ids for _, _, length in slices[block]]
    assert padding.tolist() == [block_length - fills_of(index)[block] for block in block_ids]


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_the_same_documents_give_the_same_blocks(pack, positions, block_length):
    one, two = (pack_lengths(pack, positions, block_length) for _ in range(2))
    assert slices_of(one) == slices_of(two)


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_the_index_holds_64_bit_integers(pack, positions, block_length):
    index = pack_lengths(pack, positions, block_length)
    for array in (index.starts, index.document, index.first, index.length):
        assert array.dtype == np.int64


@both_packings
@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_the_given_lengths_are_left_as_they_are(pack, positions, block_length):
    given_lengths = np.array(positions, dtype=np.int64)
    pack(given_lengths, block_length)
    assert given_lengths.tolist() == positions


@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_best_fit_keeps_every_document_whole_that_fits(positions, block_length):
    index = pack_lengths(pack_best_fit, positions, block_length)
    slices = np.bincount(index.document).tolist()
    assert slices == [-(-length // block_length) for length in positions]


@given(
    positions=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    block_length=st.integers(1, 20),
)
@settings(deadline=None, max_examples=400)
def test_best_fit_fills_blocks_as_the_plain_algorithm_does(positions, block_length):
    index = pack_lengths(pack_best_fit, positions, block_length)
    expected = best_fit_decreasing(positions, block_length)
    assert len(index) == len(expected)
    assert sorted(fills_of(index)) == sorted(expected)


@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_wrapped_has_padding_only_in_the_last_block(positions, block_length):
    index = pack_lengths(pack_wrapped, positions, block_length)
    assert fills_of(index)[:-1] == [block_length] * (len(index) - 1)
    assert len(index) == -(-sum(positions) // block_length)


@given(positions=lengths, block_length=block_lengths)
@some_cases
def test_wrapped_keeps_the_order_of_the_documents(positions, block_length):
    index = pack_lengths(pack_wrapped, positions, block_length)
    places = list(zip(index.document.tolist(), index.first.tolist(), strict=True))
    assert places == sorted(places)


@both_packings
def test_a_large_corpus_is_packed_and_conserved(pack):
    random = np.random.default_rng(3)
    positions = np.maximum(1, random.lognormal(6.0, 1.4, size=200_000)).astype(np.int64)
    assert positions.max() > 2048, "documents are cut"
    index = pack(positions, 2048)
    assert int(index.length.sum()) == int(positions.sum())
    per_document = np.bincount(index.document, weights=index.length, minlength=200_000)
    assert (per_document == positions).all()
    fills = np.add.reduceat(index.length, index.starts[:-1])
    assert fills.min() >= 1
    assert fills.max() <= 2048
