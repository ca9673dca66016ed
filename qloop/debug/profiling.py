"""Where a step's time goes: `qloop profile` makes some steps of a real run, and nothing else of it.

The run is put together as `qloop train` does it, in a folder of its own that is deleted at the end;
the loop is the loop of qloop.train, unchanged. What is watched is put around the parts that it
calls. Each call begins a phase, which ends where the next begins, so that the phases of a step sum
to its time:

    fetch | forward | head, loss | backward | other | ... | norm, clip | update | other

Steps are made twice over: first with a clock alone, since torch's profiler slows down what it
watches, then under the profiler, for the operators and the trace. In one more, each place is found
where Python reads a tensor's value: if the value is on a GPU, that waits for all work before it.
"""

import bisect
import contextlib
import dataclasses
import os
import shutil
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from qloop.config.keys import Config
from qloop.distributed.stops import Request, StopRequest
from qloop.errors import ConfigError, explaining_disk_errors
from qloop.model.compilation import uncompiled
from qloop.report.metrics import StepRecord
from qloop.report.reporter import Reporter
from qloop.run import Assembly, assemble
from qloop.train import run_steps

WARM_UP_STEPS = 3
"""Not counted: first calls choose kernels, fill caches and compile."""

PHASES = ("fetch", "forward", "head, loss", "backward", "norm, clip", "update", "other")
_RANGE = "qloop: "
_NUM_OPERATORS = 10
_ENDLESS = 10**9

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile(
    config: Config, notes: list[str], steps: int, trace: Path, say: Callable[[str], None]
) -> None:
    """Makes steps of the run that a config describes, and says where their time went.

    Args:
        config: The run's; its own folder is not touched.
        notes: Lines that the person should see at the start.
        steps: To time, and as many again under the profiler.
        trace: Chrome trace of the latter, to be written.
        say: Prints.

    Raises:
        QloopError: Something that the config names cannot be used, or `trace` cannot be written.
    """
    refuse_trace(trace)
    is_main = os.environ.get("RANK", "0") == "0"
    # All ranks of a machine have one parent, the launcher.
    owner = os.getppid() if "RANK" in os.environ else os.getpid()
    scratch = config.run.output_dir / f".profile-{owner}"
    try:
        about = "profile    some steps of the run, in a folder that is deleted behind them"
        parts = assemble(_move(config, scratch), [*notes, about])
        try:
            watch = _Watch(parts, steps)
            watch.make_steps()
        finally:
            parts.close()
    finally:
        if is_main:
            shutil.rmtree(scratch, ignore_errors=True)
    if is_main:
        say("\n".join(["", *watch.describe()]))
        with explaining_disk_errors(trace):
            watch.profiler.export_chrome_trace(str(trace))
        size = trace.stat().st_size / 1e6
        say(f"trace      {trace} ({size:.1f} MB): open it in https://ui.perfetto.dev, or in Chrome")
        say("           at chrome://tracing")


def refuse_trace(trace: Path) -> None:
    """Refuses a file that the trace cannot become, before anything is done.

    Raises:
        ConfigError: It exists, or its folder does not, or its name says that it is something else.
    """
    if not trace.name.endswith(".json.gz"):
        raise ConfigError(f"--trace: must end in .json.gz, got {trace}")
    if trace.exists():
        raise ConfigError(f"{trace}: is there already; delete it, or give another --trace")
    if not trace.parent.is_dir():
        raise ConfigError(f"{trace.parent}: no such folder; make it, or give another --trace")


def _move(config: Config, scratch: Path) -> Config:
    """Gives the same run in another folder, without saves, evaluations and trackers."""
    changes: dict[str, dict[str, Any]] = {
        "run": {"output_dir": scratch, "experiment_name": "run"},
        "data": {"cache_dir": config.data.cache_dir or config.run.output_dir / ".cache"},
        "evaluate": {"eval_steps": 0},
        "checkpoint": {"save_steps": _ENDLESS, "keep_every": 0},
        "report": {"wandb": False, "tensorboard": False},
    }
    if config.run.resume in ("never", "restart"):
        changes["run"]["resume"] = "auto"  # in an empty folder all three are the same
    sections = {
        name: getattr(config, name).model_copy(update=update) for name, update in changes.items()
    }
    return config.model_copy(update=sections)


