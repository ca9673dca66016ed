"""Tensors to safetensors, piece by piece, and what a file of them holds.

The library writes a file in one go, so nothing could hash the bytes on their way to the disk. The
format is small enough to be written here: the length of a JSON header, the header with type, shape
and place of each tensor, then their bytes. (https://github.com/huggingface/safetensors)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qloop.errors import CheckpointError

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Kind(NamedTuple):
    """Type and shape of a tensor, as a safetensors header names them."""

    dtype: str
    shape: tuple[int, ...]


def kind_of(tensor: torch.Tensor) -> Kind:
    """Gives a tensor's type and shape.

    Raises:
        CheckpointError: It is of a type that is not saved.
    """
    if tensor.dtype not in _TYPES:
        raise CheckpointError(f"a tensor of type {tensor.dtype} cannot be saved")
    return Kind(_TYPES[tensor.dtype], tuple(tensor.shape))


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """Yields the bytes of a safetensors file; each tensor is copied to the CPU in its turn."""
    # The widest types first, so that every tensor is aligned to its own size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = kind_of(tensors[name])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def read_kinds(file: Path) -> dict[str, Kind]:
    """Reads type and shape of each tensor, and none of their values.

    Raises:
        CheckpointError: It is no safetensors file.
    """
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Kind(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable: {error}") from error


def load_tensors(file: Path, expected: Mapping[str, Kind]) -> dict[str, torch.Tensor]:
    """Loads a file to the CPU, if it holds just what is expected.

    Raises:
        CheckpointError: A name, type or shape differs; nothing was loaded.
    """
    refuse_misfits(file, expected)
    return load_file(file)


def refuse_misfits(file: Path, expected: Mapping[str, Kind]) -> None:
    """Compares names, types and shapes in a file with those of the live model.

    Raises:
        CheckpointError: They differ, with the first of each sort of difference.
    """
    found = read_kinds(file)
    problems = []
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if missing:
        problems.append(f"lacks {len(missing)} tensors, the first {missing[0]}")
    if unknown:
        problems.append(f"holds {len(unknown)} that the model has not, the first {unknown[0]}")
    if other:
        name = other[0]
        problems.append(
            f"holds {len(other)} of another kind, the first {name}: {_show(found[name])} instead "
            f"of {_show(expected[name])}"
        )
    if problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}")


def _show(kind: Kind) -> str:
    return f"{kind.dtype} {list(kind.shape)}"


class HostCopies:
    """Copies of tensors in host memory that is taken once and used again at every save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory taken so far."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, group: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies tensors; the copies are whole on return, and are overwritten by the next call."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get((group, name))
            if buffer is None or kind_of(buffer) != kind_of(tensor):
                # Pinned memory lets the GPU write all copies at its own pace.
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[group, name] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies
