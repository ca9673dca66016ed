"""The optimizers: which one updates which weight, what each keeps, and the gradient norm.

    adamw             all that is trained                                8 bytes a parameter
    adamw_8bit        matrices; embeddings and small tensors by adamw    2
    paged_adamw       all but small tensors                              8, which may leave the GPU
    paged_adamw_8bit  matrices; embeddings by paged_adamw                2, which may leave the GPU
    muon              matrices of the decoder layers; the rest by adamw  4

So a run may have two or three optimizers, each with its own parameters; they stand behind one
object, `Optimizers`, and follow one learning rate. Of a model that was pretrained with AdamW, Muon
is reported to make no better one than AdamW would (Liu et al. 2025, arXiv 2502.16982, where they
finetune).
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from qloop.config.keys import OptimizerConfig
from qloop.errors import ConfigError
from qloop.model.activations import find_layers

SMALL_8BIT = 4096
"""Values from which on bitsandbytes keeps 8-bit moments; smaller tensors are worth no precision."""
SMALL_PAGED = 100_000
"""Values from which on bitsandbytes puts moments into memory that the GPU may give back."""
_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit moments
_SCALES = ("absmax1", "absmax2")
_PAGED_NAMES = {"exp_avg": "state1", "exp_avg_sq": "state2"}  # as bitsandbytes calls AdamW's

Groups = dict[str, dict[str, torch.nn.Parameter]]


class Optimizers:
    """Several optimizers, each with its own parameters, that make a step together."""

    def __init__(self, each: Sequence[torch.optim.Optimizer]) -> None:
        """Takes them as they are, or as `Accelerator.prepare` gave them back."""
        self.each = tuple(each)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """What they keep of each parameter; the inner dicts are their own."""
        return {p: state for optimizer in self.each for p, state in optimizer.state.items()}

    def step(self) -> None:
        """Updates every parameter once."""
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drops all gradients, and their memory."""
        for optimizer in self.each:
            optimizer.zero_grad()

    def describe(self) -> str:
        """Says what updates how much: `muon 12,288 parameters in 14 tensors, adamw ...`."""
        sizes: dict[str, list[int]] = {}
        for parameter, kind in self.kinds.items():
            sizes.setdefault(kind, []).append(parameter.numel())
        return ", ".join(
            f"{kind} {sum(each):,} parameters in {len(each)} tensors"
            for kind, each in sizes.items()
        )

    @functools.cached_property
    def kinds(self) -> dict[torch.Tensor, str]:
        """Which kind of optimizer updates a parameter, as `split_by_optimizer` names them."""
        return {p: group["kind"] for group in self.param_groups for p in group["params"]}

    def read_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives what is kept of a parameter, as `moments_of` names it."""
        optimizer, _, _ = self._places[parameter]
        kind, kept = self.kinds[parameter], optimizer.state.get(parameter, {})
        state = {}
        for name, blank in moments_of(kind, parameter.shape).items():
            # Nothing is kept of a parameter that has had no gradient yet: all of it starts at 0.
            value = kept[_name_in(kind, name)] if kept else 0.0
            if not isinstance(value, torch.Tensor):  # bitsandbytes counts its steps in Python
                value = torch.full_like(blank, value, device="cpu")
            state[name] = value
        return state

    def put_state(self, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces what is kept of a parameter.

        Args:
            parameter: Of one of the optimizers.
            tensors: As `moments_of` names them, where the parameter is.
        """
        optimizer, group, place = self._places[parameter]
        kind = self.kinds[parameter]
        if kind in ("adamw", "muon"):
            # A step count stays where AdamW keeps it: fused, it is beside its parameter.
            optimizer.state[parameter] = tensors
            return
        # bitsandbytes makes its constants and its paged memory itself.
        optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
        state = optimizer.state[parameter]
        for name, tensor in tensors.items():
            if name == "step":
                state[name] = int(tensor)
            else:
                state[_name_in(kind, name)].copy_(tensor)

    @functools.cached_property
    def _places(self) -> dict[torch.Tensor, tuple[Any, int, int]]:
        """Gives each parameter's optimizer without a wrapper, its group and its place there."""
        return {
            parameter: (getattr(optimizer, "optimizer", optimizer), number, place)
            for optimizer in self.each
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> Optimizers:
    """Builds what updates the trained parameters: matrices decay; norms, biases, embeddings do not.

    The rate is 0 until `set_learning_rate`. Muon's update is scaled so that its root mean square is
    that of AdamW's, 0.2 of the rate (Liu et al. 2025, arXiv 2502.16982, section 2.2): one rate and
    one decay serve both.

    Raises:
        ConfigError: Muon, for a model that does not say what its layers are.
    """
    decayed, _ = split_for_decay(model)
    each = []
    for kind, parameters in split_by_optimizer(model, config.optimizer).items():
        groups = [
            {
                "params": [p for name, p in parameters.items() if (name in decayed) is decays],
                "weight_decay": config.weight_decay if decays else 0.0,
                "kind": kind,
            }
            for decays in (True, False)
        ]
        each.append(_build(kind, groups, config))
    return Optimizers(each)


def split_by_optimizer(model: torch.nn.Module, optimizer: str) -> Groups:
    """Says which optimizer updates which trained parameter; in 8 bits embeddings keep 32.

    Embeddings: the gradient of a row comes seldom and large, which 8 bits hold badly (Dettmers et
    al. 2022, arXiv 2110.02861, section 2.3).

    Returns:
        Parameters by kind of optimizer and by name; kinds without any are left out.

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
    groups: Groups = {}
    for name, parameter in {**decayed, **spared}.items():
        kind = "adamw"
        if optimizer == "muon":
            kind = "muon" if name in decayed and id(parameter) in hidden else "adamw"
        elif optimizer.endswith("8bit") and name in decayed and parameter.numel() >= SMALL_8BIT:
            kind = optimizer
        elif optimizer.startswith("paged") and parameter.numel() >= SMALL_PAGED:
            kind = "paged_adamw"
        groups.setdefault(kind, {})[name] = parameter
    return groups


def moments_of(kind: str, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """Gives what is saved of a parameter of a kind of optimizer, as tensors without values.

    Memory that is paged holds what other memory would. Constants that bitsandbytes makes again are
    not saved: the values of its 8 bits, `qmap1` and `qmap2`.

    >>> {name: moment.nbytes for name, moment in moments_of("adamw_8bit", (64, 128)).items()}
    {'step': 4, 'state1': 8192, 'state2': 8192, 'absmax1': 128, 'absmax2': 128}
    """

    def without_values(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    if kind == "muon":
        return {"momentum_buffer": without_values(shape)}
    step = {"step": without_values(())}
    if kind.endswith("8bit"):
        scales = (math.ceil(math.prod(shape) / _BLOCK),)
        states = {name: without_values(shape, torch.uint8) for name in ("state1", "state2")}
        return {**step, **states, **{name: without_values(scales) for name in _SCALES}}
    return {**step, **{name: without_values(shape) for name in _PAGED_NAMES}}


def count_state_bytes(model: torch.nn.Module, optimizer: str) -> int:
    """Counts what an optimizer keeps of a model's trained parameters, over all ranks.

    Args:
        model: With `requires_grad` as it will be trained; it needs no values (device "meta").
        optimizer: As in the config.

    Raises:
        ConfigError: Muon, for a model that does not say what its layers are.
    """
    return sum(
        moment.nbytes
        for kind, parameters in split_by_optimizer(model, optimizer).items()
        for parameter in parameters.values()
        for moment in moments_of(kind, parameter.shape).values()
    )


def _name_in(kind: str, moment: str) -> str:
    """Names a moment as its optimizer does."""
    return _PAGED_NAMES.get(moment, moment) if kind == "paged_adamw" else moment


def _build(kind: str, groups: list[dict[str, Any]], config: OptimizerConfig) -> Any:
    if kind == "muon":
        return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
    keys: dict[str, Any] = {
        "lr": 0.0,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **keys)
    from bitsandbytes import optim

    build = optim.AdamW if kind == "paged_adamw" else optim.AdamW8bit
    return build(groups, min_8bit_size=SMALL_8BIT, is_paged=kind.startswith("paged"), **keys)


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


def set_learning_rate(optimizer: Optimizers, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def measure_grad_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Gives the L2 norm over all gradients, changing none; NaN or inf if any value is.

    A CPU sums squares in fp64: in fp32 the norm of a large embedding's gradient is half a
    thousandth off, and by something else where it is cut over ranks. A GPU adds by a tree, which is
    exact enough in fp32; in fp64 it would first copy each gradient, to twice its size.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [
        torch.linalg.vector_norm(
            gradient, dtype=torch.float64 if gradient.device.type == "cpu" else torch.float32
        )
        for gradient in gradients
    ]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64).float()
    return norm


def clip_gradients(
    parameters: Iterable[torch.nn.Parameter], max_grad_norm: float, grad_norm: torch.Tensor
) -> None:
    """Scales all gradients so that their norm, which was measured before, is at most the limit."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
