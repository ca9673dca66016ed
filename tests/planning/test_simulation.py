"""The simulated step beside a real one, whose allocations torch itself reports."""

import gc

import pytest
import torch
import torch._dynamo
from torch.profiler import ProfilerActivity, profile
from workspace import ARCHITECTURES, write_model_config

import qloop.model.loss
from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import MicroBatch
from qloop.model.activations import set_recomputation
from qloop.model.attention import DOCUMENTS
from qloop.model.build import build_model
from qloop.model.compilation import compile_layers
from qloop.model.loss import TargetLoss
from qloop.planning.meta_model import build_meta_model
from qloop.planning.simulation import PARTS, simulate_step

CPU = torch.device("cpu")
BATCH, LENGTH = 2, 512
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model_config(folder, method: str, **keys) -> ModelConfig:
    file = write_model_config(folder / "config", **{**SIZES, **keys})
    if not (folder / "base").exists():
        base = build_model(ModelConfig(model_config_file=file), LoraConfig(), "fp32", CPU, seed=0)
        base.save_pretrained(folder / "base")
    return ModelConfig(model_name=str(folder / "base"), training_method=method)


def prepare(model, mode: str):
    model.set_attn_implementation(DOCUMENTS)
    set_recomputation(model, mode)
    return model.train()


def simulate(config: ModelConfig, mode: str, kind: str, precision="fp32", accumulates=False):
    model = prepare(build_meta_model(config, LoraConfig(), precision), mode)
    return simulate_step(model, kind, "cpu", BATCH, LENGTH, precision, accumulates)


def measure(config: ModelConfig, mode: str, kind: str, precision="fp32", is_compiled=False) -> int:
    """Bytes that a real step takes at most, beside the weights, as torch's allocator reports."""
    model = prepare(build_model(config, LoraConfig(), precision, CPU, seed=0), mode)
    ids = torch.randint(4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(300), torch.arange(212)]).repeat(BATCH, 1)
    micro_batch = MicroBatch(ids, ids.roll(-1, dims=1), places)
    loss = TargetLoss(model, kind)
    if is_compiled:
        torch._dynamo.reset()  # after some compilations of one function it makes no more
        compile_layers(model)
        loss.sum(model, micro_batch).backward()
        model.zero_grad()
    gc.collect()  # what earlier tests left would else end meanwhile, and count as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16", cache_enabled=False):
            value = loss.sum(model, micro_batch)
        value.backward()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert changes
    now = largest = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        largest = max(largest, now)
    return largest


@pytest.mark.parametrize("mode", ["off", "selective", "full"])
@pytest.mark.parametrize(
    ("method", "kind"), [("full", "chunked"), ("full", "logits"), ("lora", "chunked")]
)
def test_the_peak_is_that_of_a_real_step_within_a_tenth(tmp_path, method, mode, kind):
    config = model_config(tmp_path, method)
    parts = simulate(config, mode, kind)
    assert sum(parts.values()) - parts["parameters"] == pytest.approx(
        measure(config, mode, kind), rel=0.1
    )


def test_in_bf16_too(tmp_path):
    config = model_config(tmp_path, "full", num_hidden_layers=2)
    parts = simulate(config, "off", "chunked", "bf16")
    real = measure(config, "off", "chunked", "bf16")
    assert sum(parts.values()) - parts["parameters"] == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("method", "mode"),
    [("full", "off"), ("lora", "off"), ("lora", "selective"), ("qlora", "selective")],
)
def test_compiled_layers_keep_what_their_compiler_chooses(tmp_path, method, mode):
    """Which is less than they keep uncompiled."""
    config = model_config(tmp_path, method, num_hidden_layers=8)
    real = measure(config, mode, "chunked", is_compiled=True)
    model = prepare(build_meta_model(config, LoraConfig(), "fp32"), "off")
    parts = simulate_step(model, "chunked", "cpu", BATCH, LENGTH, "fp32", False, compiled=mode)
    planned = sum(parts.values()) - parts["parameters"]
    assert planned == pytest.approx(real, rel=0.1)
    if mode == "off":
        assert planned < 0.95 * measure(config, mode, "chunked")


