"""Tensors as safetensors: what the library reads, dealt to writers, in one file or in several."""

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qloop.errors import CheckpointError
from qloop.storage.tensors import (
    LazyTensor,
    SavedTensors,
    TensorSpec,
    align,
    deal_out,
    encode_tensors,
    gather_mine,
    spec_of,
)

TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float16)


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return align({name: spec_of(tensor) for name, tensor in tensors.items()})


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    specs = specs_of(tensors)
    file.write_bytes(b"".join(encode_tensors(specs, [tensors[name] for name in specs])))


@given(
    st.dictionaries(
        st.text("ab./", min_size=1, max_size=5),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_tensors_are_written_as_the_library_reads_them(tmp_path_factory, shapes):
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    file = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    write_tensors(file, tensors)
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].equal(tensors[name]) for name in tensors)
    assert SavedTensors(file.parent, "t").specs == specs_of(tensors)


def test_a_tensor_that_is_no_contiguous_memory_is_written_by_its_values(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"t": tensor})
    assert load_file(file)["t"].equal(tensor)


def test_a_type_that_has_no_name_in_the_format_is_refused():
    with pytest.raises(CheckpointError, match="complex64 cannot be saved"):
        spec_of(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(2), "holds 1 that the model lacks, the first b"),
        ("a", torch.zeros(3), r"the first a: F32 \[3\] instead of F32 \[2\]"),
        ("a", torch.zeros(2, dtype=torch.float16), r"a: F16 \[2\] instead of F32 \[2\]"),
    ],
)
def test_tensors_of_another_name_type_or_shape_are_not_loaded(tmp_path, name, tensor, message):
    file = tmp_path / "t.safetensors"
    save_file({name: tensor}, file)
    with pytest.raises(CheckpointError, match=message):
        SavedTensors(tmp_path, "t").refuse_misfits({"a": spec_of(torch.zeros(2))})


@given(
    st.dictionaries(
        st.text("ab./", min_size=1, max_size=5),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_every_tensor_is_dealt_to_one_writer(shapes, num_writers):
    dealt = {n: spec_of(torch.empty(shape, dtype=dtype)) for n, (dtype, shape) in shapes.items()}
    shares = deal_out(dealt, num_writers)
    assert len(shares) == num_writers
    assert sorted(name for share in shares for name in share) == sorted(dealt)
    assert all(share == align(share) for share in shares)
    sizes = [sum(spec.nbytes for spec in share.values()) for share in shares]
    largest = max((spec.nbytes for spec in dealt.values()), default=0)
    assert max(sizes) - min(sizes) <= largest, "as even as whole tensors allow"


def test_tensors_of_several_files_are_read_as_of_one(tmp_path):
    whole = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2), "c": torch.zeros(())}
    for number, share in enumerate(deal_out(specs_of(whole), 2)):
        write_tensors(tmp_path / f"t-{number}-of-2.safetensors", {n: whole[n] for n in share})
    saved = SavedTensors(tmp_path, "t")
    saved.refuse_misfits(specs_of(whole))
    assert all(saved.read(name).equal(whole[name]) for name in whole)
    assert saved.read("a", slice(1, 3)).equal(whole["a"][1:3])


def test_gathering_ones_own_takes_part_in_gathering_the_others():
    asked: list[str] = []

    def gather(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.zeros(1)

    spec = spec_of(torch.zeros(1))
    tensors = {name: LazyTensor(spec, functools.partial(gather, name)) for name in ("a", "b", "c")}
    assert len(list(gather_mine(tensors, {"b": spec}))) == 1
    assert list(gather_mine(tensors, {})) == []
    assert asked == ["a", "b", "c"] * 2
