"""Compiling: the same numbers, one compilation, and a way on where there is none."""

import functools

import pytest
import torch
import torch._dynamo
from accelerate import Accelerator
from workspace import Workspace, reset_accelerate

import qloop.warmup
from qloop.config.keys import ModelConfig
from qloop.errors import ConfigError
from qloop.model.activations import find_layers
from qloop.model.compilation import compile_layers, count_compilations
from qloop.run import assemble
from qloop.warmup import compiles


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
    monkeypatch.setattr(qloop.warmup, "compile_layers", by_eager)
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
    parts = assemble(workspace.make_config(experiment_name="plain", **keys), [])
    steps = [parts.reader.read(2 * step).micro_batches[0] for step in range(12)]
    parts.close()
    assert len({len(micro_batch.boundaries) for micro_batch in steps}) > 1


def test_where_nothing_can_be_compiled_auto_goes_on_and_true_ends(workspace, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no working C++ compiler\nand more")

    def break_layers(model):
        for layer in find_layers(model):
            layer._compiled_call_impl = fail

    plain = workspace.losses("plain", max_steps=3)
    monkeypatch.setattr(qloop.warmup, "compile_layers", break_layers)
    monkeypatch.setattr(qloop.run, "compiles", lambda *_: True)
    assert workspace.losses("broken", max_steps=3) == plain
    log = (workspace.folder / "output/broken/logs/training_log.txt").read_text()
    assert "compiled   nothing: compile: the layers cannot be compiled: no working C++" in log
    with pytest.raises(ConfigError, match=r"cannot be compiled: no working C\+\+ compiler$"):
        workspace.losses("wanted", max_steps=3, compile="true")


class OnGpu:
    """An engine and an accelerator, as far as the choice looks at them."""

    def __init__(self, model) -> None:
        self.unwrapped = model
        self.device = torch.device("cuda")
        self.distributed_type = Accelerator(cpu=True).distributed_type


def test_auto_compiles_long_runs_on_a_gpu_only(workspace):
    parts = assemble(workspace.make_config(), [])
    gpu = OnGpu(parts.engine.unwrapped)
    assert compiles(ModelConfig(), gpu, gpu, 500)
    assert not compiles(ModelConfig(), gpu, gpu, 20)
    assert not compiles(ModelConfig(compile=False), gpu, gpu, 500)
    assert compiles(ModelConfig(training_method="qlora"), gpu, gpu, 500)
    assert not compiles(ModelConfig(offload_activations=True), gpu, gpu, 500)
    assert not compiles(ModelConfig(), parts.accelerator, parts.engine, 500)
    assert compiles(ModelConfig(compile=True), parts.accelerator, parts.engine, 1)
    parts.close()


def test_a_model_that_does_not_tell_its_layers_cannot_be_asked_to(workspace):
    gpu = OnGpu(torch.nn.Linear(2, 2))
    assert not compiles(ModelConfig(), gpu, gpu, 500)
    with pytest.raises(ConfigError, match="compile: Linear does not say what its layers are"):
        compiles(ModelConfig(compile=True), gpu, gpu, 500)
