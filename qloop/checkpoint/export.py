"""`qloop export`: writes a checkpoint as a plain model folder, for serving or evaluation.

    full     the weights, converted to --dtype
    lora     the adapter merged into its base
    qlora    the same, with the base in full precision: training used it rounded to 4 bits, so the
             merged model is close to the trained one, not equal

The training state is left out. The folder gets its name once it is complete and on the disk. Full
checkpoints are converted tensor by tensor; a merge holds the base in memory, in fp32.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qloop.checkpoint.resume import PROGRESS, Checkpoint, config_of, read_checkpoint
from qloop.checkpoint.store import find_checkpoint
from qloop.errors import ConfigError, QloopError, explaining_disk_errors
from qloop.model.adapters import merge_adapters
from qloop.model.build import build_model
from qloop.model.state import collect_model_files, collect_weights, fingerprint_weights
from qloop.storage.folders import show_bytes, whole_folder
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
_LEFT_OUT = ("optimizer", PROGRESS, "adapter_", "model.", "model-", "README.md")
_UNFINISHED = ".exporting-"
"""Its own prefix, so that no run deletes the folder as a leftover of a save."""


def export(
    source: Path, destination: Path, dtype: str, base: str | None, say: Callable[[str], None]
) -> None:
    """Writes the model of a checkpoint.

    Args:
        source: A run's folder, its checkpoints folder (for the newest good one), or a checkpoint.
        destination: The new folder; it may exist if it is empty.
        dtype: A key of DTYPES, for the floating-point tensors.
        base: Location of an adapter's base; None: the location at training.
        say: Called with each line for the user.

    Raises:
        ConfigError: The destination is unusable, the base is a different one, or a weight is too
            large for the type.
        CheckpointError: No checkpoint is good, or the disk refuses.
    """
    place = Path(os.path.realpath(destination))  # "." has no name, and a link is not replaced
    with explaining_disk_errors(place):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(f"{destination}: is there already, and not empty; give a new folder")
    if place == Path.cwd():
        raise ConfigError(f"{destination}: is where you are; give the name of a new folder")
    path, manifest = find_checkpoint(source, say)
    if place.is_relative_to(path.resolve()):
        raise ConfigError(f"{destination}: would be a part of the checkpoint; give another folder")
    is_adapter = "adapter_config.json" in manifest.files
    if base and not is_adapter:
        raise ConfigError(f"--base: {path} is a whole model and needs none")
    # Files outside the manifest, such as an editor's dot files, were not verified.
    files = {
        name: (path / name).read_bytes()
        for name in manifest.files
        if not name.startswith(_LEFT_OUT)
    }
    if is_adapter:
        model = _merge(read_checkpoint(path), base, say)
        weights = collect_weights(model)[1]
        files |= collect_model_files(model)
        specs = {name: spec_of(weight) for name, weight in weights.items()}
        size = _write(place, files, specs, weights.__getitem__, dtype)
    else:
        saved = SavedTensors(path, "model")
        size = _write(place, files, saved.specs, saved.read, dtype)
    say(f"exported {path} to {destination} ({dtype}, {show_bytes(size)})")
    say(f"load it: AutoModelForCausalLM.from_pretrained('{destination}', dtype='auto')")


def _merge(checkpoint: Checkpoint, base: str | None, say: Callable[[str], None]) -> Any:
    """Builds base and adapter in fp32, checks that they belong together, and merges them."""
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
    except QloopError as error:  # the adapter was verified, so the base is wrong
        raise ConfigError(
            f"{name}: cannot be the base of {checkpoint.path}: {error}; give its place by --base"
        ) from error
    wanted = checkpoint.provenance.fingerprints["frozen_weights"]
    if config.model.training_method == "qlora":
        say(f"{name}: was trained on in 4 bits, so it cannot be compared with what it was then")
    # Training takes the fingerprint in its compute type, which depends on the machine.
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
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor],
    dtype: str,
) -> int:
    """Writes the new folder, one tensor at a time; returns its size in bytes."""
    specs = {name: _convert_spec(spec, dtype) for name, spec in specs.items()}
    count = max(1, math.ceil(sum(spec.nbytes for spec in specs.values()) / _PART_BYTES))
    shares = deal_out(specs, count) if count > 1 else [align(specs)]
    parts = dict(zip(name_parts("model", count), shares, strict=True))
    texts = dict(files)
    if count > 1:
        texts[f"model{INDEX}"] = index_of(parts)
    texts["config.json"] = _with_dtype(texts["config.json"], dtype)
    with explaining_disk_errors(destination), whole_folder(destination, _UNFINISHED) as folder:
        for file, names in parts.items():
            tensors = (_convert(name, read(name), dtype) for name in names)
            with (folder / file).open("wb") as stream:
                stream.writelines(encode_tensors(names, tensors))
        for name, text in texts.items():
            (folder / name).write_bytes(text)
        return sum((folder / name).stat().st_size for name in [*parts, *texts])


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


def _convert_spec(spec: TensorSpec, dtype: str) -> TensorSpec:
    if spec.dtype not in ("F64", "F32", "F16", "BF16"):
        return spec
    return spec_of(torch.empty(spec.shape, dtype=DTYPES[dtype], device="meta"))


def _with_dtype(config: bytes, dtype: str) -> bytes:
    content = json.loads(config)
    content.pop("torch_dtype", None)
    content["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    return (json.dumps(content, indent=2) + "\n").encode()
