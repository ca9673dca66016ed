"""Every command in README.md works, in a short form; every file, flag and figure in it exists.

Commands of qloop run in this process with tiny sizes and a local base, in a folder like a clone.
Scripts run with a `python` that only prints its arguments; the `qloop` command they arrive at runs.
The rest is checked without running it, as `CHECKS` says.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from workspace import reset_accelerate

import qloop
from qloop.cli import cli
from qloop.config.keys import KEYS
from qloop.config.loading import load_config

pytestmark = pytest.mark.commands
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci/run").read_text()
PROGRAMS = ("qloop", "accelerate", "python", "bash", "pip", "pytest", "kill", "sbatch", "kubectl")
DEMO = "qloop train --config configs/demo.toml"

# Appended to commands of qloop that take a config; the last value of a flag counts.
TINY = [
    *("--max_steps", "2", "--warmup_steps", "1", "--max_seq_length", "64", "--batch_size", "1"),
    *("--gradient_accumulation_steps", "1", "--eval_steps", "0", "--eval_batch_size", "64"),
    *("--num_samples", "1", "--sample_tokens", "2"),
]
LAST = "checkpoint-2"


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def find_inline() -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))


def find_commands() -> list[str]:
    """Returns the commands of the bash blocks and of the text, without comments."""
    lines = "\n".join(find_blocks("bash")).replace("\\\n", " ").splitlines()
    inline = [code for code in find_inline() if code.split()[0] in PROGRAMS]
    lines += [code for code in inline if len(code.split()) > 2]  # shorter ones are names
    parts = [part for line in lines for part in line.split("  #")[0].split("&&")]
    return list(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip()))


class Project:
    """A folder like a clone of the repository, with data and the demo's run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "output/demo/checkpoints" / LAST
        (folder / "qloop").symlink_to(ROOT / "qloop")
        for name in ("configs", "launch"):
            shutil.copytree(ROOT / name, folder / name)
        for file in (folder / "configs").iterdir():
            file.write_text(re.sub(r"Qwen/[\w.-]+", str(self.base), file.read_text()))
        shutil.copytree(ROOT / "qloop/demo/corpus", folder / "corpus")
        for name in ("data", "bin"):
            (folder / name).mkdir()
        for name in ("train", "test"):
            line = f'{{"text": "{name}:{{select sum size by sym from x}} / volume by symbol"}}\n'
            (folder / f"data/filtered_{name}.jsonl").write_text(line)
        for name in ("python", "accelerate"):
            (folder / "bin" / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
            (folder / "bin" / name).chmod(0o755)
        self.number = 0

    def run_qloop(self, words: list[str]) -> str:
        """Runs a command of qloop; returns its output."""
        words = [re.sub(r"checkpoint-\d+", LAST, word) for word in words]
        words = [str(self.base) if word.startswith("Qwen/") else word for word in words]
        if words[0] in ("train", "plan", "profile"):
            words = [*words, *TINY]
        if words[0] == "profile":
            words += ["--steps", "1"]
        if words[0] == "train" and words[: -len(TINY)] != shlex.split(DEMO)[1:]:
            self.number += 1  # a run of its own, next to the demo's
            words += ["--experiment_name", f"run-{self.number}"]
        reset_accelerate()
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, f"{words}: {result.output}\n{result.exception!r}"
        return result.output


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("clone"))
    before = Path.cwd()
    os.chdir(project.folder)
    try:
        project.run_qloop(shlex.split(DEMO)[1:])
    finally:
        os.chdir(before)
    return project


@pytest.fixture
def project(demo, monkeypatch) -> Project:
    """Commands run in the project's folder."""
    monkeypatch.chdir(demo.folder)
    return demo


def check_qloop(project: Project, command: str) -> None:
    """Runs it."""
    project.run_qloop(shlex.split(command)[1:])


