"""The command line: flags, messages and exit codes of mistakes, help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from workspace import reset_accelerate, write_model_config

from qloop import __version__
from qloop.cli import cli, main, train
from qloop.config.keys import KEYS, iterate_keys
from qloop.config.loading import load_config


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    """So that a run that should be refused finds nothing, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(monkeypatch):
    """Calls qloop in this process, as its console script does."""

    def run_main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["qloop", *arguments])
        main()

    return run_main


@pytest.fixture
def mistake(call, capsys):
    """Calls `qloop train` with a mistake in its flags; returns the message."""

    def run_train(*flags: str) -> str:
        with pytest.raises(SystemExit) as caught:
            call("train", *flags)
        assert caught.value.code == 78
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err

    return run_train


def parse(*flags: str) -> dict[str, str | None]:
    """Returns the flags as `qloop train` gets them: only those that were typed."""
    parameters = train.make_context("train", list(flags)).params
    return {name: value for name, value in parameters.items() if value is not None}


def run_qloop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qloop", *arguments], capture_output=True, text=True, check=False
    )


# Mistakes: exit code 78 and one message, from a process of its own


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--learning_rat", "1e-5"],
            "command line: 1 problem\n"
            "  --learning_rat: unknown flag; did you mean --learning_rate?\n",
        ),
        (
            ["--max_steps", "500.5"],
            'command line: 1 problem\n  max_steps: must be a whole number, got "500.5"\n',
        ),
        (
            ["--config", "none.toml"],
            "none.toml: cannot be read: No such file or directory\n",
        ),
    ],
    ids=["unknown flag", "wrong value", "missing config file"],
)
def test_a_mistake_in_the_config_ends_in_its_message_and_78(flags, message):
    done = run_qloop("train", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (78, "", message)


def test_a_stray_argument_ends_in_one_message_and_78():
    done = run_qloop("train", "lora", "--max_steps", "500")
    assert (done.returncode, done.stdout) == (78, "")
    assert "unexpected lora; every value follows its --flag" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_corpus_ends_in_one_message_and_78():
    done = run_qloop("train", "--train_file", "none.jsonl")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "none.jsonl: no such file or folder\n"


def test_an_unknown_model_ends_in_one_message_and_78(corpus_dir):
    done = run_qloop("train", "--model_name", "no/such-model", "--train_file", str(corpus_dir))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(
        "model_name: no tokenizer could be loaded from no/such-model "
        "(no folder here, so a name on the hub): "
    )
    assert done.stderr.count("\n") == 1


@pytest.fixture
def tiny_run(tmp_path, corpus_dir, tokenizer_dir) -> list[str]:
    """Flags of a run of a few steps; its model reads 512 tokens at most."""
    return [
        *("--model_config_file", str(write_model_config(tmp_path / "model"))),
        *("--tokenizer_name", str(tokenizer_dir), "--train_file", str(corpus_dir)),
        *("--experiment_name", "run", "--batch_size", "2", "--gradient_accumulation_steps", "1"),
        *("--max_steps", "2", "--warmup_steps", "1", "--num_samples", "0"),
    ]


def test_blocks_longer_than_the_model_reads_end_in_one_message_and_78(tiny_run):
    done = run_qloop("train", *tiny_run, "--max_seq_length", "513")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == (
        "max_seq_length: must be at most 512, the model's longest context, got 513\n"
    )


def test_a_corpus_smaller_than_a_step_ends_in_one_message_and_78(tiny_run):
    done = run_qloop("train", *tiny_run, "--max_seq_length", "64", "--batch_size", "10000")
    assert (done.returncode, done.stdout) == (78, "")
    assert "one step reads 10000 (batch_size 10000 x" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_refused_run_leaves_no_folder_that_blocks_the_next(tiny_run, mistake):
    mistake(*tiny_run, "--max_seq_length", "64", "--batch_size", "10000")
    assert not Path("output/run").exists()


# Mistakes: what the message says


def test_an_unknown_flag_is_reported_with_wrong_values(mistake):
    assert mistake("--learning_rat", "1e-5", "--packing", "worst") == (
        "command line: 2 problems\n"
        '  packing: unknown value "worst"; choose best_fit or wrapped\n'
        "  --learning_rat: unknown flag; did you mean --learning_rate?\n"
    )


def test_problems_of_file_and_flags_come_in_one_message(mistake):
    Path("own.toml").write_text("learning_rat = 1e-5\n")
    assert mistake("--config", "own.toml", "--packing", "worst") == (
        "own.toml: 1 problem\n"
        "  learning_rat: unknown key; did you mean learning_rate?\n"
        "command line: 1 problem\n"
        '  packing: unknown value "worst"; choose best_fit or wrapped\n'
    )


@pytest.mark.parametrize(
    "flags",
    [["--learning_rat=1e-5"], ["--learning_rat"], ["--learning-rat", "1e-5"]],
    ids=["with =", "without value", "with hyphens"],
)
def test_an_unknown_flag_is_named_however_it_is_typed(mistake, flags):
    assert "did you mean --learning_rate?" in mistake(*flags)


def test_the_beginning_of_a_flag_is_not_taken_for_the_flag(mistake):
    assert "--max_step: unknown flag; did you mean --max_steps?" in mistake("--max_step", "500")


@pytest.mark.parametrize(
    "flags",
    [["--max_steps", "--deduplicate"], ["--deduplicate", "--max_steps"]],
    ids=["before another flag", "at the end"],
)
def test_a_flag_without_its_value_is_refused(mistake, flags):
    assert "max_steps" in mistake(*flags)


def test_a_negative_number_is_a_value(mistake):
    assert "learning_rate: must be above 0" in mistake("--learning_rate", "-1e-5")


def test_config_needs_a_file(mistake):
    assert "Option '--config' requires an argument" in mistake("--config")


def test_a_lora_flag_with_full_is_refused(mistake):
    assert "lora_rank: has no effect, training_method is full" in mistake("--lora_rank", "8")


def test_an_unknown_command_ends_in_78(call, capsys):
    with pytest.raises(SystemExit) as caught:
        call("trian")
    assert caught.value.code == 78
    assert "No such command 'trian'" in capsys.readouterr().err


# Flags


def test_only_typed_flags_are_passed_on():
    assert parse("--max_steps", "500") == {"max_steps": "500"}


def test_a_value_may_follow_an_equals_sign():
    assert parse("--max_steps=500", "--wandb=false") == {"max_steps": "500", "wandb": "false"}


def test_a_bare_boolean_flag_is_true():
    assert parse("--wandb") == {"wandb": "true"}


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_boolean_flag_may_have_a_value(value):
    assert parse("--gradient_checkpointing", value) == {"gradient_checkpointing": value}


def test_a_bare_boolean_flag_may_precede_another_flag():
    flags = ("--wandb", "--wandb_project", "q-pretraining", "--tensorboard", "--max_steps", "500")
    assert parse(*flags) == {
        "wandb": "true",
        "wandb_project": "q-pretraining",
        "tensorboard": "true",
        "max_steps": "500",
    }


@pytest.mark.parametrize("key", list(iterate_keys()), ids=lambda key: key.name)
def test_every_key_is_a_flag(key):
    value = "true" if key.field.annotation is bool else "7"
    assert parse(f"--{key.name}", value) == {key.name: value}


def test_a_wrong_value_of_a_boolean_flag_is_refused(mistake):
    assert 'wandb: must be true or false, got "maybe"' in mistake("--wandb", "maybe")


def test_typed_flags_are_in_the_config_that_ran(call, tiny_run):
    call("train", *tiny_run, "--max_seq_length", "64", "--gradient_checkpointing", "false")
    config = load_config(Path("output/run/config.yaml"), {}).config
    assert config.data.max_seq_length == 64
    assert config.schedule.max_steps == 2
    assert config.model.gradient_checkpointing == "off"


def test_a_run_goes_on_from_another_folder_with_its_written_config(
    call, tiny_run, tmp_path, monkeypatch, capsys
):
    relative = [
        os.path.relpath(text) if Path(text).is_absolute() else text
        for text in [*tiny_run, "--max_seq_length", "64"]
    ]
    call("train", *relative)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    reset_accelerate()
    call("train", "--config", "../output/run/config.yaml", "--max_steps", "3")
    assert (tmp_path / "output/run/checkpoints/checkpoint-3").is_dir()
    assert "checkpoint-2" in capsys.readouterr().out
    assert not list(Path().iterdir())


# Help


def without_spaces(text: str) -> str:
    """Help is wrapped to the width of the terminal, also at hyphens."""
    return "".join(text.split())


def test_help_of_train_names_every_key_with_its_description():
    shown = CliRunner().invoke(cli, ["train", "--help"])
    assert shown.exit_code == 0
    names = [word for word in shown.output.split() if word.startswith("--")]
    for key in iterate_keys():
        is_shown = without_spaces(key.field.description) in without_spaces(shown.output)
        assert f"--{key.name}" in names, f"make TrainCommand list --{key.name}"
        assert is_shown, f"make _build_flag show the description of {key.name}"


def test_help_of_train_shows_the_flags_under_their_sections():
    lines = CliRunner().invoke(cli, ["train", "--help"]).output.splitlines()
    section, found = "", []
    for line in lines:
        if line.endswith(":") and not line.startswith(" "):
            section = line[:-1].lower()
        elif line.startswith("  --"):
            found.append((section, line.split()[0][2:]))
    expected = [(key.section, key.name) for key in iterate_keys()]
    assert [entry for entry in found if entry[0] != "options"] == expected


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("learning_rate", "2e-05"),
        ("max_steps", "none"),
        ("wandb", "false"),
        ("lora_target_modules", "all-linear"),
        ("modules_to_save", "none"),
    ],
)
def test_help_of_train_shows_each_default(name, default):
    output = without_spaces(CliRunner().invoke(cli, ["train", "--help"]).output)
    assert without_spaces(f"{KEYS[name].field.description} [{default}]") in output


def test_help_leads_to_train():
    shown = CliRunner().invoke(cli, ["--help"])
    assert shown.exit_code == 0
    assert "train" in shown.output


def test_help_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['qloop', '--help']; from qloop.cli import main; main(); "
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Usage: qloop" in done.stdout
    imported = set(done.stderr.split())
    assert {"qloop", "click"} <= imported
    assert not imported & {"torch", "transformers", "accelerate", "datasets", "pydantic", "numpy"}


def test_flags_are_checked_before_anything_heavy_is_imported():
    program = (
        "import sys; sys.argv = ['qloop', 'train', '--packing', 'worst']\n"
        "from qloop.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(*sorted(name for name in sys.modules if '.' not in name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert not set(done.stdout.split()) & {"torch", "transformers", "accelerate", "datasets"}


def test_the_version_is_shown():
    shown = CliRunner().invoke(cli, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"qloop, version {__version__}\n")
