"""`qloop profile`: a step's time taken apart, and nothing but a trace left behind."""

import gzip
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from workspace import Workspace

from qloop.debug.profiling import (
    PHASES,
    _PhaseClock,
    count_waits,
    measure_steps,
    profile,
    refuse_trace,
)
from qloop.errors import ConfigError, DataError
from qloop.run import build_run
from qloop.train import make_step


def run_profile(config, folder: Path, steps: int = 2) -> list[str]:
    """Profiles a run in this process; gives the lines that it prints after the run's own."""
    said: list[str] = []
    profile(config, [], steps, folder / "trace.json.gz", said.append)
    return "\n".join(said).splitlines()


def read_phases(lines: list[str]) -> dict[str, float]:
    found = [re.fullmatch(r"  (\S.*?) +([0-9.]+) s( +[0-9.]+%)?", line) for line in lines]
    return {match[1]: float(match[2]) for match in found if match}


def read_trace(file: Path) -> list[dict]:
    with gzip.open(file, "rt") as stream:
        return json.load(stream)["traceEvents"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qloop", "profile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_command_leaves_a_trace_and_touches_no_run(tmp_path, corpus_dir, tokenizer_dir):
    workspace = Workspace(tmp_path, corpus_dir, tokenizer_dir)
    output = tmp_path / "output"
    run = output / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("another run, of the same name")
    before = contents(output)
    flags = [f"--{key}={value}" for key, value in workspace.flags(max_steps=3).items()]
    done = call(tmp_path, *flags, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert contents(output) == before
    assert [path.name for path in output.iterdir()] == ["run"]
    assert "steps      2, after 3 to warm up: " in done.stdout
    assert "aten::mm" in done.stdout
    names = [event.get("name") for event in read_trace(tmp_path / "profile.json.gz")]
    assert names.count("qloop: update") == 2
    assert names.count("qloop: backward") == 2 * 2  # micro-batches
    # Once more, and the file is there.
    again = call(tmp_path, *flags)
    assert (again.returncode, again.stdout) == (78, "")
    assert again.stderr.endswith(
        "profile.json.gz: is there already; delete it, or give another --trace\n"
    )


def test_phases_sum_to_the_step(make_config, tmp_path):
    lines = run_profile(make_config(), tmp_path)
    phases = read_phases(lines)
    assert list(phases) == [*PHASES, "sum"]
    assert all(phases[name] > 0 for name in ("forward", "head, loss", "backward", "update"))
    total = phases.pop("sum")
    assert sum(phases.values()) == pytest.approx(total, abs=len(PHASES) * 1e-4)
    assert f"{total:.4f} s each" in "\n".join(lines)


def test_an_adapters_run_has_all_phases_too(tmp_path, corpus_dir, tokenizer_dir):
    workspace = Workspace(tmp_path, corpus_dir, tokenizer_dir)
    config = workspace.make_config(
        gradient_checkpointing="selective", **workspace.method_keys("lora")
    )
    phases = read_phases(run_profile(config, tmp_path))
    assert all(phases[name] > 0 for name in ("forward", "head, loss", "backward", "update"))


def test_compiled_layers_have_all_phases_too(make_config, tmp_path):
    lines = run_profile(make_config(compile="true"), tmp_path, steps=1)
    phases = read_phases(lines)
    assert all(phases[name] > 0 for name in ("forward", "head, loss", "backward", "update"))


def test_logits_in_whole_have_a_loss_phase_too(make_config, tmp_path):
    phases = read_phases(run_profile(make_config(loss="logits"), tmp_path))
    assert phases["head, loss"] > 0


def test_a_clock_counts_every_moment_once(monkeypatch):
    clock = _PhaseClock(torch.device("cpu"))
    now = iter([1.0, 2.0, 5.0, 5.5, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock.restart()  # at 1
    for phase in ("fetch", "forward", "fetch", "other"):
        clock.enter(phase)
    assert clock.seconds == {"other": 1.0, "fetch": 3.0 + 3.5, "forward": 0.5}


def test_each_place_that_waits_for_the_gpu_is_counted(monkeypatch):
    """CUDA's debug mode warns at each wait; here the step warns in its place."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    counts = count_waits(step)
    assert sorted(counts.values()) == [1, 3]
    assert all(re.fullmatch(r"debug/test_profiling\.py:\d+", place) for place in counts)
    assert modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        count_waits(lambda: 1 / 0)
    assert modes == ["warn", "default"] * 2


def test_the_marks_on_a_run_end_with_the_profile(make_config):
    run = build_run(make_config())
    measure_steps(run, 1)
    assert not {"backward", "step"} & vars(run.engine).keys()
    assert make_step(run).step == 3 + 1 + 2 + 1
    run.close()


def test_steps_before_the_end_of_a_run_are_enough_however_short_it_is(make_config, tmp_path):
    lines = run_profile(make_config(max_steps=2, warmup_steps=1, save_steps=1), tmp_path, steps=1)
    assert any(line.startswith("steps      1, ") for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "Invalid value for '--steps': 0 is not in the range x>=1."),
        (["--learning_rat", "1"], "--learning_rat: unknown flag; did you mean --learning_rate?"),
        (["--trace", "none/p.json.gz"], "none: no such folder; make it, or give another --trace"),
    ],
)
def test_a_mistake_ends_in_a_message_and_78(tmp_path, flags, message):
    done = call(tmp_path, *flags)
    assert (done.returncode, done.stdout) == (78, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*profile*")) == []


def test_a_run_that_cannot_start_leaves_no_folder(make_config, tmp_path):
    config = make_config(batch_size=10_000)
    with pytest.raises(DataError, match="but one step reads 20000"):
        run_profile(config, tmp_path)
    assert not list(config.run.output_dir.glob(".profile*"))


def test_a_trace_is_refused_that_does_not_end_as_one():
    with pytest.raises(ConfigError, match=r"--trace: must end in \.json\.gz, got p\.txt"):
        refuse_trace(Path("p.txt"))


def test_a_trace_that_is_there_is_refused_before_anything_is_done(make_config, tmp_path):
    (tmp_path / "trace.json.gz").touch()
    config = make_config()
    with pytest.raises(ConfigError, match="is there already"):
        run_profile(config, tmp_path)
    assert not config.run.output_dir.exists()
