"""Which rank writes which tensors of a save: the main rank all of them, or every rank a part.

A rank writes whole tensors to a file of its own. So a checkpoint does not depend on the number of
ranks that wrote it.
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
    """The content of the index file; empty if there is one file only."""


def share_of(rank: int, num_writers: int, stem: str, tensors: Mapping[str, LazyTensor]) -> Share:
    """Deals out the tensors of a stem to one writer or to all ranks; returns the rank's share."""
    specs = align({name: tensor.spec for name, tensor in tensors.items()})
    ordered = {name: tensors[name] for name in specs}
    if num_writers == 1:
        mine = specs if rank == 0 else {}
        return Share(stem, f"{stem}.safetensors", ordered, mine, b"")
    parts = dict(zip(name_parts(stem, num_writers), deal_out(specs, num_writers), strict=True))
    file = list(parts)[rank]
    return Share(stem, file, ordered, parts[file], index_of(parts))