def check_launcher(project: Project, command: str) -> None:
    """Runs the command that the launcher starts on a machine with one GPU or none."""
    file = ROOT / "launch/run_pretraining.py"
    spec = importlib.util.spec_from_file_location("run_pretraining", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = module.build_command(1, shlex.split(command)[2:])
    project.run_qloop(words[words.index("qloop") + 1 :])


def check_script(project: Project, command: str) -> None:
    """Runs the script with a `python` that prints its arguments, then the `qloop` command."""
    path = f"{project.folder}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command), env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    words = done.stdout.splitlines()
    is_launcher = words[0] == "launch/run_pretraining.py"
    project.run_qloop(["train", *words[1:]] if is_launcher else words[words.index("train") :])


def check_accelerate(project: Project, command: str) -> None:
    """Needs several GPUs: accelerate reads its part of the command, qloop the rest."""
    parsed = launch_command_parser().parse_args(shlex.split(command)[2:])
    assert Path(parsed.config_file).exists()
    assert (parsed.module, parsed.training_script) == (True, "qloop")
    subcommand, flag, config = parsed.training_script_args
    assert (subcommand, flag) == ("train", "--config")
    load_config(Path(config), {})


def check_pip(project: Project, command: str) -> None:
    """Needs a network: .ci/run runs the two `pip install -e` lines, and installs torch first."""
    assert "grep -E '^pip install -e ' README.md" in CI
    assert "pip install --quiet torch" in CI
    extras = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", command)) <= set(extras)


def check_nothing(project: Project, command: str) -> None:
    """Needs a process to signal: tests/torture/stops.py sends all signals."""


CHECKS: dict[str, Callable[[Project, str], None]] = {
    r"qloop (train|plan|profile|export|checkpoint) .*": check_qloop,
    r"python launch/run_pretraining.py .*": check_launcher,
    r"bash launch/(pretrain_exps|debug)\.sh .*": check_script,
    r"accelerate launch --config_file .*": check_accelerate,
    r"pip install .*|pytest": check_pip,
    r"kill -USR1 PID": check_nothing,
    r"qloop train --help": check_qloop,
}


@pytest.mark.parametrize("command", find_commands(), ids=str)
def test_command(project, command):
    check = next((check for form, check in CHECKS.items() if re.fullmatch(form, command)), None)
    assert check, f"`{command}` is new in README.md: give its form a check in CHECKS"
    check(project, command)


def test_python_examples_run(project):
    if not hasattr(qloop, "open_run"):
        pytest.skip("qloop.open_run is not there yet")
    reset_accelerate()
    for block in find_blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_ci_finds_its_two_commands():
    assert len(re.findall(r"^pip install -e ", README, re.M)) == 2
    assert f"pip install -e . && {DEMO}" in README.splitlines()


def test_it_is_short():
    size = len(README.encode())
    assert size < 12_000, f"README.md has {size} bytes: move details to CONTRIBUTING.md"


def test_the_files_it_names_exist(project):
    folders = [ROOT, ROOT / "configs", ROOT / "launch", project.folder]
    folders += [project.folder / "output/demo" / name for name in ("", "logs", "results")]
    names = re.findall(r"\]\(([^)]+)\)", README)
    names += [c for c in find_inline() if re.fullmatch(r"[\w./-]+\.(\w{2,6})", c)]
    missing = [n for n in names if not any((folder / n).exists() for folder in folders)]
    assert not missing, f"README.md names {missing}: correct the names or remove them"


def test_the_flags_it_names_are_keys():
    texts = [code for code in find_inline() if code.split()[0] not in PROGRAMS]
    flags = {flag for text in texts for flag in re.findall(r"--(\w+)", text)}
    unknown = flags - {*KEYS, "config"}
    assert not unknown, f"README.md names flags that qloop train does not have: {sorted(unknown)}"


def test_figures_of_the_evidence_are_in_the_results():
    section = README.split("## Evidence")[1].split("\n## ")[0]
    items = re.findall(r"^- \[[^]]+\]\(([^)]+)\)(.*)", section, re.M)
    assert items
    for page, text in items:
        table = (ROOT / page).read_text()
        for figure in re.findall(r"\d[\d,.]*\d%?(?:e-\d+)?", text):
            assert figure in table, f"README.md says {figure}, {page} does not: correct README.md"
