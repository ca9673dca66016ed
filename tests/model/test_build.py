"""The model: built right for each method, isolated, trained where it should be, refused in words.

The bases have weights ten times larger than new ones usually have, so that attention matters: what
a lost mask changes shows in the first digits.
"""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
import transformers
from references import next_token_loss, predict
from safetensors.torch import load_file, save_file
from workspace import ARCHITECTURES, write_model_config

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import MicroBatch
from qloop.errors import CheckpointError, ConfigError
from qloop.hardware import choose_precision
from qloop.model.activations import set_recomputation
from qloop.model.build import build_model
from qloop.model.isolation import check_isolation, measure_isolation
from qloop.model.loss import compute_logits
from qloop.model.pretrained import check_sizes, load_model_config, load_tokenizer
from qloop.model.state import count_parameters, fingerprint_weights

CPU = torch.device("cpu")
VOCABULARY = 1024
METHODS = ("full", "lora", "qlora")
LENGTHS = (5, 30, 1, 21, 7)
"""Documents of a packed row, two of them far longer than a sliding window of 8."""
WINDOWED = [name for name, keys in ARCHITECTURES.items() if "sliding_window" in keys]

# Keys of a tiny model of a kind that keeps a state over the row.
HYBRID = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
both_attentions = pytest.mark.parametrize("attention", ["documents", "sdpa"])
every_method = pytest.mark.parametrize("method", METHODS)
both_adapters = pytest.mark.parametrize("method", ["lora", "qlora"])


def build(
    source: Path | str,
    method: str = "full",
    precision: str = "fp32",
    seed: int = 0,
    checkpoint: Path | None = None,
    **keys,
):
    """Builds from a base's folder, or from random weights where the source is a config.json."""
    lora = {key: keys.pop(key) for key in list(keys) if key in LoraConfig.model_fields}
    is_file = str(source).endswith(".json")
    place = {"model_config_file": source} if is_file else {"model_name": str(source)}
    config = ModelConfig(
        training_method=method, **{"gradient_checkpointing": False, **place, **keys}
    )
    model = build_model(config, LoraConfig(**lora), precision, CPU, seed, checkpoint)
    set_recomputation(model, config.gradient_checkpointing, config.offload_activations)
    return model


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Callable[..., Path]:
    """Gives the folder of a saved base; each is built once."""
    built: dict[str, Path] = {}

    def base(architecture: str = "qwen2", seed: int = 0, **keys) -> Path:
        name = f"{architecture}-{seed}-{json.dumps(keys)}"
        if name not in built:
            folder = tmp_path_factory.mktemp(architecture)
            keys = {"initializer_range": 0.2, **keys}
            file = write_model_config(folder / "config", architecture, **keys)
            build(file, seed=seed).save_pretrained(folder / "base")
            built[name] = folder / "base"
        return built[name]

    return base


