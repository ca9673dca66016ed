"""A short form of each suite with real runs; and that the suites see what they look for."""

import subprocess
import time

import bombs
import corruption
import full_disk
import kills
import launched
import pytest
import resumes
import stops
from protocol import NoVerification
from rows import Row
from workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("torture") / "workspace")


def assert_held(rows: list[Row]) -> None:
    assert rows
    for row in rows:
        assert row.trials > 0
        assert row.survived == row.trials, row.first_failure


IN_SHORT = [corruption, bombs, kills, resumes, stops]


@pytest.mark.parametrize(
    "suite", [*IN_SHORT, pytest.param(launched, marks=pytest.mark.distributed)]
)
def test_every_promise_holds_in_short(workspace, suite):
    assert_held(suite.run(workspace, is_short=True))


@pytest.mark.skipif(not full_disk.is_allowed(), reason="mount namespaces are not allowed here")
def test_a_disk_that_is_too_small_costs_nothing_that_was_saved(workspace):
    assert_held(full_disk.run(workspace, is_short=True))


def test_a_store_that_believes_everything_is_found_out(workspace):
    row = corruption.run_corruptions(workspace, 42, seed=4, store_type=NoVerification)
    assert row.survived < row.trials
    assert "WRONG" in row.first_failure


def test_a_run_that_was_changed_is_found_out(workspace):
    """The comparison of the kills is no mere formality: one bit of one moment is enough."""
    trial = kills.Kills(workspace, "full", is_async=False)
    file = kills.folder_of(trial.make_config("undisturbed")) / "checkpoints/checkpoint-24"
    before = kills.read_run(trial.make_config("undisturbed"))
    corruption.edit(file / "optimizer.safetensors", lambda c: c.__setitem__(-1, c[-1] ^ 1))
    assert before == trial.wanted
    assert kills.read_run(trial.make_config("undisturbed")) != trial.wanted


def test_a_second_start_is_refused_while_the_first_runs_and_works_after_its_kill(workspace):
    trial = stops.Trial("none", stops.ONE, lambda run, rng: None, "finished", 0)
    run = stops.Run(workspace, "locked", trial)
    run.flags["max_steps"] = "100000"
    run.process = run.start()
    run.wait_for_step(1)
    command = run.process.args
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 77, second.stderr
    assert f"process {run.process.pid} on" in second.stderr
    run.process.kill()
    run.process.wait()
    run.process = run.start()
    deadline = time.monotonic() + 60
    while run.log.read_text().count("attention  ") < 2:  # the opening lines, for the second time
        assert run.process.poll() is None, run.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.process.kill()
    run.process.wait()
