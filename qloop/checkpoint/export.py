"""`qloop export`: a checkpoint becomes a plain model directory, for whoever serves or evaluates it.

    checkpoint of full      its weights, in the type that is asked for
    checkpoint of lora      the adapter merged into its base
    checkpoint of qlora     the same, into the base in full precision: training saw the base rounded
                            to 4 bits, so the merged model is near what was trained, not equal to it

What belongs to training stays behind. The directory appears by one rename, when it is whole and on
the disk. Full checkpoints are converted tensor by tensor; a merge needs the base in fp32 in memory.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qloop.checkpoint.resume import PROGRESS, Checkpoint, config_of, read_checkpoint
from qloop.checkpoint.store import CheckpointStore, DamagedError, GoodCheckpoint
from qloop.errors import CheckpointError, ConfigError, QloopError, explaining_disk_errors
from qloop.model.adapters import merge_adapters
from qloop.model.build import build_model
from qloop.model.state import collect_model_files, collect_weights, fingerprint_weights
from qloop.storage.filesystem import FileSystem
from qloop.storage.folders import show_bytes
from qloop.storage.tensors import (
    INDEX,
    SavedTensors,
    TensorSpec,
    align,
    deal_out,
    encode_tensors,
    index_of,
    name_parts,
    spec_of,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PART_BYTES = 5e9
_LEFT_BEHIND = ("optimizer", PROGRESS, "adapter_", "model.", "model-", "README.md")


def export(
    source: Path, destination: Path, dtype: str, base: str | None, tell: Callable[[str], None]
) -> None:
    """Writes the model of a checkpoint.

    Args:
        source: A checkpoint's folder, or a run's: then its newest good one.
        destination: The new folder; there is none of that name, or an empty one.
        dtype: A key of DTYPES: the type of its floating-point tensors.
        base: For an adapter, where its base is now; where it was at training if none is given.
        tell: Gets lines on what was done.

    Raises:
        ConfigError: The destination cannot be used, the base is another, or a weight is too large
            for the type.
        CheckpointError: There is no good checkpoint, or the disk refuses.
    """
    place = Path(os.path.realpath(destination))  # "." has no name, and a link is not replaced
    with explaining_disk_errors(place):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(f"{destination}: is there already, and not empty; give a new folder")
    if place == Path.cwd():
        raise ConfigError(f"{destination}: is where you are; give the name of a new folder")
    path, manifest = find_checkpoint(source, tell)
    if place.is_relative_to(path.resolve()):
        raise ConfigError(f"{destination}: would be a part of the checkpoint; give another folder")
    is_adapter = "adapter_config.json" in manifest.files
    if base and not is_adapter:
        raise ConfigError(f"--base: {path} is a whole model and needs none")
    # What the manifest does not name was not verified: an editor's dot files.
    files = {
        name: (path / name).read_bytes()
        for name in manifest.files
        if not name.startswith(_LEFT_BEHIND)
    }
    if is_adapter:
        model = _merge(read_checkpoint(path), base, tell)
        weights = collect_weights(model)[1]
        files |= collect_model_files(model)
        kinds = {name: spec_of(weight) for name, weight in weights.items()}
        size = _write(place, files, kinds, weights.__getitem__, dtype)
    else:
        saved = SavedTensors(path, "model")
        size = _write(place, files, saved.kinds, saved.read, dtype)
    tell(f"exported {path} to {destination} ({dtype}, {show_bytes(size)})")
    tell(f"load it: AutoModelForCausalLM.from_pretrained('{destination}', dtype='auto')")


def find_checkpoint(source: Path, tell: Callable[[str], None]) -> GoodCheckpoint:
    """Finds the checkpoint that is meant, and verifies every byte of it; changes nothing.

    Raises:
        CheckpointError: There is no good one.
    """
    problems = []
    try:
        folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
        paths = list(reversed(CheckpointStore(folder, FileSystem()).list_checkpoints()))
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
    for path in paths or [source]:
        try:
            manifest = CheckpointStore(path.parent, FileSystem()).verify(path)
        except (DamagedError, OSError) as error:
            problems.append(f"{path}: not a good checkpoint: {error}")
            continue
        for problem in problems:
            tell(problem)
        return GoodCheckpoint(path, manifest)
    problems.append(f"{source}: nothing to export; give a run's folder or a checkpoint-N")
    raise CheckpointError("\n".join(problems))


def _merge(checkpoint: Checkpoint, base: str | None, tell: Callable[[str], None]) -> Any:
    """Builds base and adapter in fp32, makes sure that they belong together, and merges them."""
    config = config_of(checkpoint)
    changes: dict[str, object] = {"training_method": "lora", "gradient_checkpointing": False}
    if base:
        changes |= {"model_name": base, "model_revision": None}
    name = base or config.model.model_name
    try:
        model = build_model(
            config.model.model_copy(update=changes),
            config.lora,
            "fp32",
            torch.device("cpu"),
            seed=config.run.seed,
            checkpoint=checkpoint.path,
        )
    except QloopError as error:  # the adapter is as it was written, so it is the base that differs
        raise ConfigError(
            f"{name}: cannot be the base of {checkpoint.path}: {error}; give its place by --base"
        ) from error
    wanted = checkpoint.provenance.fingerprints["frozen_weights"]
    if config.model.training_method == "qlora":
        tell(f"{name}: was trained on in 4 bits, so it cannot be compared with what it was then")
    # Training had it in the type that it computed in, which depends on the machine.
    elif wanted not in (
        fingerprint_weights(model),
        fingerprint_weights(model, torch.bfloat16),
    ):
        raise ConfigError(
            f"{name}: its weights are not those that this adapter was trained on; give their place "
            "by --base"
        )
    return merge_adapters(model)


def _write(
    destination: Path,
    files: Mapping[str, bytes],
    kinds: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor],
    dtype: str,
) -> int:
    """Writes a folder beside the destination, and gives it its name; counts its bytes."""
    kinds = {name: _converted(kind, dtype) for name, kind in kinds.items()}
    writers = max(1, math.ceil(sum(kind.nbytes for kind in kinds.values()) / _PART_BYTES))
    shares = deal_out(kinds, writers) if writers > 1 else [align(kinds)]
    parts = dict(zip(name_parts("model", writers), shares, strict=True))
    texts = dict(files)
    if writers > 1:
        texts[f"model{INDEX}"] = index_of(parts)
    texts["config.json"] = _with_dtype(texts["config.json"], dtype)
    contents: dict[str, Iterable[memoryview]] = {
        name: encode_tensors(names, (_convert(n, read(n), dtype) for n in names))
        for name, names in parts.items()
    }
    contents |= {name: [memoryview(text)] for name, text in texts.items()}

    disk = FileSystem()
    store = CheckpointStore(destination.parent, disk)
    # No name that a run deletes, should someone export into the folder of its checkpoints.
    unfinished = destination.with_name(f".exporting-{destination.name}-{uuid.uuid4().hex[:8]}")
    with explaining_disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        disk.make_folder(unfinished)
        try:
            written = [store.write_file(unfinished, *content) for content in contents.items()]
            disk.sync_folder(unfinished)
            disk.rename(unfinished, destination)
            disk.sync_folder(destination.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return sum(file.bytes for file in written)


def _convert(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(DTYPES[dtype])
    if converted.isinf().any() and not tensor.isinf().any():
        raise ConfigError(
            f"--dtype: {name} holds {tensor.abs().max():.3g}, more than {dtype} can, whose largest "
            f"is {torch.finfo(DTYPES[dtype]).max:.3g}; give bf16 or fp32"
        )
    return converted


def _converted(kind: TensorSpec, dtype: str) -> TensorSpec:
    if kind.dtype not in ("F64", "F32", "F16", "BF16"):
        return kind
    return spec_of(torch.empty(kind.shape, dtype=DTYPES[dtype], device="meta"))


def _with_dtype(config: bytes, dtype: str) -> bytes:
    content = json.loads(config)
    content.pop("torch_dtype", None)
    content["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    return (json.dumps(content, indent=2) + "\n").encode()
