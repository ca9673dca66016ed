"""Loading a config: what replaces what, what is refused, and with which message."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qloop.config.keys import FOLDER_OR_NAME_KEYS, KEYS, PATH_KEYS, Config, find_changes
from qloop.config.loading import LoadedConfig, describe_unused, dump_yaml, load_config
from qloop.errors import ConfigError
from qloop.run_directory import RunDirectory

# The block of the document that asked for qloop, to the letter.
SEED_YAML = """\
model:
  base_model: "Qwen/Qwen2.5-7B-Instruct"
  max_seq_length: 2048
  learning_rate: 2.0e-5
  batch_size: 1
  gradient_accumulation_steps: 8
  warmup_steps: 100
  max_steps: 1000
  save_steps: 50
\x20\x20
  # LoRA settings
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.1
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    """So that messages name `config.toml`, not a folder of this run."""
    monkeypatch.chdir(tmp_path)


def load(text: str, suffix: str = ".toml", **flags: str) -> LoadedConfig:
    file = Path(f"config{suffix}")
    file.write_text(text, encoding="utf-8")
    return load_config(file, flags)


def load_flags(**flags: str) -> Config:
    return load_config(None, flags).config


def refusal_of(text: str, suffix: str = ".toml", **flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, suffix, **flags)
    return str(caught.value)


def refusal_of_flags(**flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, flags)
    return str(caught.value)


def value_of(config: Config, name: str) -> object:
    return getattr(getattr(config, KEYS[name].section), name)


# Precedence


def test_without_file_and_flags_all_keys_have_their_defaults():
    assert load_config(None, {}) == (Config(), {})


def test_a_file_replaces_defaults_and_leaves_the_others():
    config = load("[schedule]\nlearning_rate = 3e-4\n").config
    assert config.schedule.learning_rate == 3e-4
    assert config.schedule.warmup_steps == 100


def test_a_flag_replaces_the_value_of_the_file():
    config = load("learning_rate = 3e-4\nbatch_size = 2\n", learning_rate="1e-5").config
    assert config.schedule.learning_rate == 1e-5
    assert config.batch.batch_size == 2


def test_a_flag_replaces_even_a_wrong_value_of_the_file():
    assert load("batch_size = 0\n", batch_size="4").config.batch.batch_size == 4


def test_it_is_known_where_each_key_was_typed():
    given_in = load("learning_rate = 3e-4\nbatch_size = 2\n", learning_rate="1e-5").given_in
    assert given_in == {"learning_rate": "command line", "batch_size": "config.toml"}


@pytest.mark.parametrize(
    "text",
    ["batch_size = 2", "[batch]\nbatch_size = 2", "[model]\nbatch_size = 2"],
    ids=["no section", "its section", "another section"],
)
def test_a_key_may_stand_under_any_section(text):
    assert load(text).config.batch.batch_size == 2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("lora_alpha", "64", 64.0),
        ("max_steps", "500", 500),
        ("wandb", "true", True),
        ("deduplicate", "false", False),
        ("experiment_name", "7", "7"),
        ("train_file", "corpus/a.jsonl", Path("corpus/a.jsonl")),
        ("packing", "wrapped", "wrapped"),
    ],
)
def test_a_flag_is_read_as_the_type_of_its_key(name, text, value):
    training_method = "lora" if name.startswith("lora_") else "full"
    config = load_flags(**{"training_method": training_method, name: text})
    assert value_of(config, name) == value
    assert type(value_of(config, name)) is type(value)


def test_a_flag_of_names_is_split_at_its_commas():
    config = load_flags(training_method="lora", lora_target_modules="q_proj,v_proj")
    assert config.lora.lora_target_modules == ("q_proj", "v_proj")


def test_a_flag_of_names_may_have_spaces_after_its_commas():
    config = load_flags(training_method="lora", lora_target_modules="q_proj, v_proj")
    assert config.lora.lora_target_modules == ("q_proj", "v_proj")


# Unknown names


def test_an_unknown_key_names_the_nearest():
    assert refusal_of("learning_rat = 1e-5") == (
        "config.toml: 1 problem\n  learning_rat: unknown key; did you mean learning_rate?"
    )


def test_an_unknown_flag_names_the_nearest():
    assert refusal_of_flags(learning_rat="1e-5") == (
        "command line: 1 problem\n  --learning_rat: unknown flag; did you mean --learning_rate?"
    )


def test_a_flag_with_hyphens_names_the_one_with_underscores():
    with pytest.raises(ConfigError, match=r"did you mean --learning_rate\?"):
        load_config(None, {"learning-rate": "1e-5"})


def test_a_name_that_resembles_no_key_leads_to_the_help():
    assert "zzzz: unknown key; see `qloop train --help`" in refusal_of("zzzz = 1")
    assert "--zzzz: unknown flag; see `qloop train --help`" in refusal_of_flags(zzzz="1")


def test_an_unknown_section_is_an_unknown_key():
    assert "scheduel: unknown key" in refusal_of("[scheduel]\nmax_steps = 500")


def test_a_section_that_is_a_value_is_an_unknown_key():
    assert "run: unknown key" in refusal_of("run = 3")


def test_the_nearest_flag_is_one_that_exists():
    """Files may say base_model; the command line knows model_name only."""
    text = refusal_of_flags(base_model="Qwen/Qwen2.5-1.5B")
    nearest = re.findall(r"did you mean --(\w+)\?", text)
    assert set(nearest) <= KEYS.keys()


# Wrong types


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('learning_rate = "high"', 'learning_rate: must be a number, got "high"'),
        ("max_steps = 500.5", "max_steps: must be a whole number, got 500.5"),
        ('max_steps = "500"', 'max_steps: must be a whole number, got "500"'),
        ("wandb = 1", "wandb: must be true or false, got 1"),
        ("experiment_name = 7", "experiment_name: must be text, got 7"),
        ("output_dir = 7", "output_dir: must be a path, got 7"),
        ('modules_to_save = "head"', 'modules_to_save: must be a list of names, got "head"'),
        ("modules_to_save = [7]", "modules_to_save: must be text, got 7"),
        ("learning_rate = inf", "learning_rate: must be a finite number, got inf"),
        ("learning_rate = nan", "learning_rate: must be a finite number, got nan"),
    ],
)
def test_a_wrong_type_in_toml_is_refused(line, problem):
    assert refusal_of(line) == f"config.toml: 1 problem\n  {problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("learning_rate: high", 'learning_rate: must be a number, got "high"'),
        ("max_steps: 500.5", "max_steps: must be a whole number, got 500.5"),
        ("max_steps: '500'", 'max_steps: must be a whole number, got "500"'),
        ("wandb: 1", "wandb: must be true or false, got 1"),
        ("experiment_name: 7", "experiment_name: must be text, got 7"),
        ("modules_to_save: head", 'modules_to_save: must be a list of names, got "head"'),
    ],
)
def test_a_wrong_type_in_yaml_is_refused(line, problem):
    assert refusal_of(line, ".yaml") == f"config.yaml: 1 problem\n  {problem}"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("learning_rate", "high", 'must be a number, got "high"'),
        ("learning_rate", "", "has no value; leave the flag out"),
        ("learning_rate", "inf", "must be a finite number, got inf"),
        ("max_steps", "500.5", 'must be a whole number, got "500.5"'),
        ("max_steps", "none", 'must be a whole number, got "none"'),
        ("wandb", "maybe", 'must be true or false, got "maybe"'),
    ],
)
def test_a_wrong_type_of_a_flag_is_refused(name, text, problem):
    assert refusal_of_flags(**{name: text}) == f"command line: 1 problem\n  {name}: {problem}"


# Limits and choices


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("batch_size = 0", "batch_size: must be above 0, got 0"),
        ("max_seq_length = 7", "max_seq_length: must be at least 8, got 7"),
        ("seed = 4294967296", "seed: must be below 4294967296, got 4294967296"),
    ],
)
def test_a_value_outside_its_limit_is_refused(line, problem):
    assert refusal_of(line) == f"config.toml: 1 problem\n  {problem}"


@pytest.mark.parametrize(
    "line", ["batch_size = 1", "max_seq_length = 8", "seed = 4294967295", "seed = 0"]
)
def test_a_value_at_its_limit_is_taken(line):
    name, value = line.split(" = ")
    assert value_of(load(line).config, name) == int(value)


def test_the_limit_of_a_number_is_written_as_a_person_would():
    assert "learning_rate: must be above 0, got -0.0003" in refusal_of("learning_rate = -0.0003")


@pytest.mark.parametrize("key", ["model_name", "train_file", "output_dir", "experiment_name"])
def test_an_empty_text_is_no_value(key):
    """An unset shell variable must not turn into the working directory."""
    refusal = f"{key}: has no value; leave the"
    assert f"{refusal} line out" in refusal_of(f'{key} = ""')
    assert f"{refusal} flag out" in refusal_of_flags(**{key: ""})


def test_a_list_that_must_have_content_may_not_be_empty():
    assert "lora_target_modules: must not be empty" in refusal_of("lora_target_modules = []")


def test_an_unknown_choice_lists_the_choices():
    assert refusal_of('training_method = "loar"') == (
        "config.toml: 1 problem\n"
        '  training_method: unknown value "loar"; choose full, lora or qlora'
    )


def test_an_unknown_choice_of_two_lists_both():
    assert 'packing: unknown value "worst"; choose best_fit or wrapped' in refusal_of_flags(
        packing="worst"
    )


def test_a_choice_that_may_be_a_boolean_lists_it():
    wanted = 'compile: unknown value "maybe"; choose auto, true or false'
    assert wanted in refusal_of_flags(compile="maybe")
    assert wanted in refusal_of('compile = "maybe"')


@pytest.mark.parametrize("data_type", ["a/b", "../filtered", "a b"])
def test_a_data_type_cannot_leave_its_folder(data_type):
    assert "data_type: must match" in refusal_of_flags(data_type=data_type)


# Several problems


def test_two_problems_of_a_file_come_in_one_message():
    text = '[model]\ntraining_method = "loar"\n[batch]\nbatch_size = -1\n'
    assert refusal_of(text) == (
        "config.toml: 2 problems\n"
        '  training_method: unknown value "loar"; choose full, lora or qlora\n'
        "  batch_size: must be above 0, got -1"
    )


def test_problems_of_file_and_command_line_come_in_one_message():
    assert refusal_of("learning_rat = 1e-5", packing="worst") == (
        "config.toml: 1 problem\n"
        "  learning_rat: unknown key; did you mean learning_rate?\n"
        "command line: 1 problem\n"
        '  packing: unknown value "worst"; choose best_fit or wrapped'
    )


def test_problems_are_grouped_by_where_they_are():
    text = "learning_rat = 1e-5\nsave_steps = 0\n[model]\nbatch_size = 0\n"
    lines = refusal_of(text, ".toml", seed="x", packing="worst").splitlines()
    groups = dict.fromkeys(line for line in lines if not line.startswith(" "))
    assert groups.keys() == {"config.toml: 3 problems", "command line: 2 problems"}
    start = lines.index("config.toml: 3 problems")
    assert sorted(lines[start + 1 : start + 4]) == [
        "  batch_size: must be above 0, got 0",
        "  learning_rat: unknown key; did you mean learning_rate?",
        "  save_steps: must be above 0, got 0",
    ]


def test_a_contradiction_comes_next_to_a_wrong_value():
    text = refusal_of('batch_size = 0\ntrain_file = "a"\ndataset_name = "b"\n')
    assert text == (
        "config.toml: 2 problems\n"
        "  batch_size: must be above 0, got 0\n"
        "  train_file: contradicts dataset_name; give one of the two"
    )


def test_a_wrong_value_is_no_contradiction_too():
    text = refusal_of('learning_rate = "high"\nmin_learning_rate = 1e-3\n')
    assert text == 'config.toml: 1 problem\n  learning_rate: must be a number, got "high"'


# Files


def test_a_key_in_two_sections_is_refused():
    text = "[schedule]\nmax_steps = 500\n[model]\nmax_steps = 600\n"
    assert refusal_of(text) == "config.toml: 1 problem\n  max_steps: given twice"


def test_a_key_and_its_alias_are_one_key():
    text = 'base_model = "a/b"\nmodel_name = "c/d"\n'
    assert refusal_of(text) == "config.toml: 1 problem\n  model_name: given twice"


@pytest.mark.parametrize(
    "text",
    [
        "max_steps: 500\nmax_steps: 600\n",
        "schedule:\n  max_steps: 500\n  max_steps: 600\n",
        "schedule:\n  max_steps: 500\nschedule:\n  warmup_steps: 50\n",
    ],
    ids=["key", "key of a section", "section"],
)
def test_a_repeated_key_in_yaml_is_refused(text):
    """As in TOML; PyYAML alone would drop one of the two without a word."""
    assert refusal_of(text, ".yaml").startswith("config.yaml: ")


def test_a_key_without_value_is_refused():
    assert refusal_of("max_steps:\n", ".yaml") == (
        "config.yaml: 1 problem\n  max_steps: has no value; leave the line out"
    )


def test_a_section_without_keys_is_taken():
    assert load("lora:\nmax_steps: 500\n", ".yaml").config.schedule.max_steps == 500


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError) as caught:
        load_config(Path("none.toml"), {})
    assert str(caught.value) == "none.toml: cannot be read: No such file or directory"


def test_a_folder_in_place_of_a_file_is_refused():
    Path("folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"^folder.toml: cannot be read: Is a directory$"):
        load_config(Path("folder.toml"), {})


@pytest.mark.parametrize("suffix", [".json", ".txt", ""])
def test_a_file_of_another_suffix_is_refused(suffix):
    assert refusal_of("max_steps = 500", suffix) == (
        f"config{suffix}: config files end in .toml, .yaml or .yml"
    )


def test_malformed_toml_is_refused_with_its_place():
    text = refusal_of("max_steps = 500\nseed = \n")
    assert text.startswith("config.toml: not valid TOML: ")
    assert "line 2" in text


def test_malformed_yaml_is_refused_with_its_place():
    text = refusal_of("max_steps: 500\nseed: [1\n", ".yaml")
    assert text.startswith("config.yaml: not valid YAML: ")
    assert "line 2" in text


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_a_file_that_is_not_utf8_is_refused(suffix):
    file = Path(f"config{suffix}")
    file.write_bytes(b"experiment_name = '\xff'")
    with pytest.raises(ConfigError, match=f"^config{suffix}: not valid {suffix[1:].upper()}: "):
        load_config(file, {})


@pytest.mark.parametrize("text", ["- max_steps\n", "500\n", "max_steps = 500\n"])
def test_yaml_that_is_no_mapping_is_refused(text):
    assert refusal_of(text, ".yaml") == (
        "config.yaml: holds no keys; it must hold lines such as max_steps = 500"
    )


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
@pytest.mark.parametrize("text", ["", "# nothing yet\n"], ids=["nothing", "a comment"])
def test_an_empty_file_is_refused(suffix, text):
    assert "holds no keys" in refusal_of(text, suffix)


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "+1e-5", "0.00001"])
def test_yaml_reads_numbers_as_people_write_them(number):
    assert load(f"learning_rate: {number}\n", ".yaml").config.schedule.learning_rate == 1e-5


def test_yml_is_yaml():
    assert load("learning_rate: 1e-5\n", ".yml").config.schedule.learning_rate == 1e-5


def test_other_readers_of_yaml_are_left_as_they_are():
    """Ours reads 1e-5 as a number; wandb, accelerate and the rest go on reading YAML 1.1."""
    assert load("learning_rate: 1e-5\n", ".yaml").config.schedule.learning_rate == 1e-5
    assert yaml.safe_load("1e-5") == "1e-5"


# The block of config.yaml that people have


def test_the_seed_block_loads_unchanged():
    config = load(SEED_YAML, ".yaml").config
    names = ("model_name", "max_seq_length", "learning_rate", "batch_size", "warmup_steps")
    assert [value_of(config, name) for name in names] == [
        "Qwen/Qwen2.5-7B-Instruct",
        2048,
        2e-5,
        1,
        100,
    ]
    names = ("gradient_accumulation_steps", "max_steps", "save_steps")
    assert [value_of(config, name) for name in names] == [8, 1000, 50]
    names = ("lora_rank", "lora_alpha", "lora_dropout")
    assert [value_of(config, name) for name in names] == [16, 32, 0.1]


def test_base_model_is_model_name():
    loaded = load("model:\n  base_model: Qwen/Qwen2.5-1.5B\n", ".yaml")
    assert loaded.config.model.model_name == "Qwen/Qwen2.5-1.5B"
    assert loaded.given_in == {"model_name": "config.yaml"}


def test_the_lora_keys_of_the_seed_block_are_reported_as_unused():
    assert describe_unused(*load(SEED_YAML, ".yaml")) == [
        "config.yaml: lora_rank and 2 more: not used, training_method is full"
    ]


def test_with_lora_every_key_of_the_seed_block_is_used():
    assert describe_unused(*load(SEED_YAML, ".yaml", training_method="lora")) == []


# Keys that contradict each other, or have no effect


def test_a_typed_lora_flag_is_refused_with_full():
    assert refusal_of_flags(lora_rank="8") == (
        "command line: 1 problem\n  lora_rank: has no effect, training_method is full; leave it out"
    )


def test_a_lora_key_of_a_file_is_reported_as_unused_with_full():
    loaded = load("lora_rank = 8\n")
    assert loaded.config.lora.lora_rank == 8
    assert describe_unused(*loaded) == ["config.toml: lora_rank: not used, training_method is full"]


@pytest.mark.parametrize("training_method", ["lora", "qlora"])
def test_a_typed_lora_flag_is_taken_with_adapters(training_method):
    config = load_flags(training_method=training_method, lora_rank="8")
    assert config.lora.lora_rank == 8


@pytest.mark.parametrize("training_method", ["lora", "qlora"])
def test_adapters_on_random_weights_are_refused(training_method):
    flags = {"model_config_file": "config.json", "tokenizer_name": "folder"}
    assert refusal_of_flags(training_method=training_method, **flags) == (
        "command line: 1 problem\n"
        f"  training_method: {training_method} adapts a base, but model_config_file starts from "
        "random weights; use full, or give model_name instead"
    )


def test_random_weights_need_a_tokenizer():
    assert refusal_of_flags(model_config_file="config.json") == (
        "command line: 1 problem\n  model_config_file: needs tokenizer_name too"
    )


def test_a_typed_base_is_refused_with_random_weights():
    flags = {"model_config_file": "config.json", "tokenizer_name": "folder", "model_name": "a/b"}
    assert refusal_of_flags(**flags) == (
        "command line: 1 problem\n"
        "  model_name: has no effect, model_config_file starts from random weights; leave it out"
    )


def test_two_corpora_are_refused():
    assert refusal_of_flags(train_file="a.jsonl", dataset_name="owner/name") == (
        "command line: 1 problem\n  train_file: contradicts dataset_name; give one of the two"
    )


def test_an_end_of_the_cosine_above_its_peak_is_refused():
    assert refusal_of("learning_rate = 1e-5\nmin_learning_rate = 2e-5\n") == (
        "config.toml: 1 problem\n"
        "  min_learning_rate: must not be above learning_rate = 1e-05, got 2e-05"
    )


def test_a_constant_learning_rate_is_taken():
    config = load("learning_rate = 1e-5\nmin_learning_rate = 1e-5\n").config
    assert config.schedule.min_learning_rate == 1e-5


def test_a_warm_up_as_long_as_the_run_is_refused():
    assert refusal_of("max_steps = 50\nwarmup_steps = 50\n") == (
        "config.toml: 1 problem\n  warmup_steps: must be below max_steps = 50, got 50"
    )


def test_a_warm_up_one_step_shorter_than_the_run_is_taken():
    assert load("max_steps = 50\nwarmup_steps = 49\n").config.schedule.warmup_steps == 49


def test_a_warm_up_that_nobody_gave_is_called_the_default():
    assert refusal_of_flags(max_steps="50") == (
        "command line: 1 problem\n"
        "  warmup_steps: must be below max_steps = 50, got 100 (the default)"
    )


def test_a_problem_with_a_default_is_reported_where_the_other_key_was_given():
    assert refusal_of("max_steps = 50\n") == (
        "config.toml: 1 problem\n"
        "  warmup_steps: must be below max_steps = 50, got 100 (the default)"
    )


@pytest.mark.parametrize("corpus", ["train_file", "dataset_name"])
@pytest.mark.parametrize("name", ["data_type", "data_dir"])
def test_a_typed_data_folder_is_refused_with_another_corpus(corpus, name):
    assert refusal_of_flags(**{corpus: "a", name: "raw"}) == (
        "command line: 1 problem\n"
        f"  {name}: has no effect, the corpus comes from {corpus}; leave it out"
    )


def test_a_data_folder_of_a_file_is_reported_as_unused_with_a_typed_corpus():
    loaded = load('data_type = "raw"\n', train_file="a.jsonl")
    assert describe_unused(*loaded) == [
        "config.toml: data_type: not used, the corpus comes from train_file"
    ]


def test_a_typed_wandb_project_is_refused_without_wandb():
    assert refusal_of_flags(wandb_project="q-pretraining") == (
        "command line: 1 problem\n  wandb_project: has no effect, wandb is off; leave it out"
    )


def test_a_typed_wandb_project_is_taken_with_wandb():
    config = load_flags(wandb_project="q-pretraining", wandb="true")
    assert config.report.wandb_project == "q-pretraining"


def test_a_typed_held_out_share_is_refused_with_an_eval_file():
    assert "held_out_share: has no effect" in refusal_of_flags(
        eval_file="b.jsonl", held_out_share="0.1"
    )


def test_a_typed_dataset_config_is_refused_without_a_dataset():
    assert "dataset_config_name: has no effect" in refusal_of_flags(dataset_config_name="q")


def test_offloading_needs_recomputation_and_no_compilation():
    with pytest.raises(ConfigError, match=r"offload_activations: keeps the inputs.*use full"):
        load_flags(offload_activations="true", gradient_checkpointing="selective")
    with pytest.raises(ConfigError, match="offload_activations: cannot be compiled"):
        load_flags(offload_activations="true", compile="true")


def test_muon_is_refused_for_adapters():
    for method in ("lora", "qlora"):
        text = refusal_of_flags(optimizer="muon", training_method=method)
        assert f"optimizer: muon updates whole matrices, but {method} trains two" in text
    assert load_flags(optimizer="adamw_8bit", training_method="qlora")


def test_allow_change_names_keys_and_what_a_run_is_made_of():
    assert load_flags(allow_change="corpus,lora_rank").run.allow_change == ("corpus", "lora_rank")
    with pytest.raises(
        ConfigError, match=r'allow_change: names "lora_rnk".*did you mean lora_rank'
    ):
        load_flags(allow_change="lora_rnk")


def test_keep_every_must_fall_on_saves():
    assert load_flags(save_steps="50", keep_every="100").checkpoint.keep_every == 100
    with pytest.raises(ConfigError, match="keep_every: must be a multiple of save_steps = 50"):
        load_flags(save_steps="50", keep_every="75")


# Keys that take several types


@pytest.mark.parametrize(
    "text",
    ['optimizer = "muon"', '[optimizer]\noptimizer = "muon"', '[run]\noptimizer = "muon"'],
)
def test_the_optimizer_may_stand_under_its_section_any_other_or_none(text):
    assert load(text + "\n").config.optimizer.optimizer == "muon"


def test_an_optimizer_without_a_value_is_not_taken_for_an_empty_section():
    assert refusal_of("optimizer:\n", ".yaml") == (
        "config.yaml: 1 problem\n  optimizer: has no value; leave the line out"
    )


@pytest.mark.parametrize(
    ("typed", "mode"),
    [("true", "full"), ("false", "off"), ("selective", "selective"), ("auto", "auto")],
)
def test_gradient_checkpointing_takes_a_switch_or_a_name(typed, mode):
    assert load_flags(gradient_checkpointing=typed).model.gradient_checkpointing == mode


# Written and read again


def read_again(config: Config) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_yaml(config), encoding="utf-8")
        return load_config(file, {}).config


@settings(max_examples=100, deadline=None)
@given(
    schedule=st.fixed_dictionaries(
        {"learning_rate": st.floats(min_value=1e-300, max_value=1e300)},
        optional={
            "max_steps": st.integers(min_value=101),
            "num_epochs": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        },
    ),
    run=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "deterministic": st.booleans(),
            "output_dir": st.just("/runs"),
        },
        optional={
            "experiment_name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
        },
    ),
    lora=st.fixed_dictionaries(
        {
            "lora_dropout": st.floats(0, 1, exclude_max=True),
            "lora_target_modules": st.lists(st.text(min_size=1), min_size=1).map(tuple),
            "use_dora": st.booleans(),
        }
    ),
    report=st.fixed_dictionaries({"wandb_project": st.text(min_size=1)}),
)
def test_what_is_written_is_read_back_the_same(schedule, run, lora, report):
    config = Config.model_validate(
        {
            **{"schedule": schedule, "run": run, "lora": lora, "report": report},
            "data": {"data_dir": "/data"},
        }
    )
    assert read_again(config) == config


@pytest.mark.parametrize(
    "name", ["1e-5", "1e5", "12e45678", "0123", "0x10", "1_000", "1.5", "2026-01-01", "yes", "null"]
)
def test_a_name_that_looks_like_something_else_is_read_back_as_text(name):
    config = load_flags(experiment_name=name)
    assert read_again(config).run.experiment_name == name


def test_a_key_without_value_is_not_written():
    assert "max_steps" not in dump_yaml(Config())


# Relative paths: those of a file start at its folder


path_keys = pytest.mark.parametrize("key", sorted(PATH_KEYS | FOLDER_OR_NAME_KEYS))
name_keys = pytest.mark.parametrize("key", sorted(FOLDER_OR_NAME_KEYS))


def load_path(file: Path | str, key: str, path: Path | str, **options: Any) -> str:
    """Returns the value of a key in a config file that gives it this path."""
    companion = 'tokenizer_name = "owner/name"\n' if key == "model_config_file" else ""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(f'{key} = "{path}"\n{companion}', encoding="utf-8")
    return str(value_of(load_config(Path(file), **{"flags": {}, **options}).config, key))


@path_keys
@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("config.toml", "base", "base"),
        ("config.toml", "owner/base", "owner/base"),
        ("config.toml", "./base", "base"),
        ("configs/config.toml", "base", "configs/base"),
        ("configs/config.toml", "./base/", "configs/base"),
        ("configs/config.toml", "../base", "base"),
        ("configs/config.toml", "../base/../base", "base"),
        ("configs/own/config.toml", "../../qloop/base", "qloop/base"),
        ("configs/own/config.toml", "../../../elsewhere/base", "../elsewhere/base"),
    ],
)
def test_a_relative_path_starts_at_the_folder_of_its_file(
    key, file, path, value, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path(value).mkdir(parents=True)
    assert load_path(file, key, path) == value
    assert load_path(Path(file).absolute(), key, path) == str(Path(value).resolve())


@path_keys
def test_an_absolute_path_stays_as_it_is(key, tmp_path):
    assert load_path("configs/config.toml", key, tmp_path / "base") == str(tmp_path / "base")


@path_keys
def test_a_path_goes_up_from_where_a_link_leads(key, tmp_path):
    (tmp_path / "real/configs").mkdir(parents=True)
    (tmp_path / "real/base").mkdir()
    (tmp_path / "configs").symlink_to("real/configs")
    value = load_path("configs/config.toml", key, "../base")
    assert Path(value).resolve() == tmp_path / "real/base"


@path_keys
def test_a_path_in_a_linked_file_starts_at_the_folder_of_the_link(key, tmp_path):
    """The name that the user gave decides."""
    (tmp_path / "base").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "config.toml").symlink_to("real/config.toml")
    assert load_path("config.toml", key, "./base") == "base"


@path_keys
def test_a_path_on_the_command_line_starts_at_the_working_directory(key):
    Path("configs/base").mkdir(parents=True)
    value = load_path("configs/config.toml", key, "./other", flags={key: "base"})
    assert value == "base"


def test_a_default_starts_at_the_working_directory():
    Path("configs").mkdir()
    Path("configs/config.toml").write_text("max_steps = 500\n")
    config = load_config(Path("configs/config.toml"), {}).config
    assert config.run.output_dir == Path("output")
    assert config.data.data_dir == Path("data")


@name_keys
def test_a_name_that_is_no_folder_stays_as_it_is(key):
    Path("owner/base").mkdir(parents=True)
    assert load_path("configs/config.toml", key, "owner/base") == "owner/base"


@name_keys
@pytest.mark.parametrize(
    ("path", "value"), [("./base", "./configs/base"), ("../base", "./base"), ("../../b", "./../b")]
)
def test_a_missing_folder_does_not_become_a_name_on_the_hub(key, path, value):
    assert load_path("configs/config.toml", key, path) == value


@pytest.mark.parametrize("word", ["auto", "never", "restart"])
def test_a_word_of_resume_is_no_folder(word):
    Path("configs", word).mkdir(parents=True)
    assert load_path("configs/config.toml", "resume", word) == word


@path_keys
def test_the_folder_that_paths_start_at_can_be_given(key):
    Path("base").mkdir()
    assert load_path("configs/config.toml", key, "base", relative_to=Path()) == "base"


# Runs whose paths are written in another way, or seen from elsewhere


def build_run() -> Config:
    for folder in ("corpus", "tokenizer"):
        Path(folder).mkdir()
    return load_flags(
        model_config_file="shapes/config.json",
        tokenizer_name="./tokenizer",
        train_file="corpus",
        eval_file="corpus/../held_out.jsonl",
        cache_dir="cache",
        experiment_name="run",
    )


def test_the_written_config_is_the_same_run_from_another_folder(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "output/run")
    run.create(build_run())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_config(Path("../output/run/config.yaml"), {}).config
    run.refuse_another(again)
    assert again.run.output_dir == tmp_path / "output"
    assert again.data.cache_dir == tmp_path / "cache"
    assert again.data.train_file == tmp_path / "corpus"


@pytest.fixture
def old_run() -> RunDirectory:
    """A run of an older version, whose config.yaml has paths as they were typed."""
    run = RunDirectory(Path("output/run"))
    run.path.mkdir(parents=True)
    content = build_run().model_dump(mode="json", exclude_none=True)
    run.config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return run


OLD_FLAGS = {
    "model_config_file": "shapes/config.json",
    "tokenizer_name": "./tokenizer",
    "train_file": "corpus",
    "eval_file": "corpus/../held_out.jsonl",
}


def test_a_run_with_relative_paths_goes_on_with_the_same_flags(old_run):
    old_run.refuse_another(load_flags(**OLD_FLAGS))


def test_a_run_with_relative_paths_goes_on_with_a_file_that_names_the_same(old_run):
    Path("configs").mkdir()
    lines = [f'{key} = "../{path}"' for key, path in OLD_FLAGS.items()]
    Path("configs/own.toml").write_text("\n".join(lines))
    old_run.refuse_another(load_config(Path("configs/own.toml"), {}).config)


@pytest.mark.parametrize("name", ["output/run/config.yaml", "absolute"])
def test_a_run_with_relative_paths_goes_on_with_its_own_config(old_run, name):
    file = old_run.config.absolute() if name == "absolute" else Path(name)
    again = load_config(file, {}).config
    old_run.refuse_another(again)
    assert again.run.output_dir == Path("output")


def test_a_run_with_relative_paths_that_was_moved_goes_on(old_run):
    moved = RunDirectory(old_run.path.rename("moved"))
    moved.refuse_another(load_flags(**OLD_FLAGS))


def test_a_checkpoint_with_relative_paths_is_of_the_same_run(old_run):
    old = Config.model_validate(yaml.safe_load(old_run.config.read_text()))
    written_anew = dump_yaml(load_flags(**OLD_FLAGS))
    Path("anew.yaml").write_text(written_anew)
    assert find_changes(old, load_config(Path("anew.yaml"), {}).config) == []