class _PhaseClock:
    """Measures contiguous phases; names them to the profiler too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = 0.0
        self._range: Any = None
        self.phase = "other"
        self.waits = True
        """Whether a phase ends only when the GPU has done what it asked for."""
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """Ends a phase and begins another."""
        if self.waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = record_function(_RANGE + phase)
        self._range.__enter__()

    def restart(self) -> None:
        """Begins to count from here."""
        self.enter(self.phase)
        self.seconds.clear()


class _ReadPlaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts where Python reads values: item(), float(), tolist(), a copy to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_copy = name in ("_to_copy", "copy_") and result.device.type == "cpu"
        if name == "_local_scalar_dense" or (is_copy and any(map(_is_on_device, args))):
            self.counts[_find_caller()] += 1
        return result


def _is_on_device(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.device.type != "cpu"


def _find_caller() -> str:
    """Names the innermost line that is neither torch's nor of this file."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if "torch" not in file.parts and file != Path(__file__):
            return f"{file.parent.name}/{file.name}:{frame.lineno} in {frame.name}"
    return "torch"


class _Enough(Exception):  # noqa: N818
    """Leaves the loop: all steps are made."""


class _Watch(Reporter):
    """Takes the place of a run's reports: hears of every step, writes nothing."""

    def __init__(self, parts: Assembly, steps: int) -> None:
        super().__init__(parts.run, parts.config, 0, 0, is_main=False)
        self._steps = steps
        self._made = 0
        self._parts = parts
        self._clock = _PhaseClock(parts.accelerator.device)
        self._places: Any = _ReadPlaces()
        self._reading = contextlib.ExitStack()
        self.records: list[StepRecord] = []
        self.seconds: dict[str, float] = {}
        activities = [ProfilerActivity.CPU]
        if parts.accelerator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
        )

    def make_steps(self) -> None:
        """Runs the loop until there are enough."""
        _mark_phases(self._parts, self._clock)
        parts = dataclasses.replace(self._parts, report=self, held_out=None, last_step=_ENDLESS)
        try:
            run_steps(parts, _Unstoppable(self._clock))
        except _Enough:
            return
        raise AssertionError("the loop came to an end that it has not")

    def write_step(self, record: StepRecord) -> None:
        """Notes a step, and passes on from warming up to timing, and to the profiler."""
        self._made += 1
        timed = self._made - WARM_UP_STEPS
        if 0 < timed <= self._steps:
            self.records.append(record)
        if timed == 0:
            self._clock.restart()
        elif timed == self._steps:
            self._clock.enter("other")
            self.seconds = dict(self._clock.seconds)
            self._clock.waits = False
            self.profiler.start()
        elif timed == 2 * self._steps + 1:  # one more, in which the profiler warms up
            self.profiler.stop()
            self._reading.enter_context(uncompiled(self._parts.engine.unwrapped))
            self._reading.enter_context(self._places)
        elif timed == 2 * self._steps + 2:
            self._reading.close()
            raise _Enough
        elif timed > self._steps:
            self.profiler.step()

    def describe(self) -> list[str]:
        """Gives the lines that say where the time went."""
        return [
            *_describe_steps(self.records, self.seconds),
            *_describe_phases(self.seconds, self._steps, self._parts.accelerator.device),
            *_describe_operators(self.profiler, self._parts.accelerator.device),
            *_describe_reads(self._places.counts),
            *_describe_waits(self.profiler, self._steps),
            "",
        ]


class _Unstoppable(StopRequest):
    """Asks for no stop, and tells the clock that the next step begins."""

    def __init__(self, clock: _PhaseClock) -> None:
        super().__init__()
        self._clock = clock

    def agreed(self, accelerator: Any) -> Request | None:
        request = super().agreed(accelerator)
        self._clock.enter("fetch")
        return request


