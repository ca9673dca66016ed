"""Gradient checkpointing: the same numbers, from less memory."""

from collections import Counter

import bitsandbytes  # noqa: F401  (registers its operators)
import pytest
import torch
from references import next_token_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from workspace import write_model_config

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import MicroBatch
from qloop.errors import ConfigError
from qloop.model.activations import choose_policy, find_layers, set_recomputation
from qloop.model.attention import attention_inputs
from qloop.model.build import build_model

CPU = torch.device("cpu")
MODES = ("off", "selective", "full")
every_method = pytest.mark.parametrize("method", ["full", "lora", "qlora"])
both_attentions = pytest.mark.parametrize("attention", ["documents", "sdpa"])


def build(folder, method="full", mode="off", offload=False, attention="documents"):
    file = write_model_config(folder / "config", initializer_range=0.2)
    plain = ModelConfig(model_config_file=file)
    if not (folder / "base").exists():
        base = build_model(plain, LoraConfig(), "fp32", CPU, seed=0)
        base.save_pretrained(folder / "base")
    config = ModelConfig(model_name=str(folder / "base"), training_method=method)
    model = build_model(config, LoraConfig(lora_dropout=0.3), "fp32", CPU, seed=0)
    model.set_attn_implementation(attention)
    set_recomputation(model, mode, offload)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)  # at 0, nothing reaches lora_A
    return model.train()


def draw_row() -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1024, (2, 64), generator=generator)
    places = torch.cat([torch.arange(length) for length in (40, 4, 20)]).repeat(2, 1)
    return MicroBatch(ids, ids.roll(-1, dims=1), places)


def gradients_of(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    next_token_loss(model, draw_row()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all((gradient != 0).any() for gradient in trained.values())
    return trained


@every_method
@both_attentions
@pytest.mark.parametrize(
    ("mode", "offload"), [("selective", False), ("full", False), ("full", True)]
)
def test_no_mode_changes_a_bit_of_a_gradient(tmp_path, method, mode, offload, attention):
    """Dropout of 0.3 draws the same again."""
    expected = gradients_of(build(tmp_path, method, attention=attention))
    got = gradients_of(build(tmp_path, method, mode, offload, attention))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@every_method
@pytest.mark.parametrize(("mode", "passes"), [("off", 1), ("selective", 2), ("full", 2)])
def test_layers_run_as_often_as_the_mode_says(tmp_path, method, mode, passes):
    model, calls = build(tmp_path, method, mode), []
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    next_token_loss(model, draw_row()).backward()
    assert sorted(Counter(calls).values()) == [passes, passes]


class CountProducts(TorchDispatchMode):
    """Counts what is dear in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name().partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def count_products(model) -> tuple[int, int]:
    with CountProducts() as count:
        gradients_of(model)
    products = count.calls["aten::mm"] + count.calls["aten::addmm"]
    return products, count.calls["qloop::attend"]


def test_selective_multiplies_no_matrix_twice_and_full_all_of_a_layers(tmp_path):
    off, selective, full = (count_products(build(tmp_path, mode=mode)) for mode in MODES)
    assert selective == off
    layers, products_of_a_layer = 2, 6  # of 7: the last one's result is asked for by nobody
    assert full == (off[0] + layers * products_of_a_layer, off[1] + layers)


def test_selective_computes_an_adapters_wide_product_again_and_keeps_a_layers_own():
    def is_kept(operator, *shapes) -> bool:
        inputs = [torch.empty(shape, device="meta") for shape in shapes]
        return choose_policy(operator, inputs) == CheckpointPolicy.MUST_SAVE

    mm, addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    assert is_kept(mm, (5, 512), (512, 2048))
    assert is_kept(addmm, (2048,), (5, 512), (512, 2048))
    assert is_kept(mm, (5, 512), (512, 16))
    assert not is_kept(mm, (5, 16), (16, 512))
    assert not is_kept(torch.ops.aten.mul.Tensor, (5, 512), (5, 512))
    assert is_kept(torch.ops.qloop.attend.default)
    assert is_kept(torch.ops.bitsandbytes.gemm_4bit.default)


def test_each_mode_keeps_less_than_the_one_before(tmp_path):
    kept = [kept_bytes(build(tmp_path, mode=mode)) for mode in MODES]
    assert kept[0] > 1.3 * kept[1] > 1.3 * 1.3 * kept[2]


def kept_bytes(model) -> int:
    """Bytes alive between forward and backward of the layers, by storage."""
    storages = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = (storage._weak_ref(), storage.nbytes())
            return result

    row = draw_row()
    with Record():
        output = model.model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            **attention_inputs(model, row),
        )
    is_gone, forget = torch.UntypedStorage._expired, torch.UntypedStorage._free_weak_ref
    alive = sum(size for reference, size in storages.values() if not is_gone(reference))
    for reference, _ in storages.values():
        forget(reference)
    assert output.last_hidden_state.requires_grad
    return alive


def test_nothing_is_kept_or_run_twice_without_gradients(tmp_path):
    model, calls = build(tmp_path, mode="full").eval(), []
    find_layers(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        next_token_loss(model, draw_row())
    assert calls == [1]


def test_names_stay_as_they_are(tmp_path):
    plain, wrapped = build(tmp_path), build(tmp_path, mode="full")
    assert list(plain.state_dict()) == list(wrapped.state_dict())


def test_a_model_that_does_not_tell_its_layers_is_refused():
    with pytest.raises(ConfigError, match="gradient_checkpointing: full needs the model's layers"):
        set_recomputation(torch.nn.Linear(2, 2), "full")
    set_recomputation(torch.nn.Linear(2, 2), "off")
