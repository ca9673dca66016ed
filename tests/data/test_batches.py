"""Batches: over an epoch each token is learned exactly once, from the tokens before it."""

import threading
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qloop.data.batches import IGNORED, MicroBatch, StepReader, build_micro_batch, count_targets
from qloop.data.packing import PACKINGS, BlockIndex, pack_best_fit
from qloop.data.tokens import TokenStore
from qloop.steps import StepLayout, block_ids_at

both_packings = pytest.mark.parametrize("packing", PACKINGS)
PADDING = 900_000
"""Stands in no document, unlike a real end token: so that padding is known when it is seen."""


class Shape(NamedTuple):
    """What a corpus looks like: tokens of each document, and where its learned ones begin."""

    lengths: list[int]
    first_targets: list[int]


# Short and long documents, two of them cut by a block of 8, three that begin with a prompt.
MIXED = Shape(lengths=[4, 2, 19, 6, 3, 9, 12, 2], first_targets=[1, 1, 11, 3, 1, 1, 9, 1])


@st.composite
def shapes(draw) -> Shape:
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=14))
    first_targets = [
        draw(st.one_of(st.just(1), st.integers(1, length - 1)), label="first target")
        for length in lengths
    ]
    return Shape(lengths, first_targets)


block_lengths = st.integers(2, 16)
some_cases = settings(deadline=None, max_examples=100)


def build_store(shape: Shape, token_type: type = np.uint32) -> TokenStore:
    """Gives every token of the corpus an id of its own, counted through, from 0."""
    offsets = np.concatenate([[0], np.cumsum(shape.lengths)]).astype(np.int64)
    return TokenStore(
        tokens=np.arange(offsets[-1]).astype(token_type),
        offsets=offsets,
        first_targets=np.array(shape.first_targets, dtype=np.int64),
        target_bytes=np.array(shape.lengths, dtype=np.int64),
        end_id=PADDING,
    )


def build(shape: Shape, packing: str, block_length: int) -> tuple[TokenStore, BlockIndex]:
    store = build_store(shape)
    return store, PACKINGS[packing](store.positions, block_length)


def all_blocks(store: TokenStore, index: BlockIndex) -> MicroBatch:
    return build_micro_batch(store, index, np.arange(len(index)))


def document_of(store: TokenStore, token: int) -> int:
    return int(np.searchsorted(store.offsets, token, side="right")) - 1


def targets_of(micro_batches: list[MicroBatch]) -> Counter[tuple[int, int]]:
    """Counts (token read, token to be predicted) over all positions with a label."""
    found: Counter[tuple[int, int]] = Counter()
    for micro_batch in micro_batches:
        labelled = micro_batch.labels != IGNORED
        read = micro_batch.input_ids[labelled].tolist()
        found.update(zip(read, micro_batch.labels[labelled].tolist(), strict=True))
    return found


def wanted_targets(shape: Shape, times: int) -> Counter[tuple[int, int]]:
    """Counts what an epoch should teach: each learned token once, after the token before it."""
    wanted: Counter[tuple[int, int]] = Counter()
    begin = 0
    for length, first_target in zip(*shape, strict=True):
        for place in range(first_target, length):
            wanted[begin + place - 1, begin + place] = times
        begin += length
    return wanted


def read_steps(store, index, step_blocks: int, num_steps: int, seed: int) -> list[MicroBatch]:
    return [
        build_micro_batch(
            store, index, block_ids_at(step * step_blocks, step_blocks, len(index), seed)
        )
        for step in range(num_steps)
    ]


# The law


@both_packings
@given(shape=shapes(), block_length=block_lengths, seed=st.integers(0, 2**32 - 1))
@some_cases
@example(shape=MIXED, block_length=8, seed=0)
def test_an_epoch_teaches_each_token_exactly_once_and_nothing_else(
    packing, shape, block_length, seed
):
    store, index = build(shape, packing, block_length)
    epoch = read_steps(store, index, step_blocks=1, num_steps=len(index), seed=seed)
    assert targets_of(epoch) == wanted_targets(shape, times=1)


