"""What a rank of FSDP2 holds while a model is built: inside.py FLAGS.json FOLDER, by two processes.

Builds as a run does, and writes what it found to FOLDER/<rank>.json.
"""

import json
import os
import sys
from pathlib import Path

import on_cpu  # noqa: F401  (changes what accelerate takes the machine for)
import torch
from torch.distributed.tensor import DTensor

from qloop.config.loading import load_config
from qloop.distributed.accelerator import build_accelerator, build_engine, reads_weights
from qloop.hardware import choose_precision
from qloop.model.build import build_model


def resident_bytes() -> int:
    """Memory that this process has, mapped files too; untouched places are not in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    flags, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    config = load_config(None, flags).config
    accelerator = build_accelerator(config.model, config.batch, config.optimizer)
    assert accelerator.num_processes == 2
    precision = choose_precision(config.model.precision, accelerator.device)
    before = resident_bytes()
    model = build_model(
        config.model,
        config.lora,
        precision,
        accelerator.device,
        seed=1,
        is_sharded=True,
        reads_weights=reads_weights(accelerator),
    )
    built = resident_bytes() - before
    size = sum(parameter.nbytes for parameter in model.parameters())
    engine = build_engine(accelerator, model, config.optimizer, 1)
    del model
    parameters = dict(engine.unwrapped.named_parameters())
    four_bits = [p for n, p in parameters.items() if n.endswith("base_layer.weight")]
    facts = {
        "model_bytes": size,
        "built_bytes": built,
        "local_bytes": sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters.values()
        ),
        "trained": len(engine.trained),
        # A parameter that the optimizer has twice, or not at all, would not be trained.
        "optimized": len({id(p) for g in engine.optimizer.param_groups for p in g["params"]}),
        "sharded_base_layers": sum(isinstance(p, DTensor) for p in four_bits),
        "base_layers": len(four_bits),
        "buffers": float(sum(buffer.double().sum() for buffer in engine.unwrapped.buffers())),
        "checksum": sum(float(_whole(p).double().abs().sum()) for p in engine.trained.values()),
    }
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
