"""The engine for a single process, DDP and FSDP2.

Under FSDP2 every parameter, gradient and moment is a DTensor, and each rank holds some of its rows.
The gradient norm is taken over all ranks. Saved tensors are gathered one at a time, and restored
ones are read by rows, so no rank ever holds more than one of them whole.
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
    """Backward pass, clipping, update and saved tensors of a prepared model."""

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Optimizers
    ) -> None:
        """Takes the results of `Accelerator.prepare`."""
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.unwrapped: Any = accelerator.unwrap_model(model)
        """The model without wrappers, under its own parameter names."""
        self.trained = {
            name: parameter
            for name, parameter in self.unwrapped.named_parameters()
            if parameter.requires_grad
        }

    def backward(self, loss_sum: torch.Tensor, divisor: int) -> None:
        """Adds the gradient of `loss_sum / divisor` to that of the step.

        Accelerate divides every loss by the number of accumulated micro-batches, and gradients are
        averaged over the ranks. This undoes both, so that the step's gradient is that of the sum
        over all micro-batches and ranks, divided once.

        `loss_sum` is that of a micro-batch; `divisor` counts the targets of the step on all ranks.
        """
        accelerator = self.accelerator
        averaged_over = accelerator.gradient_accumulation_steps * accelerator.num_processes
        self._backward(loss_sum * (averaged_over / divisor))

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def measure_grad_norm(self) -> torch.Tensor:
        """Returns the L2 norm of all gradients of all ranks; NaN or inf if any value is."""
        return _gather(measure_grad_norm(self.trained.values()))

    def clip_gradients(self, max_grad_norm: float, grad_norm: torch.Tensor) -> None:
        """Scales all gradients so that their norm, already measured, is at most the limit."""
        clip_gradients(self.trained.values(), max_grad_norm, grad_norm)

    def step(self, learning_rate: float) -> None:
        """Updates the weights and clears the gradients."""
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def collect_weights(self) -> tuple[str, dict[str, LazyTensor]]:
        """Returns the stem of the weights' files and the tensors to save."""
        stem, weights = collect_weights(self.unwrapped, self.unwrapped.state_dict())
        return stem, {name: _lazy(tensor) for name, tensor in weights.items()}

    def collect_moments(self) -> dict[str, LazyTensor]:
        """Returns the optimizer's tensors: `lm_head.weight/exp_avg` and so on."""
        return {
            f"{name}/{moment}": _lazy(tensor)
            for name, parameter in self.trained.items()
            for moment, tensor in self.optimizer.read_state(parameter).items()
        }

    def restore(self, weights: SavedTensors, moments: SavedTensors | None) -> None:
        """Loads saved moments, if given; the weights were loaded when the model was built.

        Raises:
            CheckpointError: Names, types or shapes are not those of this model; nothing was loaded.
        """
        if moments is None:
            return
        moments.refuse_misfits(self.moment_specs())
        for name, parameter in self.trained.items():
            saved = {m: _read(moments, f"{name}/{m}", parameter) for m in self._moments_of(name)}
            self.optimizer.put_state(parameter, saved)

    def moment_specs(self) -> dict[str, TensorSpec]:
        """Returns the type and unsharded shape of each of the optimizer's tensors."""
        return {
            f"{name}/{moment}": spec_of(blank)
            for name in self.trained
            for moment, blank in self._moments_of(name).items()
        }

    def _moments_of(self, name: str) -> dict[str, torch.Tensor]:
        parameter = self.trained[name]
        return moments_of(self.optimizer.kinds[parameter], parameter.shape)


def _lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(spec_of(tensor), functools.partial(_gather, tensor))


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _read(saved: SavedTensors, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """Reads a moment to its parameter's device; only this rank's rows if it is sharded."""
    if not isinstance(parameter, DTensor) or not saved.specs[key].shape:
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
