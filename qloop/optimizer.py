"""The optimizers: which one updates which weight, the state of each, and the gradient norm.

    optimizer         updates                                            state per parameter
    adamw             all trained parameters                             8 bytes
    adamw_8bit        matrices; embeddings and small tensors by adamw    2 bytes
    paged_adamw       all but small tensors, which adamw updates         8 bytes, may leave the GPU
    paged_adamw_8bit  matrices; embeddings by paged_adamw                2 bytes, may leave the GPU
    muon              matrices of the decoder layers; the rest by adamw  4 bytes

So a run may have two or three optimizers, each with its own parameters. One object, `Optimizers`,
holds them, and they share one learning rate. For a model pretrained with AdamW, Muon is reported to
be no better than AdamW (Liu et al. 2025, arXiv 2502.16982, on fine-tuning).
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qloop.config.keys import OptimizerConfig
from qloop.errors import ConfigError
from qloop.model.activations import find_layers

SMALL_8BIT = 4096
"""Tensors of fewer values keep 32-bit moments; the default of bitsandbytes."""
SMALL_PAGED = 100_000
"""Moments of fewer values are not paged; a constant in bitsandbytes."""
_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit moments
_PAGED_NAMES = {"exp_avg": "state1", "exp_avg_sq": "state2"}  # as bitsandbytes calls AdamW's

Parameters = dict[str, Parameter]


class Optimizers:
    """Several optimizers that update together, each its own parameters."""

    def __init__(self, each: Sequence[torch.optim.Optimizer]) -> None:
        """Takes torch's optimizers, or `Accelerator.prepare`'s wrappers."""
        self.each = tuple(each)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each parameter; the inner dicts are the optimizers' own."""
        return {p: state for optimizer in self.each for p, state in optimizer.state.items()}

    def step(self) -> None:
        """Updates every parameter once."""
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for optimizer in self.each:
            optimizer.zero_grad()

    def describe(self) -> str:
        """Describes what updates how much: `muon 12,288 parameters in 14 tensors, adamw ...`."""
        sizes: dict[str, list[int]] = {}
        for parameter, kind in self.kinds.items():
            sizes.setdefault(kind, []).append(parameter.numel())
        parts = (f"{k} {sum(n):,} parameters in {len(n)} tensors" for k, n in sizes.items())
        return ", ".join(parts)

    @functools.cached_property
    def kinds(self) -> dict[Tensor, str]:
        """The kind of optimizer that updates a parameter, as `split_by_optimizer` names it."""
        return {p: group["kind"] for group in self.param_groups for p in group["params"]}

    def read_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns the state of a parameter, by the names of `moments_of`."""
        optimizer, _, _ = self._places[parameter]
        kind, kept = self.kinds[parameter], optimizer.state.get(parameter, {})
        state = {}
        for name, blank in moments_of(kind, parameter.shape).items():
            # A parameter that has had no gradient yet has no state; all of it starts at 0.
            value = kept[_name_in(kind, name)] if kept else 0.0
            if not isinstance(value, Tensor):  # bitsandbytes counts its steps in Python
                value = torch.full_like(blank, value, device="cpu")
            state[name] = value
        return state

    def put_state(self, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        """Replaces the state of a parameter by tensors on its device, named as in `moments_of`."""
        kind = self.kinds[parameter]
        optimizer, group, place = self._places[parameter]
        if kind in ("adamw", "muon"):
            # The step count too: a fused AdamW keeps it on the parameter's device.
            optimizer.state[parameter] = tensors
            return
        # bitsandbytes allocates its constants and its paged memory itself.
        optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
        state = optimizer.state[parameter]
        for name, tensor in tensors.items():
            if name == "step":
                state[name] = int(tensor)
            else:
                state[_name_in(kind, name)].copy_(tensor)

    @functools.cached_property
    def _places(self) -> dict[Tensor, tuple[Any, int, int]]:
        """Each parameter's unwrapped optimizer, the number of its group and its place in it."""
        return {
            parameter: (getattr(optimizer, "optimizer", optimizer), number, place)
            for optimizer in self.each
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> Optimizers:
    """Builds the optimizers: matrices decay; norms, biases and embeddings do not.

    The rate is 0 until `set_learning_rate`. Muon's update is scaled to the root mean square of
    AdamW's, 0.2 of the rate (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one rate and
    one decay serve both.

    Raises:
        ConfigError: As `split_by_optimizer`.
    """
    decayed, _ = split_for_decay(model)
    each = []
    for kind, named in split_by_optimizer(model, config.optimizer).items():
        groups = []
        for decays, weight_decay in ((True, config.weight_decay), (False, 0.0)):
            params = [p for name, p in named.items() if (name in decayed) is decays]
            groups.append({"params": params, "weight_decay": weight_decay, "kind": kind})
        each.append(_build(kind, groups, config))
    return Optimizers(each)


def split_by_optimizer(model: torch.nn.Module, optimizer: str) -> dict[str, Parameters]:
    """Decides which optimizer updates which trained parameter.

    Embeddings always keep 32-bit moments: a row's gradients are rare and large, which 8 bits
    represent badly (Dettmers et al. 2022, arXiv 2110.02861, section 2.3).

    Returns:
        Parameters by kind of optimizer and by name; kinds without parameters are left out.

    Raises:
        ConfigError: Muon, for a model that does not say what its layers are.
    """
    decayed, spared = split_for_decay(model)
    hidden = {
        id(parameter)
        for layer in find_layers(model)
        for parameter in layer.parameters()
        if parameter.ndim == 2 and min(parameter.shape) > 1
    }
    if optimizer == "muon" and not hidden:
        raise ConfigError(
            f"optimizer: muon is for the matrices of decoder layers, and {type(model).__name__} "
            "does not say what its layers are; use adamw"
        )
    groups: dict[str, Parameters] = {}
    for name, parameter in {**decayed, **spared}.items():
        kind = "adamw"
        if optimizer == "muon" and name in decayed and id(parameter) in hidden:
            kind = "muon"
        elif optimizer.endswith("8bit") and name in decayed and parameter.numel() >= SMALL_8BIT:
            kind = optimizer
        elif optimizer.startswith("paged") and parameter.numel() >= SMALL_PAGED:
            kind = "paged_adamw"
        groups.setdefault(kind, {})[name] = parameter
    return groups


def split_for_decay(model: torch.nn.Module) -> tuple[Parameters, Parameters]:
    """Splits the trained parameters, by name, into those that decay and those that do not.

    Norms and biases are recognized by having fewer than two dimensions, embeddings by their module.
    A weight shared by an embedding and the output layer is an embedding.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = {n: p for n, p in trained.items() if p.ndim >= 2 and id(p) not in embeddings}
    return decayed, {name: p for name, p in trained.items() if name not in decayed}


def moments_of(kind: str, shape: Sequence[int]) -> dict[str, Tensor]:
    """Returns the state to save of a parameter, as tensors on `meta`.

    Paged and other memory hold the same. bitsandbytes' constants, `qmap1` and `qmap2` (the values
    of its 8-bit codes), are not saved.

    >>> {name: moment.nbytes for name, moment in moments_of("adamw_8bit", (64, 128)).items()}
    {'step': 4, 'state1': 8192, 'state2': 8192, 'absmax1': 128, 'absmax2': 128}
    """
    empty = functools.partial(torch.empty, dtype=torch.float32, device="meta")
    if kind == "muon":
        return {"momentum_buffer": empty(shape)}
    if kind.endswith("8bit"):
        states = {name: empty(shape, dtype=torch.uint8) for name in ("state1", "state2")}
        scales = {
            name: empty(math.ceil(math.prod(shape) / _BLOCK)) for name in ("absmax1", "absmax2")
        }
        return {"step": empty(()), **states, **scales}
    return {"step": empty(()), **{name: empty(shape) for name in _PAGED_NAMES}}


def count_state_bytes(model: torch.nn.Module, optimizer: str) -> int:
    """Counts the bytes of optimizer state for a model's trained parameters, over all ranks.

    The model may be on any device, `meta` too; `requires_grad` must be set as for training.

    Raises:
        ConfigError: As `split_by_optimizer`.
    """
    return sum(
        moment.nbytes
        for kind, named in split_by_optimizer(model, optimizer).items()
        for parameter in named.values()
        for moment in moments_of(kind, parameter.shape).values()
    )


def set_learning_rate(optimizer: Optimizers, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def measure_grad_norm(parameters: Iterable[Parameter]) -> Tensor:
    """Returns the L2 norm over all gradients, as a scalar; NaN or inf if any value is.

    A CPU sums squares in fp64: in fp32 the norm of a large embedding's gradient has an error of
    half a thousandth, and another error if ranks share it. A GPU's tree sum is exact enough in
    fp32; in fp64 it would first copy each gradient, to twice its size.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    types = [torch.float64 if g.device.type == "cpu" else torch.float32 for g in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=t) for g, t in zip(gradients, types, strict=True)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64).float()
    return norm


def clip_gradients(
    parameters: Iterable[Parameter], max_grad_norm: float, grad_norm: Tensor
) -> None:
    """Scales all gradients so that their norm, already measured, is at most the limit."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)


def _name_in(kind: str, moment: str) -> str:
    """Returns the optimizer's own name of a moment."""
    return _PAGED_NAMES.get(moment, moment) if kind == "paged_adamw" else moment


def _build(kind: str, groups: list[dict[str, Any]], config: OptimizerConfig) -> Any:
    if kind == "muon":
        return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
    betas = (config.adam_beta1, config.adam_beta2)
    keys: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": config.adam_epsilon}
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **keys)
    from bitsandbytes import optim

    build = optim.AdamW if kind == "paged_adamw" else optim.AdamW8bit
    return build(groups, min_8bit_size=SMALL_8BIT, is_paged=kind.startswith("paged"), **keys)
