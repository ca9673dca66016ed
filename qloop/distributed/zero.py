"""DeepSpeed's ZeRO, stages 1 to 3.

Accelerate lets DeepSpeed make its step inside `backward`, where nothing can be refused any more.
So its engine is called here directly: backward first, then the norm, and the step only when the
loop has found both finite. DeepSpeed clips inside its step, by the limit in its config.
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
    """Makes the steps of a DeepSpeed engine.

    Its optimizer works on flat partitions; tensors are found and put by parameter through
    deepspeed.utils, each of which is gathered over all ranks.
    """

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Optimizers
    ) -> None:
        """Takes what `Accelerator.prepare` gave back."""
        super().__init__(accelerator, model, optimizer)
        self._engine = accelerator.deepspeed_engine_wrapped.engine
        self._zero = self._engine.optimizer
        self._make_room_for_moments()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients; divides by the accumulation, and ranks are averaged."""
        self._engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self._engine.backward(loss)

    def measure_grad_norm(self) -> torch.Tensor:
        """Gives the L2 norm over all gradients of all ranks; inf if any value is not finite."""
        if hasattr(self._zero, "scaled_global_norm"):  # stages 1 and 2
            norm = self._zero.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        # A group whose norm is not finite is -1 there.
        return torch.where(norm >= 0, norm, torch.inf).to(self.accelerator.device)

    def clip_gradients(self, max_grad_norm: float, grad_norm: torch.Tensor) -> None:
        """Leaves it to the step, which clips by the same limit."""
        assert self._engine.gradient_clipping() == max_grad_norm

    def step(self, learning_rate: float) -> None:
        """Updates the weights, and clears the gradients."""
        set_learning_rate(self.optimizer, learning_rate)
        self._engine.step()
        assert self._engine.was_step_applied(), "the norm was found finite before"

    def collect_weights(self) -> tuple[str, dict[str, LazyTensor]]:
        """Gives what of the model is saved, with the stem of its files; always as fp32."""
        stem, sources = self._find_sources()
        return stem, {name: _piece(source) for name, source in sources.items()}

    def collect_moments(self) -> dict[str, LazyTensor]:
        """Gives the optimizer's tensors, each under its parameter's name and its own."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self._zero.optimizer.state[self._list_partitions()[0]]
        pieces = {}
        for name, parameter in self.trained.items():
            for moment, value in state.items():
                if moment == "step":
                    piece = _piece(torch.tensor(float(value)))
                else:
                    gather = functools.partial(safe_get_full_optimizer_state, parameter, moment)
                    piece = LazyTensor(TensorSpec("F32", _whole_shape(parameter)), gather)
                pieces[f"{name}/{moment}"] = piece
        return pieces

    def restore(self, weights: SavedTensors, moments: SavedTensors | None) -> None:
        """Puts saved tensors where they belong.

        Weights too: DeepSpeed makes its fp32 ones of what the model has, which is bf16 there.

        Args:
            weights: The model's, or the adapter's.
            moments: The optimizer's; None lets it start anew.

        Raises:
            CheckpointError: The names, types or shapes are not those of this model; nothing was
                put.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moments is not None:
            moments.refuse_misfits(self.moment_kinds())
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
        """Finds the parameter, or the buffer, behind each tensor that is saved."""
        # Of a sharded parameter there is no tensor to rename; one without values stands for it.
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
                f"DeepSpeed: {unknown[0]} is made of parts of this model's weights, which ZeRO "
                "cannot save; launch with launch/fsdp2.yaml"
            )
        return stem, {name: behind.get(id(weight), weight) for name, weight in weights.items()}

    def _list_partitions(self) -> list[torch.Tensor]:
        """Lists this rank's flat fp32 partitions, to which DeepSpeed's inner AdamW belongs."""
        stage_3 = getattr(self._zero, "fp32_partitioned_groups_flat", None)
        return list(stage_3 or self._zero.single_partition_of_fp32_groups)

    def _make_room_for_moments(self) -> None:
        """Gives AdamW's state to every partition, as its first step would.

        DeepSpeed itself finds the moments of the first group of parameters only: it looks for all
        of them when the first group has made its first step.
        """
        for flat in self._list_partitions():
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            self._zero._lazy_init_hp_params_optimizer_state()


def _piece(source: torch.Tensor) -> LazyTensor:
    from deepspeed.utils import safe_get_full_fp32_param

    if isinstance(source, torch.nn.Parameter):
        kind = TensorSpec("F32", _whole_shape(source))
        return LazyTensor(kind, functools.partial(safe_get_full_fp32_param, source))
    return LazyTensor(spec_of(source), lambda: source)


def _whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
