"""Compiles the decoder layers before step 1: one graph for all of them.

Only the layers: they are alike, so one compilation serves all; the code around them (embedding,
loss) may depend on a batch's layout. A layer receives the layout as a tensor whose length is marked
as dynamic, so no later batch compiles anything. The warm-up runs on the run's own first
micro-batch: the first step takes as long as any other, and a failure to compile shows before it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qloop.errors import ConfigError
from qloop.model.activations import find_layers

WORTHWHILE_MICRO_BATCHES = 200
"""`auto` compiles runs of at least this many micro-batches; compiling costs about as much as a few
dozen."""


def choose(
    wanted: str | bool,
    model: torch.nn.Module,
    *,
    device_type: str,
    engine: str,
    offloads: bool,
    micro_batches: int,
) -> bool:
    """Chooses whether a run compiles its layers; the model may be without values.

    `micro_batches` are those of the whole run on each process, so that a resumed run computes as
    before. Offloading copies outside the graph, so `auto` does not combine the two.

    Raises:
        ConfigError: The config asks for it, and it is impossible.
    """
    reason = None
    if engine in ("zero2", "zero3"):
        reason = "DeepSpeed changes the layers while they run"
    elif not find_layers(model):
        reason = f"{type(model).__name__} does not mark its layers"
    if wanted is True and reason:
        raise ConfigError(f"compile: {reason}; use auto or false")
    if wanted != "auto":
        return bool(wanted) and reason is None
    is_long = micro_batches >= WORTHWHILE_MICRO_BATCHES
    return reason is None and device_type == "cuda" and is_long and not offloads


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Marks every decoder layer to be compiled at its first call; see `uncompile_layers`."""
    import torch._dynamo  # takes seconds, which runs that do not compile save

    def mark_length_dynamic(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        boundaries = kwargs.get("cu_seq_lens_q")
        if boundaries is not None:
            torch._dynamo.mark_dynamic(boundaries, 0)

    for layer in find_layers(model):
        layer.compile(backend=backend)
    model.register_forward_pre_hook(mark_length_dynamic, with_kwargs=True)


def warm_up(model: torch.nn.Module, forward_backward: Callable[[], None]) -> str:
    """Compiles the layers of an unwrapped model by one forward and backward pass.

    Returns the number of graphs and the time as text. The caller drops the gradients.

    Raises:
        ConfigError: The layers cannot be compiled.
    """
    started, before = time.perf_counter(), count_compilations()
    compile_layers(model)
    try:
        forward_backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: no compiler, no Triton, a layer's own code
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"compile: the layers cannot be compiled: {reason}") from error
    made = count_compilations() - before
    return f"layers, {made} graphs in {time.perf_counter() - started:.0f} s"


def uncompile_layers(model: torch.nn.Module) -> None:
    """Makes the layers run uncompiled again."""
    for layer in find_layers(model):
        layer._compiled_call_impl = None


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Runs the layers uncompiled until the block ends: for shapes other than a step's."""
    compiled = {layer: layer._compiled_call_impl for layer in find_layers(model)}
    uncompile_layers(model)
    try:
        yield
    finally:
        for layer, implementation in compiled.items():
            layer._compiled_call_impl = implementation


def count_compilations() -> int:
    """Returns the number of graphs that torch has compiled in this process."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
