"""Starts `qloop train` on all GPUs of this machine: takes every flag of it, and adds none.

    python launch/run_pretraining.py --model_name Qwen/Qwen2.5-7B-Instruct --data_type filtered \
        --training_method lora --max_steps 500

It is `accelerate launch -m qloop train` with the number of processes filled in. For FSDP,
DeepSpeed or several machines call `accelerate launch --config_file ...` yourself.
"""

import os
import sys

import torch


def build_command(num_gpus: int, arguments: list[str]) -> list[str]:
    """Builds the launcher's command line: one process per GPU, one on a machine that has none."""
    num_processes = max(1, num_gpus)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_processes", str(num_processes), "--num_machines", "1"),
        # Precision and compilation are keys of qloop; this only keeps the launcher from guessing.
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *(["--multi_gpu"] if num_processes > 1 else []),
        *(["--cpu"] if num_gpus == 0 else []),
        *("-m", "qloop", "train", *arguments),
    ]


if __name__ == "__main__":
    command = build_command(torch.cuda.device_count(), sys.argv[1:])
    # Replaces this process, so that a signal or an exit code meets the launcher and nobody between.
    os.execv(command[0], command)