@pytest.fixture
def spoil(bases, tmp_path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """Copies the Qwen2 base with its tensors changed."""

    def copy(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = tmp_path / "spoiled"
        shutil.copytree(bases(), folder)
        change_tensors(folder / "model.safetensors", change)
        return folder

    return copy


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def draw_row(rows: int = 1, seed: int = 0) -> MicroBatch:
    """Packs documents of LENGTHS, all of whose positions have a label."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, sum(LENGTHS))
    return MicroBatch(
        torch.randint(VOCABULARY, shape, generator=generator),
        torch.randint(VOCABULARY, shape, generator=generator),
        torch.cat([torch.arange(length) for length in LENGTHS]).repeat(rows, 1),
    )


def cut(row: MicroBatch, here: slice) -> MicroBatch:
    tensors = (row.input_ids, row.labels, row.position_ids)
    return MicroBatch(*(tensor[:, here] for tensor in tensors))


def attending(model, attention: str):
    model.set_attn_implementation(attention)
    return model


def sum_losses_alone(model, row: MicroBatch) -> float:
    """Runs each document by itself, as anyone would; transformers makes the positions."""
    total = 0.0
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for begin, end in pairwise(ends):
        logits = model(input_ids=row.input_ids[:, begin:end], use_cache=False).logits[0]
        total += F.cross_entropy(logits, row.labels[0, begin:end], reduction="sum").item()
    return total


def train_steps(model, num_steps: int) -> None:
    trained = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for step in range(num_steps):
        row = draw_row(seed=step)
        (next_token_loss(model, row) / row.labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_of(tensors: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == others.keys()
    assert tensors, "something is compared"
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def names_of_unmoved(model, before: dict[str, torch.Tensor]) -> list[str]:
    after = trained_parameters(model)
    return [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


def layers_with_adapters(model) -> set[str]:
    return {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_B.def" in name}


def logits_of(model, row: MicroBatch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return compute_logits(model, row)


def save_adapters(model, folder: Path) -> Path:
    """As a checkpoint does."""
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


# Every architecture


@every_architecture
@both_attentions
def test_documents_in_a_row_do_not_see_each_other(tmp_path, architecture, attention):
    model = attending(build(write_model_config(tmp_path, architecture)), attention)
    measured = measure_isolation(model, VOCABULARY, "fp32")
    assert measured.swapped <= 1e-6
    assert measured.alone < 1e-5


@every_architecture
@both_attentions
def test_large_weights_do_not_make_them_see_each_other(bases, architecture, attention):
    model = attending(build(bases(architecture)), attention)
    measured = check_isolation(model, VOCABULARY, "fp32")
    assert measured.swapped <= 1e-6
    assert measured.alone < 1e-5


@every_architecture
def test_a_forward_and_backward_pass_gives_every_weight_a_finite_gradient(bases, architecture):
    model = build(bases(architecture))
    loss = next_token_loss(model, draw_row(rows=2))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_architecture
@both_attentions
def test_the_packed_loss_is_the_sum_of_the_documents_losses_under_eager_attention(
    bases, architecture, attention
):
    eager, model = build(bases(architecture), attention="eager"), build(bases(architecture))
    assert eager.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    attending(model, attention)
    row = draw_row()
    packed = next_token_loss(model, row).item()
    assert packed == pytest.approx(sum_losses_alone(eager, row), rel=1e-5)


@every_architecture
def test_that_comparison_would_see_documents_run_together(bases, architecture):
    model, row = build(bases(architecture)), draw_row()
    together = MicroBatch(row.input_ids, row.labels, torch.arange(sum(LENGTHS))[None])
    packed = next_token_loss(model, row).item()
    assert next_token_loss(model, together).item() != pytest.approx(packed, rel=1e-4)


@pytest.mark.parametrize("architecture", WINDOWED)
@both_attentions
def test_that_comparison_would_see_a_lost_sliding_window(bases, architecture, attention):
    model, row = attending(build(bases(architecture)), attention), draw_row()
    windowless = bases(architecture, sliding_window=None)
    assert_equal(dict(build(windowless).named_parameters()), dict(model.named_parameters()))
    packed = next_token_loss(model, row).item()
    assert next_token_loss(build(windowless), row).item() != pytest.approx(packed, rel=1e-3)


@every_architecture
@both_attentions
def test_packing_leaves_the_gradient_as_it_is(bases, architecture, attention):
    packed, alone = build(bases(architecture)), build(bases(architecture), attention="eager")
    attending(packed, attention)
    row, begin = draw_row(), 0
    next_token_loss(packed, row).backward()
    for length in LENGTHS:
        next_token_loss(alone, cut(row, slice(begin, begin + length))).backward()
        begin += length
    for mine, other in zip(packed.parameters(), alone.parameters(), strict=True):
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4 * scale)


@every_architecture
def test_a_saved_model_is_loaded_by_name_bit_by_bit(tmp_path, architecture):
    model = build(write_model_config(tmp_path / "config", architecture))
    model.save_pretrained(tmp_path / "saved")
    loaded = build(tmp_path / "saved", seed=1)
    assert_equal(tensors_of(loaded), tensors_of(model))


# Isolation


@pytest.mark.parametrize(("architecture", "keys"), [("qwen3_next", HYBRID), ("bloom", {})])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_whose_documents_see_each_other_is_refused(tmp_path, architecture, keys, precision):
    model = build(write_model_config(tmp_path, architecture, initializer_range=0.2, **keys))
    with pytest.raises(ConfigError, match=f"{architecture} lets packed documents see each other"):
        check_isolation(model, VOCABULARY, precision)


@pytest.mark.parametrize(
    "trap",
    [
        {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.int64), "use_cache": False},
        {"use_cache": True},
        {},
    ],
    ids=["mask", "cache", "transformers' default"],
)
def test_a_mask_or_a_cache_makes_documents_see_each_other_and_no_error_tells(bases, trap):
    """The reason why `compute_logits` passes neither; the last document has 7 tokens."""
    model, row = build(bases()), draw_row()
    alone = logits_of(model, cut(row, slice(-7, None)))
    ours = logits_of(model, row)[:, -7:]
    with torch.no_grad():
        trapped = model(input_ids=row.input_ids, position_ids=row.position_ids, **trap)
    assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (trapped.logits[:, -7:] - alone).abs().max() > 0.1 * alone.abs().max()


@every_architecture
def test_models_that_keep_documents_apart_are_taken_in_bf16_too(bases, architecture):
    """Where other kernels round otherwise: alone, logits may move in the third digit."""
    check_isolation(build(bases(architecture)), VOCABULARY, "bf16")


class Neighbours(torch.nn.Module):
    """Logits of each token alone, plus a little of where it stands and of what stood before it."""

    def __init__(self, of_place: float, of_others: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.of_place, self.of_others = of_place, of_others
        self.config = SimpleNamespace(model_type="neighbours")

    def forward(self, input_ids, position_ids, use_cache):
        own = self.table[input_ids]
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        others = own.cumsum(dim=1) / count
        return SimpleNamespace(logits=own + self.of_place * count + self.of_others * others)


def test_a_model_that_counts_from_the_start_of_the_row_is_refused():
    """Its documents do not see each other, but know how much stands in front of them."""
    model = Neighbours(of_place=0.01, of_others=0.0)
    assert measure_isolation(model, VOCABULARY, "fp32").swapped == 0.0
    with pytest.raises(ConfigError, match="neighbours"):
        check_isolation(model, VOCABULARY, "fp32")


def test_a_model_that_leaks_less_than_other_kernels_may_differ_is_refused():
    """Alone it would pass; no kernel explains a change of what stands in front."""
    model = Neighbours(of_place=0.0, of_others=0.0015)
    assert measure_isolation(model, VOCABULARY, "fp32").alone < 1e-3
    with pytest.raises(ConfigError, match="neighbours"):
        check_isolation(model, VOCABULARY, "fp32")


def test_a_model_of_single_tokens_is_taken():
    model = Neighbours(of_place=0.0, of_others=0.0)
    assert check_isolation(model, VOCABULARY, "fp32") == (0.0, 0.0)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_model_with_a_broken_weight_is_refused(spoil, bad):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float(bad)

    with pytest.raises(ConfigError, match="qwen2"):
        check_isolation(build(spoil(change)), VOCABULARY, "fp32")


@pytest.mark.skipif(
    transformers.utils.is_flash_attn_2_available(), reason="it is installed, and there is a GPU"
)
@pytest.mark.parametrize("from_file", [True, False])
def test_flash_attention_that_is_not_here_is_told_under_its_key(bases, from_file):
    source = bases() / "config.json" if from_file else bases()
    with pytest.raises(ConfigError, match=r"^attention: FlashAttention2 .*; use auto$"):
        build(source, attention="flash_attention_2")


@both_adapters
def test_adapters_that_were_trained_keep_documents_apart(bases, method):
    model = build(bases("mistral"), method)
    train_steps(model, 2)
    measured = check_isolation(model, VOCABULARY, "fp32")
    assert measured.swapped <= 1e-6
    assert measured.alone < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_mode_gradients_and_random_numbers_as_they_were(bases, training):
    model = build(bases()).train(training)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    measure_isolation(model, VOCABULARY, "fp32")
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.rand(3), expected)


def test_dropout_is_off_while_isolation_is_measured(tmp_path):
    """GPT-2 has dropout of its own: 0.1."""
    model = build(write_model_config(tmp_path, "gpt2")).train()
    assert measure_isolation(model, VOCABULARY, "fp32").swapped == 0.0


# full


@every_architecture
def test_full_trains_every_parameter_in_fp32(bases, architecture):
    model = build(bases(architecture), precision="bf16")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_base_saved_in_bf16_becomes_fp32_masters_of_the_same_values(bases, tmp_path):
    saved = build(bases()).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    loaded = build(tmp_path, precision="bf16")
    expected = {name: parameter.float() for name, parameter in saved.named_parameters()}
    assert_equal(dict(loaded.named_parameters()), expected)


# lora


@every_architecture
def test_lora_trains_adapters_in_fp32_and_nothing_else(bases, architecture):
    model = build(bases(architecture), "lora", "bf16")
    trained = trained_parameters(model)
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [p for name, p in model.named_parameters() if name not in trained]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


@every_architecture
def test_lora_starts_equal_to_its_base(bases, architecture):
    row = draw_row()
    base, model = build(bases(architecture)), build(bases(architecture), "lora")
    assert torch.equal(logits_of(model, row), logits_of(base, row))


@every_architecture
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_adapter_has_moved_after_two_steps(bases, architecture, checkpointing):
    model = build(bases(architecture), "lora", gradient_checkpointing=checkpointing)
    before = copy_of(trained_parameters(model))
    train_steps(model, 2)
    assert names_of_unmoved(model, before) == []


@every_architecture
def test_every_linear_layer_but_the_head_has_an_adapter(bases, architecture):
    model = build(bases(architecture), "lora")
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    base = build(bases(architecture))
    linear = {name.split(".")[-1] for name, m in base.named_modules() if isinstance(m, kinds)}
    assert layers_with_adapters(model) == linear - {"lm_head"}


def test_training_adapters_leaves_the_base_alone(bases):
    model = build(bases(), "lora")
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = copy_of(frozen)
    train_steps(model, 2)
    assert_equal(frozen, before)
    assert all(parameter.grad is None for parameter in frozen.values())


def test_layers_get_adapters_by_name(bases):
    model = build(bases(), "lora", lora_target_modules=("q_proj", "v_proj"))
    assert layers_with_adapters(model) == {"q_proj", "v_proj"}


def test_an_adapter_has_the_rank_of_the_config(bases):
    model = build(bases(), "lora", lora_rank=3, lora_target_modules=("q_proj",))
    shapes = {tuple(parameter.shape) for parameter in trained_parameters(model).values()}
    assert shapes == {(3, 32), (32, 3)}


def test_dropout_stands_before_each_adapter_in_training_alone(bases):
    model = build(bases(), "lora", lora_dropout=0.25)
    rates = {m.p for name, m in model.named_modules() if name.endswith("lora_dropout.default")}
    assert rates == {0.25}
    train_steps(model, 1)
    torch.manual_seed(1)
    dropped = compute_logits(model.train(), draw_row())
    kept = [logits_of(model, draw_row()) for _ in range(2)]
    assert torch.equal(*kept)
    assert not torch.equal(dropped, kept[0])


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 8.0)])
def test_adapters_are_scaled_by_alpha_over_rank_or_over_its_root(bases, use_rslora, scale):
    """alpha 32 and rank 16: 32 / 16, or 32 / 4."""
    model = build(bases(), "lora", use_rslora=use_rslora, lora_rank=16, lora_alpha=32).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    up.data.normal_()
    x = torch.randn(5, 32)
    added = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(added, scale * x @ down.T @ up.T, rtol=1e-4, atol=1e-4)


@both_adapters
def test_dora_trains_magnitudes_in_fp32_and_all_of_it_moves(bases, method):
    model = build(bases(), method, use_dora=True, gradient_checkpointing=True)
    trained = trained_parameters(model)
    magnitudes = [name for name in trained if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 14, "seven layers in each of two blocks"
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    before = copy_of(trained)
    train_steps(model, 2)
    assert names_of_unmoved(model, before) == []


@both_adapters
def test_dora_starts_equal_to_its_base(bases, method):
    """But for rounding: it takes the weights apart and puts them together again."""
    model, row = build(bases(), method, use_dora=True), draw_row()
    with model.disable_adapter():
        expected = logits_of(model, row)
    limit = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits_of(model, row), expected, rtol=0, atol=limit)


def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(bases):
    with pytest.raises(ConfigError, match=r"lora_target_modules: .*w_pack") as error:
        build(bases(), "lora", lora_target_modules=("w_pack",))
    for layer in ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"):
        assert layer in str(error.value)


def test_a_layer_that_does_not_exist_is_refused_beside_one_that_does(bases):
    with pytest.raises(ConfigError, match=r"lora_target_modules: .*w_pack"):
        build(bases(), "lora", lora_target_modules=("q_proj", "w_pack"))


def test_a_layer_that_can_have_no_adapter_is_refused(bases):
    with pytest.raises(ConfigError, match="lora_target_modules: input_layernorm"):
        build(bases(), "lora", lora_target_modules=("input_layernorm",))


# modules_to_save


@both_adapters
def test_layers_trained_whole_are_fp32_though_the_base_is_bf16(bases, method):
    model = build(bases(), method, "bf16", modules_to_save=("lm_head",))
    saved = [p for name, p in trained_parameters(model).items() if "modules_to_save" in name]
    assert [parameter.dtype for parameter in saved] == [torch.float32]
    head = model.base_model.model.lm_head
    assert head.original_module.weight.dtype == torch.bfloat16
    assert not head.original_module.weight.requires_grad


def test_layers_trained_whole_get_a_gradient_under_autocast(bases):
    model = build(bases(), "lora", "bf16", modules_to_save=("lm_head",))
    row = cut(draw_row(), slice(5))
    with torch.autocast("cpu", torch.bfloat16):
        next_token_loss(model, row).backward()
    gradient = model.base_model.model.lm_head.modules_to_save["default"].weight.grad
    assert gradient.dtype == torch.float32
    assert (gradient != 0).any()


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "norm"])
def test_layers_trained_whole_pass_the_isolation_check_with_a_bf16_base(bases, layer):
    """As in every run with bf16: before accelerate wraps the model in autocast."""
    model = build(
        bases(), "lora", "bf16", modules_to_save=(layer,), lora_target_modules=("q_proj",)
    )
    check_isolation(model, VOCABULARY, "bf16")


@both_adapters
def test_layers_trained_whole_move(bases, method):
    model = build(bases(), method, modules_to_save=("lm_head", "embed_tokens"))
    before = copy_of(trained_parameters(model))
    assert len([name for name in before if "modules_to_save" in name]) == 2
    train_steps(model, 2)
    assert names_of_unmoved(model, before) == []


@both_adapters
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_tied_embeddings_are_not_torn_apart(bases, method, layer):
    with pytest.raises(ConfigError, match=r"modules_to_save: .*ties its input and output"):
        build(bases(tie_word_embeddings=True), method, modules_to_save=(layer,))


@both_adapters
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_tied_embedding_gets_no_adapter_of_its_own(bases, method, layer):
    """Merged, it would change both ends of the model; trained, it changed one."""
    with pytest.raises(ConfigError, match=r"lora_target_modules: .*ties its input and output"):
        build(bases(tie_word_embeddings=True), method, lora_target_modules=(layer,))


def test_other_layers_of_a_tied_model_can_be_trained_whole(bases):
    model = build(bases(tie_word_embeddings=True), "lora", modules_to_save=("norm",))
    assert any("norm.modules_to_save" in name for name in trained_parameters(model))


def test_a_layer_to_be_trained_whole_that_does_not_exist_is_refused(bases):
    with pytest.raises(ConfigError, match=r"modules_to_save: .*w_head"):
        build(bases(), "lora", modules_to_save=("w_head",))


def test_a_4_bit_layer_cannot_be_trained_whole_and_that_is_said(bases):
    with pytest.raises(ConfigError, match=r"modules_to_save: .*gate_proj"):
        build(bases(), "qlora", modules_to_save=("gate_proj",))


# qlora


@every_architecture
def test_qlora_holds_the_linear_layers_of_the_base_in_4_bits(bases, architecture):
    model = build(bases(architecture), "qlora")
    packed = {
        name.split(".")[-3]: parameter
        for name, parameter in model.named_parameters()
        if type(parameter).__name__ == "Params4bit"
    }
    assert set(packed) == layers_with_adapters(model)
    for parameter in packed.values():
        assert parameter.dtype == torch.uint8
        assert parameter.quant_state.quant_type == "nf4"
        assert parameter.quant_state.nested, "quantised twice"
        assert not parameter.requires_grad


@every_architecture
def test_qlora_trains_adapters_in_fp32_and_nothing_else(bases, architecture):
    trained = trained_parameters(build(bases(architecture), "qlora", "bf16"))
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_qlora_computes_in_the_precision_of_the_run(bases, precision):
    model = build(bases(), "qlora", precision)
    types = {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")}
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_4_bits_keep_a_weight_to_about_a_tenth(bases):
    """Sixteen values for each block of 64 weights."""
    weight = build(bases()).model.layers[0].mlp.up_proj.weight
    packed = build(bases(), "qlora").base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    unpacked = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    assert 0.03 < (unpacked - weight).norm() / weight.norm() < 0.2


@every_architecture
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_qlora_learns_after_an_evaluation_as_it_would_have_before(bases, architecture, keys):
    """bitsandbytes repacks 4-bit weights in a forward pass without gradients, and then passes none.

    It does so on CPUs with AVX512-BF16 alone: on others this holds by itself.
    """
    trained = []
    for with_evaluation in (True, False):
        model = build(bases(architecture), "qlora", **keys)
        if with_evaluation:
            model.eval()
            with torch.no_grad():
                predict(model, draw_row(rows=2))
        before = copy_of(trained_parameters(model))
        torch.manual_seed(1)
        train_steps(model, 2)
        assert names_of_unmoved(model, before) == []
        trained.append(copy_of(trained_parameters(model)))
    assert_equal(*trained)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_qlora_moves_every_adapter_with_an_evaluation_between_its_steps(bases, checkpointing):
    model = build(bases(), "qlora", gradient_checkpointing=checkpointing)
    train_steps(model, 1)
    check_isolation(model, VOCABULARY, "fp32")
    model.eval()
    with torch.no_grad():
        predict(model, draw_row())
    before = copy_of(trained_parameters(model))
    train_steps(model, 1)
    assert names_of_unmoved(model, before) == []


# From a checkpoint


def test_full_goes_on_from_a_checkpoint_bit_by_bit(bases, tmp_path):
    model = build(bases())
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    restored = build(bases(), checkpoint=tmp_path, seed=1)
    assert_equal(trained_parameters(restored), trained_parameters(model))


def test_a_model_from_random_weights_goes_on_from_a_checkpoint(tmp_path):
    file = write_model_config(tmp_path / "config")
    model = build(file)
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "saved")
    restored = build(file, checkpoint=tmp_path / "saved", seed=1)
    assert_equal(trained_parameters(restored), trained_parameters(model))


@both_adapters
@pytest.mark.parametrize(
    "keys",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ("lm_head",)}],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)
def test_adapters_go_on_from_a_checkpoint_bit_by_bit(bases, tmp_path, method, keys):
    model = build(bases(), method, **keys)
    train_steps(model, 2)
    restored = build(bases(), method, checkpoint=save_adapters(model, tmp_path), seed=1, **keys)
    assert_equal(trained_parameters(restored), trained_parameters(model))
    row = draw_row()
    assert torch.equal(logits_of(restored, row), logits_of(model, row))


@both_adapters
@pytest.mark.parametrize("keys", [{}, {"modules_to_save": ("lm_head",)}], ids=["lora", "whole"])
def test_fp32_masters_beside_a_bf16_base_lose_no_bit_in_a_checkpoint(bases, tmp_path, method, keys):
    model = build(bases(), method, "bf16", **keys)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.data.normal_(generator=generator)
    restored = build(bases(), method, "bf16", checkpoint=save_adapters(model, tmp_path), **keys)
    assert_equal(trained_parameters(restored), trained_parameters(model))


@every_method
def test_a_restored_model_learns_on_like_the_one_that_was_saved(bases, tmp_path, method):
    model = build(bases(), method, gradient_checkpointing=True)
    train_steps(model, 2)
    save = save_adapters if method != "full" else lambda model, to: model.save_pretrained(to)
    save(model, tmp_path)
    restored = build(bases(), method, checkpoint=tmp_path, gradient_checkpointing=True)
    for each in (model, restored):
        torch.manual_seed(1)
        train_steps(each, 2)
    assert_equal(trained_parameters(restored), trained_parameters(model))


def test_a_checkpoint_that_lacks_a_weight_is_refused(bases, tmp_path):
    build(bases()).save_pretrained(tmp_path)
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first lm_head\.weight"):
        build(bases(), checkpoint=tmp_path)


def test_a_checkpoint_that_lacks_an_adapter_is_refused(bases, tmp_path):
    save_adapters(build(bases(), "lora"), tmp_path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    change_tensors(tmp_path / "adapter_model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        build(bases(), "lora", checkpoint=tmp_path)


def test_a_checkpoint_with_an_adapter_of_another_shape_is_refused(bases, tmp_path):
    save_adapters(build(bases(), "lora"), tmp_path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(63, 16)

    change_tensors(tmp_path / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        build(bases(), "lora", checkpoint=tmp_path)


def test_a_checkpoint_with_an_adapter_that_the_model_has_not_is_refused(bases, tmp_path):
    save_adapters(build(bases(), "lora"), tmp_path)
    with pytest.raises(CheckpointError, match="holds 24 that the model has not"):
        build(bases(), "lora", checkpoint=tmp_path, lora_target_modules=("q_proj",))


@pytest.mark.parametrize(("method", "file"), [("full", "model"), ("lora", "adapter_model")])
def test_a_checkpoint_whose_file_was_cut_is_refused(bases, tmp_path, method, file):
    model = build(bases(), method)
    model.save_pretrained(tmp_path)
    weights = tmp_path / f"{file}.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=tmp_path.name):
        build(bases(), method, checkpoint=tmp_path)


def test_an_adapter_that_is_pickled_is_refused(bases, tmp_path):
    save_adapters(build(bases(), "lora"), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=tmp_path.name):
        build(bases(), "lora", checkpoint=tmp_path)


@every_method
def test_a_checkpoint_that_is_not_there_is_refused(bases, tmp_path, method):
    with pytest.raises(CheckpointError, match="checkpoint-7"):
        build(bases(), method, checkpoint=tmp_path / "checkpoint-7")


# Seeds


@every_architecture
def test_a_seed_decides_the_weights_of_a_new_model(tmp_path, architecture):
    file = write_model_config(tmp_path, architecture)
    one, same, other = build(file, seed=3), build(file, seed=3), build(file, seed=4)
    assert_equal(dict(one.named_parameters()), dict(same.named_parameters()))
    embeddings = [model.get_input_embeddings().weight for model in (one, other)]
    assert not torch.equal(*embeddings)


@both_adapters
def test_a_seed_decides_the_adapters(bases, method):
    one, same, other = (trained_parameters(build(bases(), method, seed=s)) for s in (3, 3, 4))
    assert_equal(one, same)
    drawn = [name for name in one if "lora_A" in name]
    assert len(drawn) == 14
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_new_weights_do_not_depend_on_what_was_drawn_before(tmp_path):
    file = write_model_config(tmp_path)
    torch.manual_seed(1)
    one = build(file)
    torch.rand(7)
    assert_equal(dict(one.named_parameters()), dict(build(file).named_parameters()))


# What is refused, and how it is said


@every_method
def test_a_name_that_is_nowhere_is_refused(method):
    """HF_HUB_OFFLINE is set: nothing is asked."""
    with pytest.raises(ConfigError, match=r"model_name: no model .* nobody/nothing .*on the hub"):
        build("nobody/nothing", method)


@every_method
def test_a_folder_that_is_nowhere_is_refused(tmp_path, method):
    with pytest.raises(ConfigError, match=r"model_name: no model .*/nowhere .no folder here"):
        build(tmp_path / "nowhere", method)


def test_a_model_config_file_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_config_file: .*nowhere\.json"):
        build(tmp_path / "nowhere.json")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_name: .*a folder here"):
        build(tmp_path)


@every_method
def test_a_model_that_is_pickled_is_refused(bases, tmp_path, method):
    shutil.copytree(bases(), tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    torch.save(load_file(weights), tmp_path / "base/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"no file named model\.safetensors"):
        build(tmp_path / "base", method)


@every_method
def test_an_adapter_is_no_base(bases, tmp_path, method):
    """Transformers would load it into its own base, with every weight of both frozen."""
    save_adapters(build(bases(), "lora"), tmp_path)
    with pytest.raises(ConfigError, match=r"model_name: .*adapter"):
        build(tmp_path, method)


@every_method
def test_a_model_that_lacks_a_weight_is_refused(spoil, method):
    name = "model.layers.1.mlp.up_proj.weight"
    base = spoil(lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError, match=f"model_name: .*1 weights are missing.*{name}"):
        build(base, method)


@every_method
def test_a_model_with_a_weight_of_another_shape_is_refused(spoil, method):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(63, 32)

    with pytest.raises(ConfigError, match="model_name: "):
        build(spoil(change), method)


@every_method
def test_a_model_whose_file_was_cut_is_refused(bases, tmp_path, method):
    shutil.copytree(bases(), tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match="model_name: "):
        build(tmp_path / "base", method)


def test_a_config_with_a_value_of_another_type_is_refused(tmp_path):
    file = write_model_config(tmp_path, hidden_size="many")
    with pytest.raises(ConfigError, match=r"model_config_file: .*hidden_size"):
        build(file)


def test_a_config_of_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_config_file: .*nonsense"):
        build(write_model_config(tmp_path, "nonsense"))


def test_an_encoder_without_a_language_head_is_refused_in_a_line(tmp_path):
    """Transformers' own message lists every class that it knows: 3,000 characters."""
    with pytest.raises(ConfigError, match=r"model_config_file: .*distilbert") as error:
        build(write_model_config(tmp_path, "distilbert"))
    assert len(str(error.value)) < 600


def test_a_saved_encoder_is_refused(tmp_path):
    file = write_model_config(tmp_path / "config", "bert")
    config = transformers.AutoConfig.from_pretrained(file)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"missing.*is it a causal language model"):
        build(tmp_path / "bert")


def test_a_bert_that_predicts_masked_words_is_refused(tmp_path):
    """It loads, since transformers can make a decoder of it; its documents see each other."""
    file = write_model_config(tmp_path / "config", "bert", initializer_range=0.2)
    config = transformers.AutoConfig.from_pretrained(file)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="bert"):
        check_isolation(build(tmp_path / "bert"), VOCABULARY, "fp32")


