"""One process, DDP and FSDP2: the engines whose step torch makes itself.

Under FSDP2 every parameter, gradient and moment is a DTensor, of which a rank holds some rows. The
norm is taken over all of them; a tensor that is saved is gathered in its turn, and one that is
restored is read row by row, so that no rank ever holds more than one of them whole.
"""

import functools
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qloop.model.state import collect_weights
from qloop.optimizer import (
    Optimizers,
    clip_gradients,
    measure_grad_norm,
    moments_of,
    set_learning_rate,
)
from qloop.storage.tensors import LazyTensor, SavedTensors, TensorSpec, spec_of


class Engine:
    """Makes the steps of a prepared model and optimizer, and knows where their tensors are."""

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Optimizers
    ) -> None:
        """Takes what `Accelerator.prepare` gave back."""
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.unwrapped: Any = accelerator.unwrap_model(model)
        """The model without a wrapper, under its own names."""
        self.trained = {
            name: parameter
            for name, parameter in self.unwrapped.named_parameters()
            if parameter.requires_grad
        }

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients; divides by the accumulation, and ranks are averaged."""
        self.accelerator.backward(loss)

    def measure_grad_norm(self) -> torch.Tensor:
        """Gives the L2 norm over all gradients of all ranks; NaN or inf if any value is."""
        return _gather(measure_grad_norm(self.trained.values()))

    def clip_gradients(self, max_grad_norm: float, grad_norm: torch.Tensor) -> None:
        """Scales all gradients so that their norm, measured before, is at most the limit."""
        clip_gradients(self.trained.values(), max_grad_norm, grad_norm)

    def step(self, learning_rate: float) -> None:
        """Updates the weights, and clears the gradients."""
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def collect_weights(self) -> tuple[str, dict[str, LazyTensor]]:
        """Gives what of the model is saved, with the stem of its files."""
        stem, weights = collect_weights(self.unwrapped, self.unwrapped.state_dict())
        return stem, {name: _piece(tensor) for name, tensor in weights.items()}

    def collect_moments(self) -> dict[str, LazyTensor]:
        """Gives the optimizer's tensors, each under its parameter's name and its own."""
        return {
            f"{name}/{moment}": _piece(tensor)
            for name, parameter in self.trained.items()
            for moment, tensor in self.optimizer.read_state(parameter).items()
        }

    def restore(self, weights: SavedTensors, moments: SavedTensors | None) -> None:
        """Puts saved tensors where they belong; the weights are there since the model was built.

        Args:
            weights: The model's, or the adapter's.
            moments: The optimizer's; None lets it start anew.

        Raises:
            CheckpointError: The names, types or shapes are not those of this model; nothing was
                put.
        """
        if moments is None:
            return
        moments.refuse_misfits(self.moment_kinds())
        for name, parameter in self.trained.items():
            saved = {m: _read(moments, f"{name}/{m}", parameter) for m in self._moments_of(name)}
            self.optimizer.put_state(parameter, saved)

    def moment_kinds(self) -> dict[str, TensorSpec]:
        """Gives type and whole shape of each of the optimizer's tensors."""
        return {
            f"{name}/{moment}": spec_of(blank)
            for name in self.trained
            for moment, blank in self._moments_of(name).items()
        }

    def _moments_of(self, name: str) -> dict[str, torch.Tensor]:
        parameter = self.trained[name]
        return moments_of(self.optimizer.kinds[parameter], parameter.shape)


def _piece(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(spec_of(tensor), functools.partial(_gather, tensor))


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _read(saved: SavedTensors, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """Reads a moment to where its parameter is; of a sharded one, this rank's rows only."""
    if not isinstance(parameter, DTensor) or not saved.kinds[key].shape:
        return saved.read(key).to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    rows = saved.read(key, slice(offset[0], offset[0] + shape[0]))
    return DTensor.from_local(
        rows.to(parameter.device),
        mesh,
        placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
