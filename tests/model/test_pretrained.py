"""What a user names: loaded, or refused with a message that names it."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import VOCABULARY, build, every_architecture, every_method, save_adapters
from workspace import write_model_config

from qloop.config.keys import ModelConfig
from qloop.errors import ConfigError
from qloop.model.pretrained import check_sizes, load_model_config, load_tokenizer

# The model


@every_method
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", r"nobody/nothing .*on the hub"),  # HF_HUB_OFFLINE is set: no request
        ("/nowhere/at/all", r"/nowhere/at/all .no folder here"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(method, name, message):
    with pytest.raises(ConfigError, match=rf"model_name: no model .*{message}"):
        build(name, method)


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
@pytest.mark.parametrize("shape", [None, (63, 32)])
def test_a_model_with_a_weight_missing_or_of_another_shape_is_refused(spoil, method, shape):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        if shape:
            tensors[name] = torch.zeros(shape)

    with pytest.raises(ConfigError, match=r"model_name: .*1 weights are missing.*up_proj"):
        build(spoil(change), method)


@every_method
def test_a_model_whose_file_was_cut_is_refused(bases, tmp_path, method):
    shutil.copytree(bases(), tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match="model_name: "):
        build(tmp_path / "base", method)


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"hidden_size": "many"}, "hidden_size"), ({"model_type": "nonsense"}, "nonsense")],
)
def test_a_config_with_a_wrong_value_is_refused_by_name(tmp_path, keys, named):
    with pytest.raises(ConfigError, match=rf"model_config_file: .*{named}"):
        build(write_model_config(tmp_path, **keys))


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


@pytest.mark.skipif(
    transformers.utils.is_flash_attn_2_available(), reason="it is installed, and there is a GPU"
)
@pytest.mark.parametrize("from_file", [True, False])
def test_flash_attention_that_is_not_here_is_told_under_its_key(bases, from_file):
    source = bases() / "config.json" if from_file else bases()
    with pytest.raises(ConfigError, match=r"^attention: FlashAttention2 .*; use auto$"):
        build(source, attention="flash_attention_2")


# Tokenizer and sizes


@pytest.mark.parametrize("key", ["tokenizer_name", "model_name"])
def test_a_tokenizer_that_is_nowhere_is_refused_under_the_key_that_names_it(key):
    with pytest.raises(ConfigError, match=rf"^{key}: no tokenizer .*nobody/nothing"):
        load_tokenizer(ModelConfig(**{key: "nobody/nothing"}))


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