def test_attention_code_that_is_not_installed_is_refused(bases, tmp_path):
    file = write_model_config(tmp_path)
    with pytest.raises(ConfigError, match="FlashAttention2"):
        build(bases(), attention="flash_attention_2")
    with pytest.raises(ConfigError, match="FlashAttention2"):
        build(file, attention="flash_attention_2")


# Tokenizer and sizes


def test_a_tokenizer_that_is_nowhere_is_refused_under_its_own_key(tmp_path):
    with pytest.raises(ConfigError, match=r"^tokenizer_name: no tokenizer .*nowhere"):
        load_tokenizer(ModelConfig(tokenizer_name=str(tmp_path / "nowhere")))


def test_a_tokenizer_taken_from_the_model_is_refused_under_the_models_key():
    with pytest.raises(ConfigError, match=r"^model_name: no tokenizer .*nobody/nothing"):
        load_tokenizer(ModelConfig(model_name="nobody/nothing"))


@every_architecture
def test_a_folder_with_a_model_and_no_tokenizer_is_refused(bases, architecture):
    """Transformers makes one up for some kinds of model: its vocabulary is empty."""
    with pytest.raises(ConfigError, match=r"^model_name: no tokenizer"):
        load_tokenizer(ModelConfig(model_name=str(bases(architecture))))


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer_dir, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no end-of-text token.*set eos_token"):
        load_tokenizer(ModelConfig(tokenizer_name=str(tmp_path)))


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(tmp_path):
    config = load_model_config(ModelConfig(model_config_file=write_model_config(tmp_path)))
    with pytest.raises(ConfigError, match=r"tokenizer_name: .* 1024\D.*embedding.* 1024 rows"):
        check_sizes(config, vocabulary_size=1025, max_seq_length=64)


