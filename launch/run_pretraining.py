"""Starts `qloop train` on all GPUs of this machine: takes every flag of it, and adds none.

    python launch/run_pretraining.py --model_name Qwen/Qwen2.5-7B-Instruct --data_type filtered \
        --training_method lora --max_steps 500

With several GPUs it is `accelerate launch --multi_gpu -m qloop train` with the number of processes
filled in. With one, or none, it is `python -m qloop train`: the launcher would only stand between,
hide the exit code, and keep signals from the run. To shard a model, or for several machines, use
`accelerate launch --config_file launch/fsdp2.yaml` and its neighbours.
"""

import os
import sys

import torch


def build_command(num_gpus: int, arguments: list[str]) -> list[str]:
    """Builds the command line of one process per GPU."""
    if num_gpus < 2:
        return [sys.executable, "-m", "qloop", "train", *arguments]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes", str(num_gpus), "--num_machines", "1"),
        # Precision and compilation are keys of qloop; this only keeps the launcher from guessing.
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "qloop", "train", *arguments),
    ]


# A SIGTERM or SIGUSR1 to the launcher reaches every process, which then has the time that a step
# and a save may take before it is killed.
LAUNCHER_ENVIRONMENT = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}

if __name__ == "__main__":
    for name, value in LAUNCHER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    command = build_command(torch.cuda.device_count(), sys.argv[1:])
    # Replaces this process, so that a signal or an exit code meets the launcher and nobody between.
    os.execv(command[0], command)
