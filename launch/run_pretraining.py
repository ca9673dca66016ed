"""Starts `qloop train` on all GPUs of this machine, with the same flags.

    python launch/run_pretraining.py --model_name Qwen/Qwen2.5-7B-Instruct --data_type filtered \
        --training_method lora --max_steps 500

With several GPUs it runs `accelerate launch --multi_gpu -m qloop train` with the number of
processes filled in. With one or none it runs `python -m qloop train`: a launcher would only hide
the exit code and keep signals from the run. To shard a model or to use several machines, call
`accelerate launch` with launch/fsdp2.yaml or another file of that folder.
"""

import os
import sys

import torch


def build_command(num_gpus: int, arguments: list[str]) -> list[str]:
    """Builds the command line that starts one process per GPU."""
    if num_gpus < 2:
        return [sys.executable, "-m", "qloop", "train", *arguments]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes", str(num_gpus), "--num_machines", "1"),
        # Precision and compilation are keys of qloop; the launcher must not choose its own.
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "qloop", "train", *arguments),
    ]


# The launcher forwards these signals to every process, and waits this many seconds for a step and a
# save before it kills the processes.
LAUNCHER_ENVIRONMENT = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}

if __name__ == "__main__":
    for name, value in LAUNCHER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    command = build_command(torch.cuda.device_count(), sys.argv[1:])
    # Replaces this process, so that signals and exit codes pass directly.
    os.execv(command[0], command)
