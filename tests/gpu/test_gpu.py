"""Tests that need a GPU: its kernels against the references, compiling, and whole runs in bf16.

pytest -m gpu -n 0 tests
"""

import shutil

import pytest
import torch
from layouts import LAYOUTS, boundaries_of, draw, reference
from workspace import Workspace, reset_accelerate, write_model_config

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import IGNORED, MicroBatch
from qloop.debug.profiling import count_waits
from qloop.model.attention import DOCUMENTS, attend_to_documents
from qloop.model.build import build_model
from qloop.model.linear_loss import LinearTargetLoss, fused_grad_logits
from qloop.model.loss import CHUNK_ELEMENTS, TargetLoss, count_rows
from qloop.run import build_run
from qloop.train import make_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda")
METHODS = ("full", "lora", "qlora")


@pytest.fixture
def workspace(tmp_path, corpus_dir, tokenizer_dir) -> Workspace:
    return Workspace(tmp_path, corpus_dir, tokenizer_dir)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far two tensors are apart, as a share of the second's norm."""
    one, other = (tensor.detach().double().cpu() for tensor in (one, other))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("num_heads", "key_heads"), [(2, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_is_the_block_diagonal_reference(layout, num_heads, key_heads, window):
    """Bf16 keeps 8 bits: a few thousandths of the norm."""
    inputs = draw(layout, num_heads, key_heads, size=32)
    there = [tensor.detach().to(GPU, torch.bfloat16).requires_grad_() for tensor in inputs]
    attended, _ = attend_to_documents(
        torch.nn.Module(), *there, None,
        sliding_window=window, cu_seq_lens_q=boundaries_of(layout).to(GPU), max_length_q=12,
    )  # fmt: skip
    expected = reference(layout, *inputs, window)
    assert distance(attended, expected) < 1e-2
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    mine = torch.autograd.grad(attended, there, grad.to(GPU, torch.bfloat16))
    wanted = torch.autograd.grad(expected, inputs, grad)
    for one, other in zip(mine, wanted, strict=True):
        if other.norm() < 1e-6:  # where every token sees itself alone, scores do not matter
            assert one.abs().max() < 0.1
        else:
            assert distance(one, other) < 2e-2


@pytest.mark.parametrize("kind", ["logits", "chunked", "fused"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_all_logits_in_fp32(tmp_path, kind, tied, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "fused", 2**22)  # 4 chunks
    file = write_model_config(
        tmp_path, vocab_size=8192, initializer_range=0.1, tie_word_embeddings=tied
    )
    config = ModelConfig(model_config_file=file)
    model = build_model(config, LoraConfig(), "bf16", GPU, seed=0).to(GPU)
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(1000, (4, 500), generator=generator) for _ in range(2))
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    row = MicroBatch(ids, labels, torch.arange(500).expand(4, 500)).to(GPU)

    def measure(kind: str, in_bf16: bool) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=in_bf16):
            value = TargetLoss(model, kind).sum(model, row)
        (value * 1e-3).backward()
        return value.item(), [p.grad.clone() for p in model.parameters()]

    expected, gradients = measure("logits", in_bf16=False)
    got, mine = measure(kind, in_bf16=True)
    assert got == pytest.approx(expected, rel=2e-3)
    for one, other in zip(mine, gradients, strict=True):
        assert distance(one, other) < 5e-2


@pytest.mark.parametrize("method", METHODS)
def test_recomputing_changes_nothing_but_memory(workspace, method):
    keys = {**workspace.method_keys(method), "max_steps": 4}
    plain = workspace.losses("plain", gradient_checkpointing="off", **keys)
    for mode, offload in (("selective", "false"), ("full", "false"), ("full", "true")):
        name = f"{mode}-{offload}"
        keys.update(gradient_checkpointing=mode, offload_activations=offload)
        assert workspace.losses(name, **keys) == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *(("full", "off"), ("full", "selective"), ("full", "full")),
        *(("lora", "off"), ("qlora", "off"), ("qlora", "selective")),
    ],
)
def test_a_compiled_run_has_the_same_losses_and_compiles_once(workspace, method, mode):
    keys = {
        **workspace.method_keys(method),
        **{"max_steps": 8, "gradient_checkpointing": mode},
        # Compiled code draws other random numbers.
        **({} if method == "full" else {"lora_dropout": 0.0}),
    }
    plain = workspace.losses("plain", **keys)
    torch._dynamo.reset()
    compiled = workspace.losses_compiled_once("compiled", **keys)
    assert compiled == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"]
)
def test_every_optimizer_goes_on_to_the_same_last_bit(workspace, optimizer):
    keys = {"optimizer": optimizer, "deterministic": "true", "max_steps": 6}
    whole = workspace.losses("whole", **keys)
    shutil.rmtree(workspace.folder / "output/whole/checkpoints/checkpoint-6")
    assert workspace.losses("whole", **keys) == whole


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_the_gpu_in_one_place(workspace, method):
    config = workspace.make_config(**workspace.method_keys(method))
    reset_accelerate()
    run = build_run(config)
    run.model.train()
    make_step(run)  # the first use of kernels may wait
    waits = count_waits(lambda: make_step(run))
    run.close()
    assert len(waits) == 1, f"Move all but one of these reads out of the step: {dict(waits)}"
    assert next(iter(waits)).startswith("qloop/train.py:")


def test_the_model_attends_by_documents_and_learns(workspace):
    reset_accelerate()
    run = build_run(workspace.make_config())
    assert run.engine.unwrapped.config._attn_implementation == DOCUMENTS
    run.close()
    losses = workspace.losses("learns", max_steps=20, warmup_steps=2)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("trained", [True, False])
def test_a_vocabulary_of_152_thousand_at_8_thousand_tokens_takes_less_than_a_gigabyte(trained):
    """Without the gradients; all logits and theirs would be 10 GB and more."""
    hidden = torch.randn(8192, 896, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(152_064, 896, device=GPU, requires_grad=trained)
    labels = torch.randint(152_064, (8192,), device=GPU)
    rows = count_rows(152_064, "cuda", is_fused=True)
    types = (torch.bfloat16, fused_grad_logits)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    LinearTargetLoss.apply(hidden, weight, None, labels, rows, *types).backward()
    gradients = sum(tensor.nbytes for tensor in (hidden, weight) if tensor.requires_grad)
    assert torch.cuda.max_memory_allocated() - before - gradients < 1e9
