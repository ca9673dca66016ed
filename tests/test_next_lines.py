"""The commands that a run ends with work as they are printed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import Workspace, reset_accelerate

from qloop.train import train

pytestmark = pytest.mark.commands
TITLES = ("train on", "adapt it", "load it")


def find_next_lines(output: str) -> dict[str, str]:
    """Returns what is printed after `next:`, by title."""
    lines = output.split("next:\n")[-1].splitlines()
    return {line[2:11].strip(): line[13:] for line in lines if line.startswith("  ")}


def run_command(command: str, folder: Path) -> str:
    words = shlex.split(command)
    assert words[0] == "qloop"
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code: str) -> None:
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    assert eval(code).num_parameters() > 0


def write_jsonl(workspace: Workspace) -> dict[str, str | None]:
    """Puts the corpus where data_dir and data_type name it; in a folder with a space."""
    folder = workspace.folder / "my data"
    folder.mkdir()
    rows = [json.dumps({"text": file.read_text()}) for file in sorted(workspace.corpus.iterdir())]
    (folder / "raw_train.jsonl").write_text("\n".join(rows[2:]) + "\n")
    (folder / "raw_test.jsonl").write_text("\n".join(rows[:2]) + "\n")
    return {"train_file": None, "data_dir": str(folder), "data_type": "raw"}


@pytest.mark.parametrize("case", ["never", "epochs", "lora", "branch"])
def test_every_line_after_next_works(
    tmp_path, corpus_dir, tokenizer_dir, monkeypatch, capsys, case
):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path, corpus_dir, tokenizer_dir)
    keys = {"max_steps": 2, "warmup_steps": 1, "save_steps": 2, "eval_steps": 0}
    if case == "epochs":
        keys |= {"num_epochs": 0.1, "max_steps": None}
        keys |= {**write_jsonl(workspace), "held_out_share": None}
    elif case == "lora":
        keys |= workspace.method_keys("lora")
    elif case == "never":
        keys["resume"] = "never"
    elif case == "branch":
        train(workspace.make_config(**keys))
        reset_accelerate()
        source = tmp_path / "output/run/checkpoints/checkpoint-2"
        keys |= {"experiment_name": "branch", "resume": str(source), "max_steps": 4}
    capsys.readouterr()
    train(workspace.make_config(**keys))
    lines = find_next_lines(capsys.readouterr().out)
    titles = set(TITLES) - ({"adapt it"} if case == "lora" else set())
    assert set(lines) == titles
    run_python(lines["load it"])
    longer = run_command(lines["train on"], tmp_path)
    assert "; going on from " in longer
    # The lines of the longer run, whose config.yaml names every key, also those without effect.
    again = find_next_lines(longer)
    assert set(again) == titles
    if "adapt it" in titles:
        assert "(lora, fp32, cpu x 1)" in run_command(again["adapt it"], tmp_path)