def test_a_gpu_keeps_a_byte_for_a_value_that_may_be_dropped(tmp_path):
    """A CPU keeps the factor that it multiplied with; here of 7 adapters in each of 4 layers."""
    config = model_config(tmp_path, "lora")
    kept = {}
    for device in ("cpu", "cuda"):
        model = prepare(build_meta_model(config, LoraConfig(), "fp32"), "off")
        parts = simulate_step(model, "logits", device, BATCH, LENGTH, "fp32", accumulates=False)
        kept[device] = parts["activations"]
    values = BATCH * LENGTH * 4 * (6 * SIZES["hidden_size"] + SIZES["intermediate_size"])
    # At the peak, the last of them is gone.
    assert kept["cpu"] - kept["cuda"] == pytest.approx(values * (4 - 1), rel=0.1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["off", "selective"])
def test_every_architecture_can_be_planned_compiled(tmp_path, model_type, mode):
    """And keeps no more, but for what tells little of so small a model."""
    # A drawing operator that is to be computed again is planned uncompiled.
    keys = {"attn_pdrop": 0.0} if model_type == "gpt2" else {}
    file = write_model_config(tmp_path, model_type, **keys)
    config = ModelConfig(model_config_file=file)
    kept = []
    for compiled in (mode, None):
        model = build_meta_model(config, LoraConfig(), "bf16").train()
        if not compiled:
            set_recomputation(model, mode)
        parts = simulate_step(model, "logits", "cuda", 2, 256, "bf16", True, compiled=compiled)
        kept.append(parts["activations"])
    assert 0 < kept[0] <= 1.1 * kept[1]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_gradients_are_counted_to_the_byte(tmp_path, tied):
    config = model_config(tmp_path, "full", tie_word_embeddings=tied)
    model = build_model(config, LoraConfig(), "fp32", CPU, seed=0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    parts = simulate(config, "full", "chunked", accumulates=True)
    assert weights <= parts["parameters"] < weights + 1000  # buffers of a few numbers
    assert parts["gradients"] == weights


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_have_gradients_of_adapters_and_a_4_bit_base_its_size(tmp_path, method):
    config = model_config(tmp_path, method)
    model = build_model(config, LoraConfig(), "fp32", CPU, seed=0)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    parts = simulate(config, "full", "chunked", accumulates=True)
    assert parts["gradients"] == trained
    assert parts["parameters"] == pytest.approx(trained + frozen, rel=0.02)


def test_gradients_of_an_earlier_micro_batch_are_there_at_the_peak(tmp_path):
    config = model_config(tmp_path, "full")
    first, later = (simulate(config, "off", "chunked", accumulates=a) for a in (False, True))
    assert sum(later.values()) > sum(first.values())
    assert later["gradients"] > first["gradients"]


def test_less_is_kept_the_more_is_computed_again(tmp_path):
    config = model_config(tmp_path, "full")
    kept = [
        simulate(config, mode, "chunked")["activations"] for mode in ("off", "selective", "full")
    ]
    assert kept[0] > 1.3 * kept[1] > 3 * kept[2]


def test_all_logits_show_as_loss_and_chunks_of_them_do_not(tmp_path, monkeypatch):
    monkeypatch.setitem(qloop.model.loss.CHUNK_ELEMENTS, "cpu", 64 * 4096)
    config, all_logits = model_config(tmp_path, "lora"), BATCH * LENGTH * 4096 * 4
    logits, chunked = (simulate(config, "full", kind)["loss"] for kind in ("logits", "chunked"))
    assert logits >= all_logits
    assert chunked < all_logits / 2


def test_every_part_has_its_name(tmp_path):
    parts = simulate(model_config(tmp_path, "full"), "off", "chunked")
    assert tuple(parts) == PARTS
    assert parts["optimizer"] == 0
    assert all(size >= 0 for size in parts.values())