@every_architecture
def test_blocks_longer_than_the_models_context_are_refused(tmp_path, architecture):
    file = write_model_config(tmp_path, architecture)
    config = load_model_config(ModelConfig(model_config_file=file))
    with pytest.raises(ConfigError, match=r"max_seq_length: must be at most 512.*got 513"):
        check_sizes(config, vocabulary_size=1024, max_seq_length=513)


@every_architecture
def test_sizes_that_just_fit_are_taken(tmp_path, architecture):
    file = write_model_config(tmp_path, architecture)
    config = load_model_config(ModelConfig(model_config_file=file))
    check_sizes(config, vocabulary_size=1024, max_seq_length=512)


# Fingerprints


@both_adapters
def test_the_same_base_has_the_same_fingerprint(bases, method):
    one, other = build(bases(), method, seed=1), build(bases(), method, seed=2)
    assert fingerprint_weights(one) == fingerprint_weights(other)


@both_adapters
def test_another_base_has_another_fingerprint(bases, method):
    one, other = build(bases(), method), build(bases(seed=1), method)
    assert fingerprint_weights(one) != fingerprint_weights(other)


@both_adapters
def test_a_fine_tuned_base_has_another_fingerprint(bases, tmp_path, method):
    tuned = build(bases())
    train_steps(tuned, 1)
    tuned.save_pretrained(tmp_path)
    one, other = build(bases(), method), build(tmp_path, method)
    assert fingerprint_weights(one) != fingerprint_weights(other)


