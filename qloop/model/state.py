"""The state of a model: the tensors and files to save, parameter counts, fingerprints.

Saved names and files are those that transformers and PEFT load.
"""

import contextlib
import copy
import hashlib
import io
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict


def collect_weights(
    model: Any, state: dict[str, torch.Tensor] | None = None
) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns the stem of the files to save to, and the trained tensors by their saved names.

    They are the unwrapped model's own tensors, not copies, unless the published model joins or
    splits some. `state` replaces the model's own where that holds shards.
    """
    state = model.state_dict() if state is None else state
    if hasattr(model, "peft_config"):
        import peft

        # The embedding layers belong to the base; "auto" would ask the hub about them.
        tensors = peft.get_peft_model_state_dict(
            model, state_dict=state, save_embedding_layers=False
        )
        return "adapter_model", tensors
    # As save_pretrained does it: one name for tied weights, and the names of the published models.
    state = remove_tied_weights_from_state_dict(state, model)
    return "model", revert_weight_conversion(model, state)


def collect_files(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Returns the files to save besides tensors: configs, tokenizer, the model's own code.

    Contents by file name; they do not change during a run.
    """
    files = collect_model_files(model)
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name, save_jinja_files=False)
        return files | _read_folder(Path(name))


def collect_model_files(model: Any) -> dict[str, bytes]:
    """Returns the contents of a model's configs and its own code, by file name."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        if hasattr(model, "peft_config"):
            for config in model.peft_config.values():
                config = copy.deepcopy(config)
                config.inference_mode = True  # as PEFT saves it
                config.save_pretrained(folder)
            model.save_pretrained(folder, selected_adapters=[])  # the model card alone
        else:
            assert isinstance(model, PreTrainedModel)
            model.save_pretrained(folder, state_dict={})
        return _read_folder(folder)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Counts all parameters, 4-bit ones as if unpacked, and the trained ones."""
    total = trained = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        total += parameter.nbytes * 2 if packed else parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    return total, trained


def fingerprint_weights(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hashes name, type, shape and a sample of some hundred values of every frozen tensor.

    It distinguishes bases, and a base from a fine-tuned one, in milliseconds; it does not detect
    deliberate changes of single weights. Floating-point tensors are hashed as if of type `dtype`.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().reshape(-1)
        scales = getattr(parameter, "quant_state", None)  # of a 4-bit weight
        if scales is not None:  # stored in numbers of another type, the bytes are the same
            flat = flat.view(torch.uint8)
        shape = tuple(parameter.shape) if scales is None else tuple(scales.shape)
        some = flat[:: max(1, flat.numel() // 256)]
        if dtype and some.is_floating_point():
            some = some.to(dtype)
        digest.update(f"{name} {some.dtype} {shape}".encode())
        values = some.double().tolist()
        digest.update(struct.pack(f"{len(values)}d", *values))
        if scales is not None:
            for state in (scales, scales.state2) if scales.nested else (scales,):
                digest.update(state.absmax.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
