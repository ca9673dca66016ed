"""Where the time of a step goes: `qloop profile` makes some steps of a real run.

The run is built as `qloop train` builds it, in a folder of its own that is deleted at the end, and
its steps are made by `make_step`. Marks around the engine's methods and hooks on the model divide a
step into phases. Each phase ends where the next begins, so the phases add up to the step:

    fetch | forward | head, loss | backward | other | ... | norm, clip | update | other

Steps are made twice: first with a clock alone, since torch's profiler slows them down, then with
the profiler, for the operators and the trace. On a GPU, one more step counts the places where
Python waits for it.
"""

import contextlib
import os
import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from qloop.config.keys import Config
from qloop.errors import ConfigError, explaining_disk_errors
from qloop.opening import describe_run
from qloop.planning.plan import change_config
from qloop.report.metrics import StepRecord
from qloop.run import Run, build_run
from qloop.train import make_step

WARM_UP_STEPS = 3
"""Not counted: first calls choose kernels, fill caches and compile."""

PHASES = ("fetch", "forward", "head, loss", "backward", "norm, clip", "update", "other")
_RANGE = "qloop: "
_NUM_OPERATORS = 10
_ENDLESS = 10**9


def profile(
    config: Config, notes: Sequence[str], steps: int, trace: Path, say: Callable[[str], None]
) -> None:
    """Makes steps of the run that a config describes, and reports where their time went.

    Makes `steps` of them with a clock, and as many again with the profiler, whose Chrome trace is
    written to `trace`. The run's own folder is not touched.

    Raises:
        QloopError: Something that the config names cannot be used, or `trace` cannot be written.
    """
    refuse_trace(trace)
    is_main = os.environ.get("RANK", "0") == "0"
    # All ranks of a machine have the same parent, the launcher.
    owner = os.getppid() if "RANK" in os.environ else os.getpid()
    scratch = config.run.output_dir / f".profile-{owner}"
    try:
        about = "profile    some steps of the run, in a folder that is deleted at the end"
        run = build_run(_move(config, scratch), [*notes, about])
        try:
            run.report.say("\n".join(describe_run(run)))
            lines, profiler = measure_steps(run, steps)
        finally:
            run.close()
    finally:
        if is_main:
            shutil.rmtree(scratch, ignore_errors=True)
    if is_main:
        say("\n".join(["", *lines, ""]))
        with explaining_disk_errors(trace):
            profiler.export_chrome_trace(str(trace))
        size = trace.stat().st_size / 1e6
        say(f"trace      {trace} ({size:.1f} MB): open it in https://ui.perfetto.dev, or in Chrome")
        say("           at chrome://tracing")


def refuse_trace(trace: Path) -> None:
    """Refuses an unusable trace file before any work is done.

    Raises:
        ConfigError: It exists, its folder does not, or its name has another ending.
    """
    if not trace.name.endswith(".json.gz"):
        raise ConfigError(f"--trace: must end in .json.gz, got {trace}")
    if trace.exists():
        raise ConfigError(f"{trace}: is there already; delete it, or give another --trace")
    if not trace.parent.is_dir():
        raise ConfigError(f"{trace.parent}: no such folder; make it, or give another --trace")


def _move(config: Config, scratch: Path) -> Config:
    """Returns the same run in another folder, without saves, evaluations and trackers."""
    changes: dict[str, Any] = {
        **{"output_dir": scratch, "experiment_name": "run", "wandb": False, "tensorboard": False},
        **{"cache_dir": config.data.cache_dir or config.run.output_dir / ".cache"},
        **{"eval_steps": 0, "save_steps": _ENDLESS, "keep_every": 0},
    }
    if config.run.resume in ("never", "restart"):
        changes["resume"] = "auto"  # in an empty folder all three are the same
    return change_config(config, changes)


def measure_steps(run: Run, steps: int) -> tuple[list[str], Any]:
    """Makes the steps; returns the lines of the report, and torch's profiler with the trace."""
    device = run.accelerator.device
    run.model.train()
    clock = _PhaseClock(device)
    with _marked(run, clock):
        for _ in range(WARM_UP_STEPS):
            make_step(run)
        clock.restart()
        records = [_make_marked_step(run, clock) for _ in range(steps)]
        seconds = clock.stop()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
        with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
            for number in range(steps + 1):
                if number:
                    profiler.step()
                _make_marked_step(run, clock)
    lines = [
        *_describe_steps(records, seconds),
        *_describe_phases(seconds, steps, device),
        *_describe_operators(profiler, device),
    ]
    if device.type == "cuda":
        lines += _describe_waits(count_waits(lambda: make_step(run)))
    return lines, profiler


def _make_marked_step(run: Run, clock: "_PhaseClock") -> StepRecord:
    clock.enter("fetch")
    record = make_step(run)
    clock.enter("other")
    return record


def count_waits(step: Callable[[], object]) -> Counter[str]:
    """Counts the places in the code where a step waits for the GPU, as CUDA's debug mode warns."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [(Path(w.filename), w.lineno) for w in caught if "synchronizing" in str(w.message)]
    return Counter(f"{file.parent.name}/{file.name}:{line}" for file, line in places)


class _PhaseClock:
    """Measures contiguous phases, and names them to the profiler."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = 0.0
        self._range: Any = None
        self.phase = "other"
        self.waits = True
        """Whether a phase ends only when the GPU has finished its work."""
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins another."""
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
        """Starts counting from here."""
        self.enter("other")
        self.seconds.clear()

    def stop(self) -> dict[str, float]:
        """Returns the seconds so far; from here on, phases are only named, without waiting."""
        self.enter("other")
        self.waits = False
        return dict(self.seconds)


@contextlib.contextmanager
def _marked(run: Run, clock: _PhaseClock) -> Iterator[None]:
    """Makes the parts of a step report their phases to the clock, until the block ends."""
    engine = run.engine

    def mark(name: str, phase: str, then: str) -> None:
        call = getattr(engine, name)

        def marked(*arguments: Any) -> Any:
            clock.enter(phase)
            result = call(*arguments)
            clock.enter(then)
            return result

        setattr(engine, name, marked)

    def entering(phase: str) -> Any:
        return lambda *_: clock.enter(phase)

    names = ("backward", "measure_grad_norm", "clip_gradients", "step")
    mark("backward", "backward", then="other")
    mark("measure_grad_norm", "norm, clip", then="norm, clip")
    mark("clip_gradients", "norm, clip", then="other")
    mark("step", "update", then="other")
    hooks = [run.model.register_forward_pre_hook(entering("forward"))]
    # The head computes the loss itself, unless all logits are kept.
    head = engine.unwrapped.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        hooks.append(head.register_forward_pre_hook(entering("head, loss")))
    else:
        hooks.append(run.model.register_forward_hook(entering("head, loss")))
    try:
        yield
    finally:
        for name in names:
            delattr(engine, name)
        for hook in hooks:
            hook.remove()


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
    each = ", each ending when the GPU is done" if device.type == "cuda" else ""
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
    return ["", f"operators by their own time on the {kind}, over all profiled steps", *rows]


def _describe_waits(counts: Counter[str]) -> list[str]:
    rows = [f"  {count:>6} x  {place}" for place, count in counts.most_common()]
    return ["", "places where a step waits for the GPU", *(rows or ["  none"])]