@both_adapters
def test_training_does_not_change_the_fingerprint(bases, method):
    model = build(bases(), method, modules_to_save=("lm_head",))
    before = fingerprint_weights(model)
    train_steps(model, 2)
    assert fingerprint_weights(model) == before


@both_adapters
@pytest.mark.parametrize("layers", [(), ("lm_head",)], ids=["lora", "modules_to_save"])
def test_a_restored_model_has_the_fingerprint_of_the_saved_one(bases, tmp_path, method, layers):
    model = build(bases(), method, modules_to_save=layers)
    train_steps(model, 1)
    checkpoint = save_adapters(model, tmp_path)
    restored = build(bases(), method, checkpoint=checkpoint, modules_to_save=layers)
    assert fingerprint_weights(restored) == fingerprint_weights(model)


def test_where_nothing_is_frozen_all_models_have_one_fingerprint(bases):
    fingerprints = {fingerprint_weights(build(bases(seed=seed))) for seed in (0, 1)}
    assert len(fingerprints) == 1


# Precision and counts


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


def test_parameters_are_counted_by_hand(bases):
    """Qwen2 of width 32: embedding and head, two blocks, the last norm."""
    attention = 2 * (32 * 32) + 2 * (32 * 16) + 32 + 16 + 16  # q and o, k and v, biases of q, k, v
    block = attention + 3 * (32 * 64) + 2 * 32
    expected = 2 * (1024 * 32) + 2 * block + 32
    assert count_parameters(build(bases())) == (expected, expected)