def _mark_phases(parts: Assembly, clock: _PhaseClock) -> None:
    """Has the parts that the loop calls tell the clock."""

    def mark(name: str, phase: str, then: str) -> None:
        call = getattr(parts.engine, name)

        def marked(*arguments: Any) -> Any:
            clock.enter(phase)
            result = call(*arguments)
            clock.enter(then)
            return result

        setattr(parts.engine, name, marked)

    mark("backward", "backward", then="other")
    mark("measure_grad_norm", "norm, clip", then="norm, clip")
    mark("clip_gradients", "norm, clip", then="other")
    mark("step", "update", then="other")

    def entering(phase: str) -> Any:
        return lambda *_: clock.enter(phase)

    parts.model.register_forward_pre_hook(entering("forward"))
    # The head gives the loss itself, unless all logits are kept.
    head = parts.engine.unwrapped.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        head.register_forward_pre_hook(entering("head, loss"))
    else:
        parts.model.register_forward_hook(entering("head, loss"))


def _describe_steps(records: list[StepRecord], seconds: dict[str, float]) -> list[str]:
    total = sum(seconds.values())
    targets = sum(record.target_tokens for record in records)
    rates = [record.mfu for record in records if record.mfu is not None]
    mfu = f", MFU {sum(rates) / len(rates):.0%}" if rates else ""
    return [
        f"steps      {len(records)}, after {WARM_UP_STEPS} to warm up: "
        f"{total / len(records):.4f} s each, {targets / total:,.0f} tokens/s{mfu}, "
        f"{records[-1].peak_memory_bytes / 1e9:.1f} GB at most"
    ]


def _describe_phases(seconds: dict[str, float], steps: int, device: torch.device) -> list[str]:
    total = sum(seconds.values())
    each = ", waiting for the GPU after each" if device.type == "cuda" else ""
    rows = [
        f"  {phase:<12}{seconds.get(phase, 0.0) / steps:>12.4f} s"
        f"{seconds.get(phase, 0.0) / total:>8.1%}"
        for phase in PHASES
    ]
    return ["", f"phases of a step{each}", *rows, f"  {'sum':<12}{total / steps:>12.4f} s"]


def _describe_operators(profiler: Any, device: torch.device) -> list[str]:
    kind = "device" if device.type == "cuda" else "cpu"
    times = [
        (getattr(event, f"self_{kind}_time_total") / 1e6, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type.name == "CPU" and not event.key.startswith((_RANGE, "ProfilerStep"))
    ]
    total = sum(seconds for seconds, _, _ in times) or 1.0
    rows = [
        f"  {seconds:>10.4f} s{seconds / total:>8.1%}{count:>8} x  {name[:60]}"
        for seconds, count, name in sorted(times, reverse=True)[:_NUM_OPERATORS]
    ]
    return ["", f"operators by their own time on the {kind}, of all steps profiled", *rows]


def _describe_reads(counts: Counter[str]) -> list[str]:
    rows = [f"  {count:>6} x  {place}" for place, count in counts.most_common()]
    title = "where a step reads values: each read waits for the GPU, if the value is there"
    return ["", title, *(rows or ["  nowhere"])]


def _describe_waits(profiler: Any, steps: int) -> list[str]:
    """Counts by phase the calls of CUDA that wait; none on a CPU.

    What another thread does belongs to the phase that the loop is in.
    """
    events = profiler.events()
    phases = sorted(
        (event.time_range.start, event.name.removeprefix(_RANGE))
        for event in events
        if event.name.startswith(_RANGE) and event.device_type.name == "CPU"
    )
    starts = [start for start, _ in phases]
    counts: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.name not in _WAITS:
            continue
        begun = bisect.bisect_right(starts, event.time_range.start)
        counts[event.name, phases[begun - 1][1] if begun else "other"] += 1
    rows = [
        f"  {count / steps:>6.1f} x  {name} in {phase}"
        for (name, phase), count in counts.most_common()
    ]
    return ["", "what a step waits for, as CUDA sees it", *rows] if rows else []
