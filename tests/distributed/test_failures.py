"""What one rank meets ends all alike, in time and with a message, and nothing is lost."""

import failures
import pytest
from workspace import Workspace

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("failures") / "workspace")


@pytest.fixture(scope="module")
def curves(workspace) -> failures.Curves:
    return failures.Curves(workspace)


@pytest.mark.parametrize(
    ("engine", "rank", "step"),
    [("DDP", 0, 7), ("FSDP2", 1, 14)],  # measure.py tries each rank of each engine
)
def test_the_others_leave_after_a_kill_and_the_same_command_goes_on(curves, engine, rank, step):
    assert failures.kill_one(curves, engine, rank, step).failure == ""


@pytest.mark.parametrize("fault", ["waits_for_ever", "lost_machine"])
def test_a_rank_that_waits_for_a_dead_one_without_end_leaves_too(curves, fault):
    death = failures.kill_one(curves, "DDP", 1, 5, fault)
    assert death.failure == ""
    assert death.seconds > 5, "it left by itself, so that nothing was tried"


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("DDP", "nan_loss"),
        ("FSDP2", "infinite_gradient"),
        ("ZeRO-2", "infinite_gradient"),
        ("ZeRO-3", "nan_loss"),
    ],
)
def test_a_step_that_is_bad_on_one_rank_is_refused_by_all(workspace, engine, fault):
    run, outcome = failures.try_fault(workspace, engine, fault)
    assert outcome.text.count("the update was not made, the weights are those after step 5") >= 2
    assert failures.read_status(run)["state"] == "diverged"


@pytest.mark.parametrize(("engine", "is_async"), [("DDP", "true"), ("FSDP2", "false")])
def test_a_disk_that_is_full_for_one_rank_costs_a_save_and_nothing_else(
    workspace, curves, engine, is_async
):
    run, outcome = failures.try_fault(workspace, engine, "full_disk", async_checkpoint=is_async)
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("a checkpoint could not be saved: [Errno 28]") == 1
    assert failures.find_harm(run) == ""
    assert failures.read_curve(run) == curves.get(engine)


@pytest.mark.parametrize("engine", ["FSDP2"])
def test_a_file_that_one_rank_cannot_read_ends_all_with_its_message(workspace, engine):
    keys = workspace.method_keys("lora")
    run, outcome = failures.try_fault(workspace, engine, "bad_file", **keys)
    assert outcome.text.count("no model could be loaded from") >= 2, "every rank says so"
    assert "exitcode  : 78" in outcome.text
    assert not (run.folder / "checkpoints").exists()
