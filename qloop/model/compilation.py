"""Compiles the decoder layers: one graph for all of them, made once.

Only the layers: they are alike, so that one compilation serves all; what is around them (the
embedding, the loss) may look at a batch's layout. A layer sees the layout as a tensor whose length
is marked as one that changes, so that no later batch compiles anything.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qloop.config.keys import ModelConfig
from qloop.model.activations import find_layers

WORTHWHILE_MICRO_BATCHES = 200
"""From so many on, compiling by itself: it takes as long as some dozens do."""


def is_worthwhile(config: ModelConfig, device_type: str, micro_batches: int) -> bool:
    """Says whether a run is to compile its layers, if they can be.

    Args:
        config: Whether it is asked for, and what stands against it.
        device_type: Where it computes.
        micro_batches: Of the whole run, so that what goes on computes as what was stopped.
    """
    if config.compile != "auto":
        return bool(config.compile)
    # Offloading copies behind the graph.
    is_long = micro_batches >= WORTHWHILE_MICRO_BATCHES and not config.offload_activations
    return device_type == "cuda" and is_long


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Has every decoder layer compiled when it is first called; see `uncompile_layers`."""
    import torch._dynamo  # takes seconds, and runs that do not compile do without

    def let_length_change(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        boundaries = kwargs.get("cu_seq_lens_q")
        if boundaries is not None:
            torch._dynamo.mark_dynamic(boundaries, 0)

    for layer in find_layers(model):
        layer.compile(backend=backend)
    model.register_forward_pre_hook(let_length_change, with_kwargs=True)


def uncompile_layers(model: torch.nn.Module) -> None:
    """Lets layers run as they are written again."""
    for layer in find_layers(model):
        layer._compiled_call_impl = None


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Lets layers run as they are written for a while: for other shapes than a step's."""
    layers = find_layers(model)
    compiled = [layer._compiled_call_impl for layer in layers]
    uncompile_layers(model)
    try:
        yield
    finally:
        for layer, implementation in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = implementation


def count_compilations() -> int:
    """Counts the graphs that torch has compiled in this process."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
