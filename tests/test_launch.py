"""The launcher's command line: what accelerate makes of it, and that qloop gets every argument."""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

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
    assert (parsed.num_processes, parsed.config_file) == (4, "launch/fsdp2.yaml")
    assert parsed.training_script_args[:3] == ["train", "--config", "configs/full.toml"]


def read_as_accelerate(name: str, *flags: str) -> argparse.Namespace:
    """Reads a config file, with flags, to what accelerate would launch."""
    words = ["--config_file", str(LAUNCH / name), *flags, "-m", "qloop", "train"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return parsed


CONFIG_FILES = {
    "one_gpu.yaml": ("NO", 1, 1),
    "multi_gpu.yaml": ("MULTI_GPU", 8, 1),
    "cpu_two_processes.yaml": ("MULTI_GPU", 2, 1),
    "fsdp2.yaml": ("FSDP", 8, 1),
    "fsdp2_qlora.yaml": ("FSDP", 8, 1),
    "deepspeed_zero2.yaml": ("DEEPSPEED", 8, 1),
    "deepspeed_zero3.yaml": ("DEEPSPEED", 8, 1),
    "multi_node.yaml": ("FSDP", 16, 2),
}


def test_every_config_file_of_accelerate_is_known_here():
    files = {file.name for file in LAUNCH.glob("*.yaml")}
    assert files - {"kubernetes.yaml"} == CONFIG_FILES.keys()


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_accelerate_reads_its_config_files_and_knows_every_key(name):
    config = load_config_from_file(str(LAUNCH / name))  # an unknown key is an error
    found = (config.distributed_type.value, config.num_processes, config.num_machines)
    assert found == CONFIG_FILES[name]
    assert config.mixed_precision == "no", "qloop's own key decides"
    assert read_as_accelerate(name).dynamo_backend == "no"


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_flag_replaces_the_number_of_processes_of_a_config_file(name):
    assert read_as_accelerate(name, "--num_processes", "4").num_processes == 4


@pytest.mark.parametrize(
    ("name", "one_process_reads"),
    [("fsdp2.yaml", True), ("fsdp2_qlora.yaml", False), ("multi_node.yaml", True)],
)
def test_sharding_is_by_the_second_version_of_fsdp(name, one_process_reads):
    parsed = read_as_accelerate(name)
    assert parsed.use_fsdp
    assert str(parsed.fsdp_version) == "2"
    assert parsed.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert parsed.fsdp_reshard_after_forward is True
    assert parsed.fsdp_cpu_ram_efficient_loading is one_process_reads
    assert parsed.fsdp_activation_checkpointing is False, "qloop's own key decides"


@pytest.mark.parametrize(
    ("name", "stage"), [("deepspeed_zero2.yaml", 2), ("deepspeed_zero3.yaml", 3)]
)
def test_deepspeed_is_told_its_stage_and_nothing_that_qloop_sets(name, stage):
    parsed = read_as_accelerate(name)
    assert parsed.use_deepspeed
    assert parsed.zero_stage == stage
    given = yaml.safe_load((LAUNCH / name).read_text())["deepspeed_config"]
    assert not {"gradient_clipping", "gradient_accumulation_steps"} & given.keys()


@pytest.mark.parametrize("name", ["deepspeed_zero2.yaml", "deepspeed_zero3.yaml"])
def test_the_commented_keys_of_deepspeed_are_keys(name, tmp_path):
    text = (LAUNCH / name).read_text().replace("# offload_", "offload_")
    (tmp_path / name).write_text(text)
    load_config_from_file(str(tmp_path / name))
    assert yaml.safe_load(text)["deepspeed_config"]["offload_optimizer_device"] == "cpu"


# The options of sbatch's manual that the script may use.
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time"),
    *("requeue", "open-mode", "output", "signal", "partition", "account", "constraint"),
}


def test_the_slurm_job_uses_options_of_sbatch_only():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.split("--")[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert options
    assert set(options) <= SBATCH
    # sbatch reads no option after the first command.
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize("name", ["slurm.sbatch", "debug.sh"])
def test_scripts_are_valid_bash(name):
    done = subprocess.run(
        ["bash", "-n", LAUNCH / name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("word", ["--output_dir", "--experiment_name=q-7b"])
def test_the_slurm_job_refuses_a_folder_in_which_it_would_not_look_for_the_status(word):
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--max_steps", "5", word, "other"],
        env={**os.environ, "SLURM_JOB_NAME": "qloop"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.endswith(f"{word}: set OUTPUT_DIR or EXPERIMENT before sbatch instead\n")


def test_slurm_signals_the_launchers_and_leaves_them_as_long_as_they_wait():
    """Not the script ("B:"): it could only pass the signal to srun, which kills its tasks then."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --signal=")]
    name, seconds = line.removeprefix("#SBATCH --signal=").split("@")
    assert name == "TERM"
    waited = text.split("{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-")[1].split("}")[0]
    assert 30 < int(waited) < int(seconds)


def test_the_kubernetes_job_has_time_to_save_and_storage_that_all_pods_share():
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert job["kind"] == "TrainJob"
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    # Without a trainer in the job, Kubeflow sets none of the variables that the command reads.
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    seconds = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 < seconds < pod["terminationGracePeriodSeconds"]
    assert "SIGTERM" in environment["PET_SIGNALS_TO_HANDLE"].split(",")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "persistentVolumeClaim" in volumes["storage"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"--output_dir={mounts['storage']}/output" in container["args"]


def test_the_launcher_of_several_processes_passes_signals_on_and_waits(script):
    environment = script.LAUNCHER_ENVIRONMENT
    assert "SIGUSR1" in environment["PET_SIGNALS_TO_HANDLE"].split(",")
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30, "torch's own"
