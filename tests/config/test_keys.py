"""The keys: their defaults and descriptions, and the changes that make another run."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from qloop.config.keys import (
    FOLDER_OR_NAME_KEYS,
    KEYS,
    MAY_CHANGE,
    PATH_KEYS,
    Config,
    dump_config,
    find_changes,
    iterate_keys,
    to_absolute,
)
from qloop.config.loading import load_config


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load_flags(**flags: str) -> Config:
    return load_config(None, flags).config


def value_of(config: Config, name: str) -> object:
    return getattr(getattr(config, KEYS[name].section), name)


# The config itself


@pytest.mark.parametrize("section", Config.model_fields)
def test_a_config_cannot_be_changed(section):
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, section, None)
    part = getattr(config, section)
    for name in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, None)


def test_names_of_keys_are_unique_over_all_sections():
    names = [key.name for key in iterate_keys()]
    assert len(names) == len(set(names))
    assert set(names) & set(Config.model_fields) == {"optimizer"}, "told apart by their values"


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_key_has_a_description_of_one_line(key):
    lines = (key.field.description or "").splitlines()
    assert len(lines) == 1, f"give {key.name} a description of one line in keys.py"


def test_every_key_of_a_path_is_known_as_one():
    """So that relative paths in files and in written configs are handled."""
    assert {name for name, key in KEYS.items() if "Path" in str(key.field.annotation)} == PATH_KEYS
    assert KEYS.keys() >= FOLDER_OR_NAME_KEYS


def test_defaults_are_those_of_the_seed():
    seed = {
        "max_seq_length": 2048,
        "learning_rate": 2e-5,
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "warmup_steps": 100,
        "save_steps": 50,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "model_name": "Qwen/Qwen2.5-7B-Instruct",
        "gradient_checkpointing": "auto",  # there: on; here: as much as memory requires
        "output_dir": Path("output"),
    }
    assert {name: value_of(Config(), name) for name in seed} == seed


# What makes another run


def test_changed_keys_are_shown_with_both_values():
    before = load_flags(learning_rate="2e-5", model_name="a/b")
    after = load_flags(learning_rate="1e-4", model_name="c/d", num_epochs="2")
    assert find_changes(before, after) == [
        'model_name: "a/b" -> "c/d"',
        "learning_rate: 2e-05 -> 0.0001",
    ]


def test_a_run_does_not_differ_from_itself():
    assert find_changes(load_flags(seed="7"), load_flags(seed="7")) == []


def test_keys_that_may_change_make_no_other_run():
    changed = {
        "experiment_name": "b",
        "output_dir": "elsewhere",
        "resume": "never",
        "cache_dir": "cache",
        "max_steps": "500",
        "num_epochs": "2",
        "eval_steps": "7",
        "eval_batch_size": "7",
        "num_samples": "7",
        "sample_tokens": "7",
        "save_steps": "7",
        "keep_checkpoints": "7",
        "keep_every": "14",
        "keep_best": "false",
        "async_checkpoint": "false",
        "max_failed_saves": "7",
        "share_above_gb": "7",
        "allow_change": "corpus",
        "log_steps": "7",
        "wandb": "true",
        "wandb_project": "b",
        "tensorboard": "true",
        "loss": "logits",
        "gradient_checkpointing": "full",
        "offload_activations": "true",
    }
    untested = MAY_CHANGE ^ changed.keys()
    assert not untested, f"give this test another value of {untested}, or delete theirs"
    after = load_flags(**changed)
    assert all(value_of(after, name) != value_of(Config(), name) for name in changed)
    assert find_changes(Config(), after) == []


def test_a_key_that_is_allowed_to_change_makes_no_other_run():
    before, after = load_flags(seed="7"), load_flags(seed="8", allow_change="seed")
    assert find_changes(before, after) == []
    assert find_changes(after, before) == ["seed: 8 -> 7"]


# Paths


COMPANIONS = {"model_config_file": {"tokenizer_name": "owner/name"}}

path_keys = pytest.mark.parametrize("key", sorted(PATH_KEYS | FOLDER_OR_NAME_KEYS))


def load_path(key: str, path: str) -> Config:
    return load_flags(**{key: path, **COMPANIONS.get(key, {})})


@path_keys
def test_a_path_is_dumped_as_an_absolute_one(key, tmp_path):
    (tmp_path / "folder").mkdir()
    dumped = dump_config(load_path(key, "./folder"))
    assert dumped[KEYS[key].section][key] == str(tmp_path / "folder")


@path_keys
def test_the_absolute_path_of_a_relative_one_makes_no_other_run(key, tmp_path):
    (tmp_path / "folder").mkdir()
    relative, absolute = load_path(key, "folder"), load_path(key, str(tmp_path / "folder"))
    assert find_changes(relative, absolute) == find_changes(absolute, relative) == []


@pytest.mark.parametrize("key", sorted((PATH_KEYS | FOLDER_OR_NAME_KEYS) - MAY_CHANGE))
def test_another_path_makes_another_run(key, tmp_path):
    (tmp_path / "folder").mkdir()
    changes = find_changes(load_path(key, "folder"), load_path(key, str(tmp_path / "other")))
    assert changes == [f'{key}: "folder" -> "{tmp_path / "other"}"']


def test_the_name_of_a_model_on_the_hub_is_no_path(tmp_path):
    assert to_absolute("model_name", "owner/name") == "owner/name"
    (tmp_path / "owner/name").mkdir(parents=True)
    assert to_absolute("model_name", "owner/name") == str(tmp_path / "owner/name")


@pytest.mark.parametrize("word", ["auto", "never", "restart"])
def test_a_word_of_resume_is_no_path(word, tmp_path):
    (tmp_path / word).mkdir()
    assert to_absolute("resume", word) == word
