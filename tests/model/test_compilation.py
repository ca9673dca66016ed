"""Compiling: the same numbers, one compilation, and a way on where there is none."""

import functools

import pytest
import torch
import torch._dynamo
from transformers.modeling_layers import GradientCheckpointingLayer
from workspace import Workspace, reset_accelerate

import qloop.model.compilation
from qloop.errors import ConfigError
from qloop.model.activations import find_layers
from qloop.model.compilation import choose, compile_layers, count_compilations
from qloop.run import build_run


@pytest.fixture
def workspace(tmp_path, corpus_dir, tokenizer_dir) -> Workspace:
    return Workspace(tmp_path, corpus_dir, tokenizer_dir)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("method", "mode"), [("full", "off"), ("full", "selective"), ("full", "full"), ("lora", "off")]
)
def test_a_compiled_run_has_the_losses_of_one_that_is_not(workspace, monkeypatch, method, mode):
    """The graphs are made and differentiated, but not turned into C++, which takes long."""
    by_eager = functools.partial(compile_layers, backend="aot_eager")
    monkeypatch.setattr(qloop.model.compilation, "compile_layers", by_eager)
    keys = {**workspace.method_keys(method), "gradient_checkpointing": mode, "max_steps": 4}
    if method == "lora":
        keys["lora_dropout"] = 0.0  # compiled code draws other random numbers
    plain = workspace.losses("plain", **keys)
    before = count_compilations()
    compiled = workspace.losses("compiled", compile="true", **keys)
    assert count_compilations() > before
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_nothing_is_compiled_after_the_first_step_has_begun(workspace):
    """Twelve steps, each with other documents, three evaluations among them."""
    keys = {"max_steps": 12, "gradient_accumulation_steps": 1, "eval_steps": 4, "num_samples": 1}
    compiled = workspace.losses_compiled_once("compiled", **keys)
    assert compiled == pytest.approx(workspace.losses("plain", **keys))
    reset_accelerate()
    run = build_run(workspace.make_config(experiment_name="plain", **keys))
    steps = [run.batches.read(2 * step).micro_batches[0] for step in range(12)]
    run.close()
    assert len({len(micro_batch.boundaries) for micro_batch in steps}) > 1


def test_where_nothing_can_be_compiled_auto_goes_on_and_true_ends(workspace, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no working C++ compiler\nand more")

    def break_layers(model):
        for layer in find_layers(model):
            layer._compiled_call_impl = fail

    plain = workspace.losses("plain", max_steps=3)
    monkeypatch.setattr(qloop.model.compilation, "compile_layers", break_layers)
    monkeypatch.setattr(qloop.model.compilation, "choose", lambda *_, **__: True)
    assert workspace.losses("broken", max_steps=3) == plain
    log = (workspace.folder / "output/broken/logs/training_log.txt").read_text()
    assert "compiled   nothing: compile: the layers cannot be compiled: no working C++" in log
    with pytest.raises(ConfigError, match=r"cannot be compiled: no working C\+\+ compiler$"):
        workspace.losses("wanted", max_steps=3, compile="true")


def on(device_type: str, wanted: str | bool = "auto", model=None, **keys) -> bool:
    model = model or torch.nn.ModuleList([GradientCheckpointingLayer()])
    keys = {"engine": "ddp", "offloads": False, "micro_batches": 500, **keys}
    return choose(wanted, model, device_type=device_type, **keys)


def test_auto_compiles_long_runs_on_a_gpu_only():
    assert on("cuda")
    assert not on("cuda", micro_batches=20)
    assert not on("cuda", False)
    assert not on("cuda", offloads=True)
    assert not on("cpu")
    assert on("cpu", True, micro_batches=1)


@pytest.mark.parametrize(
    ("model", "engine", "reason"),
    [
        (torch.nn.Linear(2, 2), "ddp", "Linear does not mark its layers"),
        (None, "zero2", "DeepSpeed changes the layers while they run"),
        (None, "zero3", "DeepSpeed changes the layers while they run"),
    ],
)
def test_where_it_is_impossible_auto_does_not_and_true_is_refused(model, engine, reason):
    assert not on("cuda", model=model, engine=engine)
    with pytest.raises(ConfigError, match=f"compile: {reason}"):
        on("cuda", True, model=model, engine=engine)
