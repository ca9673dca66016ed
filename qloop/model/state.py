"""What of a model goes into a checkpoint, so that the libraries load the folder as it is."""

import contextlib
import copy
import io
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
    """Gives the files' stem and the tensors of what is trained, under the names loading expects.

    They are the model's own tensors, not copies, except where a library has to join or split some.

    Args:
        model: Unwrapped, with or without adapters.
        state: Its state where its own is not whole: stand-ins for shards.
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
    """Gives everything beside the tensors: configs, tokenizer, a model's own code, by file name.

    None of it changes while a run goes on.
    """
    files = collect_model_files(model)
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name, save_jinja_files=False)
        return files | _read_folder(Path(name))


def collect_model_files(model: Any) -> dict[str, bytes]:
    """Gives a model's configs and its own code, by file name."""
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


def _read_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
