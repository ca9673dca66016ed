"""Writes and reads safetensors files, one tensor at a time.

The library writes a whole file in one call, so its bytes cannot be hashed on their way to the disk.
The format is the length of a JSON header, the header with type, shape and offsets of each tensor,
then their bytes (https://github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from qloop.errors import CheckpointError

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BYTES = {name: dtype.itemsize for dtype, name in _TYPES.items()}

INDEX = ".safetensors.index.json"
"""Ending of the name of the index file, which maps tensors to files, as in transformers."""


class TensorSpec(NamedTuple):
    """Type and shape of a tensor, as a safetensors header names them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of such a tensor in bytes."""
        return _BYTES[self.dtype] * math.prod(self.shape)


class LazyTensor(NamedTuple):
    """A tensor to save, which may be sharded over the ranks."""

    spec: TensorSpec
    gather: Callable[[], torch.Tensor]
    """Returns the whole tensor; if it is sharded, all ranks must call it, in the same order."""


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Returns a tensor's type and shape.

    Raises:
        CheckpointError: The type has no name in the format.
    """
    if tensor.dtype not in _TYPES:
        raise CheckpointError(f"a tensor of type {tensor.dtype} cannot be saved")
    return TensorSpec(_TYPES[tensor.dtype], tuple(tensor.shape))


def align(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Sorts the widest types first, so that every tensor of a file is aligned to its item size."""
    return dict(sorted(specs.items(), key=lambda item: (-_BYTES[item[1].dtype], item[0])))


def encode_tensors(
    specs: Mapping[str, TensorSpec], tensors: Iterable[torch.Tensor]
) -> Iterator[memoryview]:
    """Yields the bytes of a safetensors file; copies one tensor at a time to the CPU.

    The specs are in the order of `align`, the tensors in the same.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def deal_out(specs: Mapping[str, TensorSpec], num_writers: int) -> list[dict[str, TensorSpec]]:
    """Deals tensors to writers, the largest first, each to the writer with the fewest bytes so far.

    Of three tensors of 4, 3 and 2 values, two writers get [4] and [3, 2].
    """
    shares: list[dict[str, TensorSpec]] = [{} for _ in range(num_writers)]
    sizes = [0] * num_writers
    for name in sorted(specs, key=lambda name: (-specs[name].nbytes, name)):
        writer = sizes.index(min(sizes))
        shares[writer][name] = specs[name]
        sizes[writer] += specs[name].nbytes
    return [align(share) for share in shares]


def name_parts(stem: str, count: int) -> list[str]:
    """Returns the file names of a stem, as in transformers: `model-00001-of-00002.safetensors`."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]


def index_of(parts: Mapping[str, Mapping[str, TensorSpec]]) -> bytes:
    """Returns the content of the index file, which maps tensors to files."""
    size = sum(spec.nbytes for specs in parts.values() for spec in specs.values())
    where = {name: file for file, specs in parts.items() for name in specs}
    content = {"metadata": {"total_size": size}, "weight_map": where}
    return (json.dumps(content, indent=2) + "\n").encode()


def gather_mine(
    tensors: Mapping[str, LazyTensor], mine: Mapping[str, TensorSpec]
) -> Iterator[torch.Tensor]:
    """Yields the tensors in `mine`; takes part in gathering all others, too.

    The order of `tensors` is the same on every rank, and `mine` follows it.
    """
    for name, tensor in tensors.items():
        whole = tensor.gather()
        if name in mine:
            yield whole


class SavedTensors:
    """The tensors of `stem.safetensors`, or of `stem-00001-of-00004.safetensors` and so on."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Reads names, types and shapes, but no values.

        Raises:
            CheckpointError: There is no such file, or it is not a safetensors file.
        """
        whole = folder / f"{stem}.safetensors"
        files = [whole] if whole.exists() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        self.place = folder / f"{stem}*.safetensors" if len(files) > 1 else whole
        self.specs: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
        for file in files or [whole]:
            specs = _read_specs(file)
            self.specs.update(specs)
            self._files.update(dict.fromkeys(specs, file))

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Reads a tensor, or some of its rows, to the CPU."""
        with safe_open(self._files[name], "pt") as opened:
            if rows == slice(None):
                return opened.get_tensor(name)  # type: ignore[no-any-return]
            return opened.get_slice(name)[rows]  # type: ignore[no-any-return]

    def refuse_misfits(self, expected: Mapping[str, TensorSpec]) -> None:
        """Compares names, types and shapes with those of the live model.

        Raises:
            CheckpointError: They differ; the message names the first tensor of each difference.
        """
        found = self.specs
        problems = []
        missing = sorted(expected.keys() - found.keys())
        unknown = sorted(found.keys() - expected.keys())
        both = expected.keys() & found.keys()
        other = sorted(name for name in both if expected[name] != found[name])
        if missing:
            problems.append(f"lacks {len(missing)} tensors, the first {missing[0]}")
        if unknown:
            problems.append(f"holds {len(unknown)} that the model lacks, the first {unknown[0]}")
        if other:
            name = other[0]
            problems.append(
                f"holds {len(other)} of another type or shape, the first {name}: "
                f"{_show(found[name])} instead of {_show(expected[name])}"
            )
        if problems:
            raise CheckpointError(f"{self.place}: {'; '.join(problems)}")


def _read_specs(file: Path) -> dict[str, TensorSpec]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: TensorSpec(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable: {error}") from error


def _show(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


class HostCopies:
    """Copies of tensors in host memory that is allocated once and reused by every save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Size of the allocated memory."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(
        self, file: str, specs: Mapping[str, TensorSpec], tensors: Iterable[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Copies a file's tensors; complete on return, overwritten by the next call for it."""
        copies = []
        for name, tensor in zip(specs, tensors, strict=True):
            buffer = self._buffers.get((file, name))
            if buffer is None or spec_of(buffer) != spec_of(tensor):
                # Pinned memory makes copies from a GPU asynchronous.
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[file, name] = buffer
            copies.append(buffer.copy_(tensor.detach(), non_blocking=True))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies
