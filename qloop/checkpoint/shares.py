"""Who writes which tensors of a save: the main rank all of them, or every rank some.

Tensors are not cut: a rank writes some of them whole, to a file of its own, and a checkpoint tells
nobody how many ranks there were.
"""

from collections.abc import Mapping
from typing import NamedTuple

from qloop.storage.tensors import LazyTensor, TensorSpec, align, deal_out, index_of, name_parts


class Share(NamedTuple):
    """What a rank writes of the weights, or of the moments."""

    stem: str
    file: str
    pieces: dict[str, LazyTensor]
    """All, in the order in which they are gathered."""
    mine: dict[str, TensorSpec]
    index_file: bytes
    """Which tensor is in which file, as transformers reads it; empty where there is one file."""


def share_of(rank: int, writers: int, stem: str, pieces: Mapping[str, LazyTensor]) -> Share:
    """Deals out the tensors of a stem.

    Args:
        rank: Of the share that is wanted.
        writers: Ranks that write: 1, or all.
        stem: Of the files.
        pieces: The tensors, by name.
    """
    kinds = align({name: piece.kind for name, piece in pieces.items()})
    ordered = {name: pieces[name] for name in kinds}
    if writers == 1:
        mine = kinds if rank == 0 else {}
        return Share(stem, f"{stem}.safetensors", ordered, mine, b"")
    parts = dict(zip(name_parts(stem, writers), deal_out(kinds, writers), strict=True))
    file = list(parts)[rank]
    return Share(stem, file, ordered, parts[file], index_of(parts))