@both_packings
@given(shape=shapes(), block_length=block_lengths, step_blocks=st.integers(1, 7))
@some_cases
@example(shape=MIXED, block_length=8, step_blocks=3)
def test_several_epochs_teach_each_token_as_often_however_long_a_step_is(
    packing, shape, block_length, step_blocks
):
    """As many steps as there are blocks read each block once per block of a step."""
    store, index = build(shape, packing, block_length)
    epochs = read_steps(store, index, step_blocks, num_steps=len(index), seed=1)
    assert targets_of(epochs) == wanted_targets(shape, times=step_blocks)


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
def test_two_epochs_teach_each_token_exactly_twice(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    epochs = read_steps(store, index, step_blocks=2, num_steps=len(index), seed=1)
    assert targets_of(epochs) == wanted_targets(shape, times=2)


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
def test_the_store_counts_the_targets_of_an_epoch(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    assert count_targets(store, index, np.arange(len(index))) == store.target_tokens


@both_packings
def test_the_mixed_corpus_has_all_that_the_law_is_about(packing):
    """Else the law could hold for want of a document that ends in mid-block."""
    store, index = build(MIXED, packing, 8)
    documents = [
        set(index.document[index.starts[block] : index.starts[block + 1]].tolist())
        for block in range(len(index))
    ]
    assert max(len(held) for held in documents) >= 2, "documents end inside a block"
    assert np.bincount(index.document).max() >= 2, "a document is cut"
    assert index.padding_tokens > 0, "there is padding"
    assert store.target_tokens < store.positions.sum(), "there are prompts"


# What it rests on


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
@example(shape=MIXED, block_length=8)
def test_labels_never_cross_into_another_document(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    for read, label in targets_of([all_blocks(store, index)]):
        assert document_of(store, read) == document_of(store, label)


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
@example(shape=MIXED, block_length=8)
def test_padding_fills_the_ends_of_blocks_and_has_no_label(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    micro_batch = all_blocks(store, index)
    is_padding = micro_batch.input_ids == PADDING
    assert int(is_padding.sum()) == index.padding_tokens
    assert (micro_batch.labels[is_padding] == IGNORED).all()
    assert (is_padding[:, :-1] <= is_padding[:, 1:]).all(), "only padding follows padding"


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
@example(shape=MIXED, block_length=8)
def test_the_place_counts_on_within_a_slice_or_padding_and_is_zero_elsewhere(
    packing, shape, block_length
):
    store, index = build(shape, packing, block_length)
    micro_batch = all_blocks(store, index)
    rows = zip(micro_batch.input_ids.tolist(), micro_batch.position_ids.tolist(), strict=True)
    for tokens, places in rows:
        for column, (token, place) in enumerate(zip(tokens, places, strict=True)):
            before = tokens[column - 1] if column else None
            goes_on = token == PADDING == before or (
                before is not None
                and token == before + 1
                and document_of(store, token) == document_of(store, before)
            )
            assert place == (places[column - 1] + 1 if goes_on else 0)


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
def test_a_documents_last_token_is_never_read(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    read = set(all_blocks(store, index).input_ids.unique().tolist())
    assert not read & set((store.offsets[1:] - 1).tolist())


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
def test_prompts_are_read_although_they_are_not_learned(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    read = all_blocks(store, index).input_ids
    assert int((read != PADDING).sum()) == int(store.positions.sum())


# Examples


def test_a_document_cut_in_two_by_wrapping():
    """Tokens 0 to 3 and 4 to 8; blocks of 5."""
    store, index = build(Shape([4, 5], [1, 1]), "wrapped", 5)
    micro_batch = all_blocks(store, index)
    assert micro_batch.input_ids.tolist() == [[0, 1, 2, 4, 5], [6, 7, PADDING, PADDING, PADDING]]
    assert micro_batch.labels.tolist() == [[1, 2, 3, 5, 6], [7, 8, -100, -100, -100]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_two_documents_kept_whole_by_best_fit():
    store, index = build(Shape([4, 5], [1, 1]), "best_fit", 5)
    micro_batch = all_blocks(store, index)
    assert micro_batch.input_ids.tolist() == [[4, 5, 6, 7, PADDING], [0, 1, 2, PADDING, PADDING]]
    assert micro_batch.labels.tolist() == [[5, 6, 7, 8, -100], [1, 2, 3, -100, -100]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]


def test_a_prompt_longer_than_a_slice_leaves_the_slice_without_labels():
    """Tokens 0 to 6, of which 5 and 6 are learned; blocks of 3."""
    store, index = build(Shape([7], [5]), "wrapped", 3)
    micro_batch = all_blocks(store, index)
    assert micro_batch.input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert micro_batch.labels.tolist() == [[-100, -100, -100], [-100, 5, 6]]


def test_blocks_come_in_the_order_asked_for_and_as_often():
    store, index = build(Shape([3, 3, 3], [1, 1, 1]), "wrapped", 2)
    micro_batch = build_micro_batch(store, index, np.array([2, 0, 2]))
    assert micro_batch.input_ids.tolist() == [[6, 7], [0, 1], [6, 7]]


def test_tensors_are_64_bit_whatever_the_store_holds():
    store = build_store(MIXED, token_type=np.uint16)
    micro_batch = all_blocks(store, pack_best_fit(store.positions, 8))
    tensors = (micro_batch.input_ids, micro_batch.labels, micro_batch.position_ids)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert len({tuple(tensor.shape) for tensor in tensors}) == 1


def test_the_largest_ids_of_a_store_survive():
    store = TokenStore(
        tokens=np.array([65_535, 32_768, 65_534], dtype=np.uint16),
        offsets=np.array([0, 3]),
        first_targets=np.array([1]),
        target_bytes=np.array([3]),
        end_id=65_534,
    )
    micro_batch = all_blocks(store, pack_best_fit(store.positions, 2))
    assert micro_batch.input_ids.tolist() == [[65_535, 32_768]]
    assert micro_batch.labels.tolist() == [[32_768, 65_534]]


def test_a_copy_to_a_device_holds_the_same():
    micro_batch = all_blocks(*build(MIXED, "best_fit", 8))
    copy = micro_batch.to(torch.device("cpu"))
    assert torch.equal(copy.input_ids, micro_batch.input_ids)
    assert torch.equal(copy.labels, micro_batch.labels)
    assert torch.equal(copy.position_ids, micro_batch.position_ids)


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
def test_targets_are_counted_as_the_labels_are(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    for block in np.arange(len(index)):
        labels = build_micro_batch(store, index, np.array([block])).labels
        assert count_targets(store, index, np.array([block])) == int((labels != IGNORED).sum())


@both_packings
@given(shape=shapes(), block_length=block_lengths)
@some_cases
def test_boundaries_are_where_slices_start(packing, shape, block_length):
    store, index = build(shape, packing, block_length)
    boundaries = all_blocks(store, index).boundaries.tolist()
    assert boundaries == sorted(set(boundaries))
    lengths = []
    for block in range(len(index)):
        slices = index.length[index.starts[block] : index.starts[block + 1]].tolist()
        padding = block_length - sum(slices)
        lengths += [*slices, padding] if padding else slices
    assert boundaries == [0, *np.cumsum(lengths).tolist()]


# Reading ahead


def read_by(index, store, num_ranks=2, rank=1):
    step = StepLayout(4, 4 // num_ranks)
    return StepReader(store, index, step, rank=rank, num_ranks=num_ranks, seed=3, pins=False)


def test_a_step_is_the_same_whether_it_was_read_ahead_or_asked_for():
    store, index = build(MIXED, "best_fit", 4)
    in_turn, at_once = read_by(index, store), read_by(index, store)
    steps = [in_turn.read(blocks_seen) for blocks_seen in (0, 4, 8, 12)]
    direct = at_once.read(12)
    assert direct.block_ids.tolist() == steps[3].block_ids.tolist()
    assert targets_of(direct.micro_batches) == targets_of(steps[3].micro_batches)
    assert direct.target_tokens == steps[3].target_tokens
    for reader in (in_turn, at_once):
        reader.close()


def test_batches_are_pinned_for_the_gpu_of_their_rank(monkeypatch):
    """Whose thread would else pin for the first, of which each rank would take a part."""
    chosen, pinned = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda number: chosen.append((number, threading.get_ident()))
    )
    monkeypatch.setattr(
        MicroBatch, "pin", lambda batch: pinned.append(threading.get_ident()) or batch
    )
    store, index = build(MIXED, "best_fit", 4)
    reader = StepReader(store, index, StepLayout(4, 4), rank=0, num_ranks=1, seed=3, pins=True)
    reader.read(0)
    reader.read(4)
    reader.close()
    (number, thread), *others = chosen
    assert (number, others) == (3, [])
    assert thread in pinned
    assert thread != threading.get_ident()


def test_each_rank_knows_the_targets_of_all():
    store, index = build(MIXED, "best_fit", 4)
    readers = [read_by(index, store, rank=rank) for rank in range(2)]
    steps = [reader.read(0) for reader in readers]
    labels = torch.stack([m.labels for step in steps for m in step.micro_batches])
    for step, reader in zip(steps, readers, strict=True):
        assert step.target_tokens == int((labels != IGNORED).sum())
        reader.close()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_teaches_the_same_on_any_number_of_ranks(num_ranks, batch_size):
    """Sixteen blocks in a step; micro-batch m of a rank is number m * num_ranks + rank of it."""
    store, index = build(MIXED, "best_fit", 4)
    accumulation = 16 // (num_ranks * batch_size)
    for step in range(5):
        ids = block_ids_at(16 * step, 16, len(index), seed=5)
        micro_batches = [
            build_micro_batch(store, index, rank_ids)
            for rank in range(num_ranks)
            for rank_ids in ids.reshape(accumulation, num_ranks, -1)[:, rank]
        ]
        assert {micro_batch.input_ids.shape for micro_batch in micro_batches} == {(batch_size, 4)}
        assert targets_of(micro_batches) == targets_of([build_micro_batch(store, index, ids)])
