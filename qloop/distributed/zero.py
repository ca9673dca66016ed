"""The engine for DeepSpeed's ZeRO, stages 1 to 3.

Through accelerate, DeepSpeed updates the weights inside `backward`, where a bad step can no longer
be refused. So this module calls DeepSpeed's engine directly: backward, then the norm, and the
update only if the loop finds loss and norm finite. The update clips, by the limit in DeepSpeed's
config.
"""

import functools

import torch
from accelerate import Accelerator

from qloop.distributed.engine import Engine
from qloop.errors import ConfigError
from qloop.model.state import collect_weights
from qloop.optimizer import Optimizers, moments_of, set_learning_rate
from qloop.storage.tensors import LazyTensor, SavedTensors, TensorSpec, spec_of


class ZeroEngine(Engine):
    """Backward pass and update by a DeepSpeed engine.

    Its optimizer works on flat partitions. Tensors are read and written by parameter through
    deepspeed.utils, which gathers each over all ranks.
    """

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Optimizers
    ) -> None:
        super().__init__(accelerator, model, optimizer)
        self._engine = accelerator.deepspeed_engine_wrapped.engine
        self._zero = self._engine.optimizer
        self._make_room_for_moments()

    def _backward(self, loss: torch.Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self._engine.backward(loss)

    def measure_grad_norm(self) -> torch.Tensor:
        """Returns the L2 norm of all gradients of all ranks; inf if any value is not finite."""
        if hasattr(self._zero, "scaled_global_norm"):  # stages 1 and 2
            norm = self._zero.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        # DeepSpeed reports -1 for a group whose norm is not finite.
        return torch.where(norm >= 0, norm, torch.inf).to(self.accelerator.device)

    def clip_gradients(self, max_grad_norm: float, grad_norm: torch.Tensor) -> None:
        assert self._engine.gradient_clipping() == max_grad_norm  # its step clips by this limit

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)
        self._engine.step()
        assert self._engine.was_step_applied(), "the norm was found finite before"

    def collect_weights(self) -> tuple[str, dict[str, LazyTensor]]:
        stem, sources = self._find_sources()
        return stem, {name: _lazy(source) for name, source in sources.items()}

    def collect_moments(self) -> dict[str, LazyTensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self._zero.optimizer.state[self._list_partitions()[0]]
        tensors = {}
        for name, parameter in self.trained.items():
            for moment, value in state.items():
                if moment == "step":
                    moment_tensor = _lazy(torch.tensor(float(value)))
                else:
                    gather = functools.partial(safe_get_full_optimizer_state, parameter, moment)
                    moment_tensor = LazyTensor(TensorSpec("F32", _whole_shape(parameter)), gather)
                tensors[f"{name}/{moment}"] = moment_tensor
        return tensors

    def restore(self, weights: SavedTensors, moments: SavedTensors | None) -> None:
        """Loads saved weights, and moments if given.

        The model's own weights do not suffice: they are bf16 when DeepSpeed copies them to fp32.

        Raises:
            CheckpointError: Names, types or shapes are not those of this model; nothing was loaded.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moments is not None:
            moments.refuse_misfits(self.moment_specs())
        for name, source in self._find_sources()[1].items():
            if isinstance(source, torch.nn.Parameter):
                safe_set_full_fp32_param(source, weights.read(name).to(self.accelerator.device))
        if moments is None:
            return
        for name, parameter in self.trained.items():
            for moment in self._moments_of(name):
                saved = moments.read(f"{name}/{moment}")
                if moment == "step":
                    for flat in self._list_partitions():
                        self._zero.optimizer.state[flat]["step"] = saved.clone()
                else:
                    safe_set_full_optimizer_state(
                        parameter, saved.to(self.accelerator.device), moment
                    )

    def _moments_of(self, name: str) -> dict[str, torch.Tensor]:
        return moments_of("adamw", _whole_shape(self.trained[name]))

    def _find_sources(self) -> tuple[str, dict[str, torch.Tensor]]:
        """Returns the stem and, by name, the parameter or buffer of each tensor to save."""
        # A sharded parameter has no whole tensor to rename, so an empty one stands in for it.
        parameters = dict(self.unwrapped.named_parameters(remove_duplicate=False))
        by_parameter = {
            id(parameter): torch.empty(_whole_shape(parameter), device="meta")
            for parameter in parameters.values()
        }
        stand_ins = {name: by_parameter[id(parameter)] for name, parameter in parameters.items()}
        buffers = {
            name: b for name, b in self.unwrapped.state_dict().items() if name not in stand_ins
        }
        stem, weights = collect_weights(self.unwrapped, {**stand_ins, **buffers})
        behind = {id(stand_ins[name]): parameter for name, parameter in parameters.items()}
        unknown = [name for name, w in weights.items() if w.is_meta and id(w) not in behind]
        if unknown:
            raise ConfigError(
                f"DeepSpeed: {unknown[0]} is built from parts of this model's weights, which ZeRO "
                "cannot save; launch with launch/fsdp2.yaml"
            )
        return stem, {name: behind.get(id(weight), weight) for name, weight in weights.items()}

    def _list_partitions(self) -> list[torch.Tensor]:
        """Lists this rank's flat fp32 partitions, which DeepSpeed's inner AdamW updates."""
        stage_3 = getattr(self._zero, "fp32_partitioned_groups_flat", None)
        return list(stage_3 or self._zero.single_partition_of_fp32_groups)

    def _make_room_for_moments(self) -> None:
        """Creates AdamW's state for every partition, as its first step would.

        By itself, DeepSpeed would find only the moments of the first parameter group: it looks for
        all of them after that group's first step.
        """
        for flat in self._list_partitions():
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            self._zero._lazy_init_hp_params_optimizer_state()


def _lazy(source: torch.Tensor) -> LazyTensor:
    from deepspeed.utils import safe_get_full_fp32_param

    if isinstance(source, torch.nn.Parameter):
        kind = TensorSpec("F32", _whole_shape(source))
        return LazyTensor(kind, functools.partial(safe_get_full_fp32_param, source))
    return LazyTensor(spec_of(source), lambda: source)


def _whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
