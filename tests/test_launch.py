"""The launcher's command line: what accelerate makes of it, and that qloop gets every argument."""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

LAUNCH = Path(__file__).parent.parent / "launch"

# Flags of qloop, a value with a space, and names that accelerate has flags of its own by.
ARGUMENTS = [
    *("--model_name", "Qwen/Qwen2.5-7B-Instruct", "--learning_rate=1e-5", "--wandb"),
    *("--experiment_name", "two words", "--output_dir", "", "--config", "configs/lora.toml"),
    *("--num_processes", "9", "--cpu", "--config_file", "other.yaml", "-m", "--", "--max_steps"),
]

gpus = pytest.mark.parametrize("num_gpus", [2, 4])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_pretraining", LAUNCH / "run_pretraining.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build_command(script):
    return script.build_command


def parse(command: list[str]) -> argparse.Namespace:
    """Reads a command line as accelerate does, and fails where accelerate would."""
    start = command.index("accelerate.commands.launch") + 1
    return launch_command_parser().parse_args(command[start:])


@gpus
def test_it_is_accelerate_in_this_python(build_command, num_gpus):
    command = build_command(num_gpus, ARGUMENTS)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]


@gpus
@pytest.mark.parametrize("arguments", [[], ARGUMENTS], ids=["no arguments", "many arguments"])
def test_accelerate_starts_qloop_train_with_every_argument_in_order(
    build_command, num_gpus, arguments
):
    parsed = parse(build_command(num_gpus, arguments))
    assert parsed.module
    assert parsed.training_script == "qloop"
    assert parsed.training_script_args == ["train", *arguments]


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_one_process_needs_no_launcher(build_command, num_gpus):
    command = build_command(num_gpus, ARGUMENTS)
    assert command == [sys.executable, "-m", "qloop", "train", *ARGUMENTS]


@gpus
def test_there_is_a_process_for_each_gpu(build_command, num_gpus):
    parsed = parse(build_command(num_gpus, ARGUMENTS))
    assert parsed.num_processes == num_gpus
    assert parsed.multi_gpu
    assert not parsed.cpu


@gpus
def test_precision_and_compilation_are_left_to_qloop(build_command, num_gpus):
    parsed = parse(build_command(num_gpus, ARGUMENTS))
    assert (parsed.mixed_precision, parsed.dynamo_backend) == ("no", "no")


@gpus
def test_no_engine_that_shards_is_asked_for(build_command, num_gpus):
    parsed = parse(build_command(num_gpus, ARGUMENTS))
    assert not parsed.use_fsdp
    assert not parsed.use_deepspeed


def test_a_mistake_ends_in_one_message_and_its_exit_code(tmp_path):
    """What `qloop train` says and returns comes through the launcher."""
    done = subprocess.run(
        [sys.executable, LAUNCH / "run_pretraining.py", "--learning_rat", "1e-5"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--learning_rat: unknown flag; did you mean --learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 78


def test_the_example_experiments_are_valid_bash():
    done = subprocess.run(
        ["bash", "-n", LAUNCH / "pretrain_exps.sh"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_size_the_example_experiments_tell_how_to_call_them():
    done = subprocess.run(
        ["bash", LAUNCH / "pretrain_exps.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert done.stderr.startswith("usage: ")


def test_an_unknown_size_of_the_example_experiments_lists_the_sizes():
    done = subprocess.run(
        ["bash", LAUNCH / "pretrain_exps.sh", "70b"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert done.stderr == "unknown size 70b; choose 1.5b, 3b, 7b, 14b or 32b\n"


def test_accelerate_accepts_the_launch_on_four_gpus_of_the_example_experiments():
    text = (LAUNCH / "pretrain_exps.sh").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("accelerate launch")]
    parsed = launch_command_parser().parse_args(shlex.split(line)[2:])
    assert (parsed.num_processes, parsed.use_fsdp, parsed.module) == (4, True, True)
    assert parsed.training_script == "qloop"
    assert parsed.training_script_args[:3] == ["train", "--config", "configs/full.toml"]


def test_the_launcher_of_several_processes_passes_signals_on_and_waits(script):
    environment = script.LAUNCHER_ENVIRONMENT
    assert "SIGUSR1" in environment["PET_SIGNALS_TO_HANDLE"].split(",")
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30, "torch's own"
