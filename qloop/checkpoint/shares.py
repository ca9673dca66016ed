"""Divides the tensors of a save: the main rank writes all of them, or every rank a part.

Each rank writes whole tensors to its own file, so any number of ranks can read the checkpoint.
"""

from collections.abc import Mapping
from typing import NamedTuple

from qloop.storage.tensors import LazyTensor, TensorSpec, align, deal_out, index_of, name_parts


class Share(NamedTuple):
    """A rank's part of the weights, or of the moments."""

    stem: str
    file: str
    tensors: dict[str, LazyTensor]
    """The tensors of all ranks, in the order in which they are gathered."""
    mine: dict[str, TensorSpec]
    """The tensors that this rank writes."""
    index_file: bytes
    """Its content; empty if there is only one file."""


def share_of(rank: int, num_writers: int, stem: str, tensors: Mapping[str, LazyTensor]) -> Share:
    """Returns the rank's share of the tensors; `num_writers` is 1 or the number of ranks."""
    specs = align({name: tensor.spec for name, tensor in tensors.items()})
    ordered = {name: tensors[name] for name in specs}
    if num_writers == 1:
        mine = specs if rank == 0 else {}
        return Share(stem, f"{stem}.safetensors", ordered, mine, b"")
    parts = dict(zip(name_parts(stem, num_writers), deal_out(specs, num_writers), strict=True))
    file = list(parts)[rank]
    return Share(stem, file, ordered, parts[file], index_of(parts))
