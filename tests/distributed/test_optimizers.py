"""Each optimizer under each engine: the steps of one process, or a refusal."""

import pytest
from launching import ONE, Run, Setting, largest_difference
from safetensors.torch import load_file
from workspace import Workspace, write_model_config

pytestmark = pytest.mark.distributed

STEPS = 12


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("optimizers") / "workspace")


def make(workspace: Workspace, name: str, optimizer: str, **keys) -> Run:
    wide = write_model_config(workspace.folder / "wide", hidden_size=64)
    return Run(
        workspace, f"{name}-{optimizer}",
        model_config_file=wide, optimizer=optimizer, **{"max_steps": STEPS, **keys},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "engine"), [("adamw_8bit", "DDP"), ("muon", "DDP"), ("muon", "FSDP2")]
)
def test_two_processes_make_the_steps_of_one(workspace, optimizer, engine):
    """Muon's iterations round to bf16; shards made orthogonal alone would be off by a half."""
    one, two = make(workspace, f"one-{engine}", optimizer), make(workspace, engine, optimizer)
    one.start(ONE)
    two.start(Setting(engine, 2))
    for figure, limit in (("loss", 1e-3), ("grad_norm", 1e-2)):
        assert largest_difference(two.read_metrics(), one.read_metrics(), figure) < limit
    losses = [record["loss"] for record in one.read_metrics()]
    assert losses[0] - losses[-1] > 0.5, "the steps move the weights"


def test_muon_goes_on_to_the_last_bit_under_fsdp2_and_from_there_on_one_process(workspace):
    two, even = Setting("FSDP2", 2), {"min_learning_rate": "3e-3", "warmup_steps": 0}
    whole, half = make(workspace, "whole", "muon", **even), make(workspace, "half", "muon", **even)
    whole.start(two)
    half.start(two, max_steps=6)
    alone = half.copy("alone-muon")
    half.start(two)
    assert [r["loss"] for r in half.read_metrics()] == [r["loss"] for r in whole.read_metrics()]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run.newest() / file) for run in (half, whole))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    alone.start(ONE, gradient_accumulation_steps=4)  # as that run: a step is divided anew
    assert largest_difference(alone.read_metrics(), whole.read_metrics(), "loss") < 1e-3


@pytest.mark.parametrize(
    ("optimizer", "engine", "reason"),
    [
        ("adamw_8bit", "FSDP2", "adamw_8bit does not run under FSDP2"),
        ("muon", "ZeRO-2", "muon does not run under DeepSpeed"),
        ("adamw_8bit", "ZeRO-3", "adamw_8bit does not run under DeepSpeed"),
    ],
)
def test_what_makes_no_right_steps_is_refused_before_the_corpus_is_read(
    workspace, optimizer, engine, reason
):
    run = make(workspace, f"refused-{engine}", optimizer)
    outcome = run.wait(run.spawn(Setting(engine, 2)))
    assert f"optimizer: {reason}" in outcome.text
    assert "exitcode  : 78" in outcome.text
    assert not run.folder.exists()
