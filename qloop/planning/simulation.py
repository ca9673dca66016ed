"""Runs a training step on tensors without memory, and adds up the memory it would take.

The code is that of training (attention, loss, recomputation, autocast), run on torch's fake
tensors, and every storage is recorded when it is created and freed. The largest sum is the peak;
its parts are the storages alive at that moment, by purpose. The fake tensors are on the CPU, since
torch has no others on a machine without a GPU; shapes and types are the same. For compiled layers,
the tensors kept for the backward pass are chosen as torch's compiler does, from the graph of both
passes.

Not included: the memory that kernels use internally, and an allocator's waste between tensors.
"""

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qloop.data.batches import MicroBatch
from qloop.model.activations import choose_policy, find_layers
from qloop.model.attention import DOCUMENTS
from qloop.model.loss import TargetLoss

PARTS = ("parameters", "gradients", "optimizer", "activations", "loss", "working")
"""working: short-lived tensors, such as a layer's recomputed activations."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records when storages are created and freed; they are numbered in the order of creation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        """The number of a storage and its bytes, negative when it is freed."""
        self.position = 0
        """The next storage's number."""
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: torch.Tensor) -> int:
        """Records a tensor's storage if it is new, and returns its number."""
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self._numbers:
            self._numbers[place] = self.position
            self.events.append((self.position, storage.nbytes()))
            weakref.finalize(storage, self._end, place, self.position, storage.nbytes())
            self.position += 1
        return self._numbers[place]

    def alive_since(self, position: int) -> set[int]:
        """Returns the storages that are alive and were created at `position` or later."""
        return {number for number in self._numbers.values() if number >= position}

    def _end(self, place: int, number: int, size: int) -> None:
        self.events.append((number, -size))
        del self._numbers[place]


def simulate_step(
    model: Any,
    loss_kind: str,
    device_type: str,
    batch_size: int,
    length: int,
    precision: str,
    accumulates: bool,
    compiled: str | None = None,
) -> dict[str, int]:
    """Runs the forward and backward pass of a micro-batch.

    Args:
        model: On the `meta` device, with its recomputation set; unusable afterwards.
        loss_kind: See `qloop.model.loss`.
        device_type: Decides the chunk size of the loss.
        batch_size: Blocks.
        length: Tokens in a block.
        precision: `bf16` or `fp32`.
        accumulates: Whether the gradients of an earlier micro-batch are held meanwhile.
        compiled: `off` or `selective` for layers that are compiled, and keep what the compiler
            chooses; None for layers that are not.

    Returns:
        Bytes at the peak, by PARTS, without the optimizer's state.
    """
    drop = _drop_by_bytes if device_type == "cuda" else F.dropout
    with FakeTensorMode(allow_non_fake_inputs=True), _dropping(drop):
        _give_fake_memory(model)
        if compiled:
            _keep_as_compiled(model, compiled)
        micro_batch = _build_fake_batch(model, batch_size, length)
        loss = TargetLoss(model, loss_kind, device_type)
        model.train()
        with Tape() as tape:
            parameters = {tape.note(tensor) for tensor in (*model.parameters(), *model.buffers())}
            if accumulates:  # the gradients of an earlier micro-batch exist already
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
            entered = _watch_head(model, tape)
            began = tape.position
            with torch.autocast(
                "cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
            ):
                value = loss.sum(model, micro_batch)
            kept = tape.alive_since(began)
            losses = set(range(entered[-1] if entered else tape.position, tape.position))
            torch.autograd.backward(value)
            gradients = {tape.note(p.grad) for p in model.parameters() if p.grad is not None}
            model.zero_grad()
    return _sum_at_peak(
        tape.events,
        {
            **dict.fromkeys(kept, "activations"),
            **dict.fromkeys(losses, "loss"),
            **dict.fromkeys(gradients, "gradients"),
            **dict.fromkeys(parameters, "parameters"),
        },
    )


