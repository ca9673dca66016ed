"""`qloop` on a CPU under FSDP2 or DeepSpeed, which accelerate keeps for GPUs.

    accelerate launch --config_file ... tests/distributed/on_cpu.py train ...

All that is changed is what accelerate takes the machine for; everything else is the real thing, on
gloo.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def prepare_backend(state, cpu=False, sagemaker_dp=False, backend=None):
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "gloo", DistributedType.MULTI_GPU
    return None, DistributedType.NO


def set_device(state):
    state.device = torch.device("cpu")


PartialState._prepare_backend = prepare_backend
PartialState.default_device = property(lambda state: torch.device("cpu"))
PartialState.set_device = set_device

if __name__ == "__main__":
    from qloop.cli import main

    main()
