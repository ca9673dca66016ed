"""`qloop export`: a checkpoint becomes a plain model directory, for whoever serves or evaluates it.

    checkpoint of full      its weights, in the type that is asked for
    checkpoint of lora      the adapter merged into its base
    checkpoint of qlora     the same, into the base in full precision: training saw the base rounded
                            to 4 bits, so the merged model is near what was trained, not equal to it

What belongs to training stays behind. The directory appears by one rename, when it is whole.
"""

import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qloop.checkpoint.filesystem import FileSystem
from qloop.checkpoint.reading import Checkpoint, read_checkpoint
from qloop.checkpoint.store import COMMIT, MANIFEST, CheckpointStore, DamagedError, show_bytes
from qloop.checkpoint.tensors import (
    INDEX,
    Kind,
    SavedTensors,
    align,
    deal_out,
    encode_tensors,
    index_of,
    kind_of,
    name_parts,
)
from qloop.config import Config
from qloop.errors import CheckpointError, ConfigError, telling_of_disk_errors
from qloop.model.build import build_model, fingerprint_weights, merge_adapters
from qloop.model.saving import collect_model_files, collect_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PART_BYTES = 5e9
_OF_TRAINING = ("optimizer", "progress.json", MANIFEST, COMMIT, "adapter_", "model.", "model-")


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
        ConfigError: The destination is in use, or the base is another.
        CheckpointError: There is no good checkpoint, or the disk refuses.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination}: is there already, and not empty; give another folder")
    checkpoint = find_checkpoint(source, tell)
    is_adapter = (checkpoint.path / "adapter_config.json").exists()
    if base and not is_adapter:
        raise ConfigError(f"--base: {checkpoint.path} is a whole model and needs none")
    files = {
        file.name: file.read_bytes()
        for file in sorted(checkpoint.path.iterdir())
        if not file.name.startswith(_OF_TRAINING) and file.name != "README.md"
    }
    if is_adapter:
        model = _merge(checkpoint, base, tell)
        weights = collect_weights(model)[1]
        files |= collect_model_files(model)
        _write(destination, files, {n: kind_of(t) for n, t in weights.items()}, weights.get, dtype)
    else:
        saved = SavedTensors(checkpoint.path, "model")
        _write(destination, files, saved.kinds, saved.read, dtype)
    size = sum(file.stat().st_size for file in destination.iterdir())
    tell(f"exported {checkpoint.path} to {destination} ({dtype}, {show_bytes(size)})")
    tell(f"load it: AutoModelForCausalLM.from_pretrained('{destination}', dtype='auto')")


def find_checkpoint(source: Path, tell: Callable[[str], None]) -> Checkpoint:
    """Finds the checkpoint that is meant, and verifies every byte of it; changes nothing.

    Raises:
        CheckpointError: There is no good one.
    """
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    paths = list(reversed(CheckpointStore(folder, FileSystem()).list_checkpoints()))
    for path in paths or [source]:
        try:
            CheckpointStore(path.parent, FileSystem()).verify(path)
        except (DamagedError, OSError) as error:
            tell(f"{path}: not a good checkpoint: {error}")
            continue
        return read_checkpoint(path)
    raise CheckpointError(f"{source}: holds no good checkpoint; give a run's folder or one of its")


def _merge(checkpoint: Checkpoint, base: str | None, tell: Callable[[str], None]) -> Any:
    """Builds base and adapter in fp32, makes sure that they belong together, and merges them."""
    config = Config.model_validate(checkpoint.origins.config)
    changes: dict[str, object] = {"training_method": "lora", "gradient_checkpointing": False}
    if base:
        changes |= {"model_name": base, "model_revision": None}
    model = build_model(
        config.model.model_copy(update=changes),
        config.lora,
        "fp32",
        torch.device("cpu"),
        config.run.seed,
        checkpoint.path,
    )
    name = base or config.model.model_name
    wanted = checkpoint.origins.fingerprints["frozen_weights"]
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
    kinds: Mapping[str, Kind],
    read: Callable[[str], torch.Tensor | None],
    dtype: str,
) -> None:
    """Writes a folder beside the destination, and gives it its name."""
    kinds = {name: _converted(kind, dtype) for name, kind in kinds.items()}
    writers = max(1, math.ceil(sum(kind.nbytes for kind in kinds.values()) / _PART_BYTES))
    shares = deal_out(kinds, writers) if writers > 1 else [align(kinds)]
    parts = dict(zip(name_parts("model", writers), shares, strict=True))
    texts = dict(files)
    if writers > 1:
        texts[f"model{INDEX}"] = index_of(parts)
    texts["config.json"] = _with_dtype(texts["config.json"], dtype)

    def tensors(names: Mapping[str, Kind]) -> Iterator[torch.Tensor]:
        for name in names:
            tensor = read(name)
            assert tensor is not None
            yield tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor

    with telling_of_disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        unfinished = destination.with_name(f".unfinished-{destination.name}-{uuid.uuid4().hex[:8]}")
        unfinished.mkdir()
        try:
            for file, names in parts.items():
                with (unfinished / file).open("wb") as stream:
                    stream.writelines(encode_tensors(names, tensors(names)))
            for file, text in texts.items():
                (unfinished / file).write_bytes(text)
            unfinished.rename(destination)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _converted(kind: Kind, dtype: str) -> Kind:
    if kind.dtype not in ("F64", "F32", "F16", "BF16"):
        return kind
    return kind_of(torch.empty(kind.shape, dtype=DTYPES[dtype], device="meta"))


def _with_dtype(config: bytes, dtype: str) -> bytes:
    content = json.loads(config)
    content.pop("torch_dtype", None)
    content["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    return (json.dumps(content, indent=2) + "\n").encode()