@contextlib.contextmanager
def _dropping(drop: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Replaces torch's dropout until the block ends.

    By name, so that recomputation in the backward pass uses it, too.
    """
    functional: Any = F
    plain = functional.dropout
    functional.dropout = drop
    try:
        yield
    finally:
        functional.dropout = plain


def _drop_by_bytes(
    values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Keeps one byte per value, as on a GPU; a CPU keeps the factor it multiplied with."""
    return torch.native_dropout(values, p, True)[0] if training and p else values


def _drop_again(
    values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Keeps nothing: recomputation draws the same random numbers again."""
    return values * (1 - p) if training and p else values


def _keep_as_compiled(model: torch.nn.Module, mode: str) -> None:
    """Makes every layer keep the tensors it would keep compiled."""
    graphs: dict[Any, Callable[..., Any]] = {}
    for layer in find_layers(model):
        setattr(layer, "forward", _like_compiled(layer, graphs, mode))  # noqa: B010


def _like_compiled(
    layer: torch.nn.Module, graphs: dict[Any, Callable[..., Any]], mode: str
) -> Callable[..., Any]:
    """Returns a layer's forward made of the two graphs that `torch.compile` would build."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop

    plain = layer.forward

    def divide(graph: Any, *args: Any, **kwargs: Any) -> Any:
        if mode == "selective":
            _mark(graph)
        return min_cut_rematerialization_partition(graph, *args, **kwargs)

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weights = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        leaves, structure = tree_flatten((args, kwargs))
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        alike = tuple((name, w.shape, w.dtype, w.requires_grad) for name, w in weights.items())
        key = (alike, hidden.requires_grad, getattr(layer, "attention_type", None))

        def call(weights: Any, hidden: Any, tensors: Any) -> Any:
            for place, tensor in zip(places, tensors, strict=True):
                leaves[place] = tensor
            given, named = tree_unflatten(leaves, structure)
            setattr(layer, "forward", plain)  # noqa: B010
            try:
                with _dropping(_drop_again if mode == "selective" else F.dropout):
                    return torch.func.functional_call(layer, weights, (hidden, *given), named)
            finally:
                setattr(layer, "forward", forward)  # noqa: B010

        if key not in graphs:
            graphs[key] = aot_function(call, fw_compiler=nop, bw_compiler=nop, partition_fn=divide)
        return graphs[key](weights, hidden, [leaves[place] for place in places])

    return forward


def _mark(graph: Any) -> None:
    """Marks the nodes of a layer's forward graph as kept or recomputed, as `selective` does."""
    backward = set()
    for node in graph.graph.nodes:
        is_given = node.op == "placeholder" and "tangent" in node.name
        if is_given or any(each in backward for each in node.all_input_nodes):
            backward.add(node)
        elif node.op == "call_function":
            is_part = node.target is operator.getitem  # of several results
            maker = node.args[0] if is_part else node
            inputs = [getattr(each, "meta", {}).get("val") for each in maker.args]
            node.meta["recompute"] = choose_policy(maker.target, inputs)


def _sum_at_peak(events: list[tuple[int, int]], part_of: dict[int, str]) -> dict[str, int]:
    """Replays the events, and returns the sums by part at the largest total."""
    now = dict.fromkeys(PARTS, 0)
    total, largest, peak = 0, 0, dict(now)
    for number, size in events:
        now[part_of.get(number, "working")] += size
        total += size
        if total > largest:
            largest, peak = total, dict(now)
    return peak


def _give_fake_memory(model: torch.nn.Module) -> None:
    """Moves a model from `meta` to fake tensors; tied parameters stay tied."""
    given: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in given:
                    given[id(parameter)] = torch.nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype),
                        requires_grad=parameter.requires_grad,
                    )
                module._parameters[name] = given[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _build_fake_batch(model: Any, batch_size: int, length: int) -> MicroBatch:
    ids = torch.empty(batch_size, length, dtype=torch.int64)
    # Transformers' own attention finds documents by the values of positions, of which fake tensors
    # have none; without positions each row is one document.
    by_documents = model.config._attn_implementation == DOCUMENTS
    places: Any = torch.empty_like(ids) if by_documents else None
    micro_batch = MicroBatch(ids, torch.empty_like(ids), places)
    vars(micro_batch)["boundaries"] = torch.empty(9, dtype=torch.int32)
    return micro_batch


def _watch_head(model: Any, tape: Tape) -> list[int]:
    """Records the position on the tape at each call of the head."""
    entered: list[int] = []
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        head.register_forward_pre_hook(lambda *_: entered.append(tape.position))
    return entered