def test_a_weight_shared_by_two_layers_is_counted_once(bases):
    untied, tied = (
        count_parameters(build(bases(tie_word_embeddings=tied)))[0] for tied in (False, True)
    )
    assert untied - tied == 1024 * 32


@every_architecture
def test_a_4_bit_parameter_counts_as_one_whole(bases, architecture):
    lora, qlora = (build(bases(architecture), method) for method in ("lora", "qlora"))
    assert count_parameters(qlora) == count_parameters(lora)


def test_adapters_are_counted_beside_the_base(bases):
    """Rank 4 on q_proj (32 to 32) and k_proj (32 to 16), in two blocks."""
    base, _ = count_parameters(build(bases()))
    model = build(bases(), "lora", lora_rank=4, lora_target_modules=("q_proj", "k_proj"))
    adapters = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert count_parameters(model) == (base + adapters, adapters)


@pytest.mark.parametrize("max_seq_length", [128, 129])
def test_rotary_positions_that_depend_on_the_neighbours_are_refused(max_seq_length):
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        },
    )
    if max_seq_length <= 128:
        check_sizes(config, VOCABULARY, max_seq_length)
    else:
        with pytest.raises(ConfigError, match=r"at most 128, .*dynamic.*got 129"):
            check_sizes(config, VOCABULARY, max_seq_length)


def test_a_4_bit_base_with_other_scales_has_another_fingerprint(bases):
    model = build(bases(), "qlora")
    before = fingerprint_weights(model)
    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.state2.absmax.mul_(2)
    assert fingerprint_weights(model) != before
