"""AdamW with its parameter groups, its rate, and the gradient norm."""

from collections.abc import Iterable

import torch

from qloop.config import OptimizerConfig


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Builds AdamW over what is trained: matrices decay; norms, biases and embeddings do not.

    The rate is 0 until `set_learning_rate`.
    """
    decayed, spared = split_for_decay(model)
    return torch.optim.AdamW(
        [
            {"params": list(decayed.values()), "weight_decay": config.weight_decay},
            {"params": list(spared.values()), "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def split_for_decay(
    model: torch.nn.Module,
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    """Splits the trained parameters, by name, into those that decay and those that do not.

    Norms and biases are known by having fewer than two dimensions, embeddings by their module. A
    weight shared by an embedding and the output layer is an embedding.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed: dict[str, torch.nn.Parameter] = {}
    spared: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim < 2 or id(parameter) in embeddings
            (spared if is_spared else decayed)[name] = parameter
    return decayed, spared


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def measure_grad_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Gives the L2 norm over all gradients, changing none; NaN or inf if any value is.

    Squares are summed in fp64: summed in fp32 by a CPU, the norm of a large embedding's gradient
    is half a thousandth off, and by something else where it is cut over ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms)).float()
    return norm


def clip_gradients(
    parameters: Iterable[torch.nn.Parameter], max_grad_norm: float, grad_norm: torch.Tensor
) -> None:
    """Scales all gradients so that their norm, which was measured before, is at most the limit."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
