"""One contestant of peers.py in a process of its own: trains some steps, prints what it measured.

python tests/benchmarks/contestants.py NAME SETUP.json

All train the same model from the same seed on the same documents in the same type. What is counted
is what is learned: positions with a label, whatever else a contestant puts into its batches.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from qloop.hardware import measure_memory


class Setup(NamedTuple):
    """What all contestants are given."""

    corpus: str
    model: str
    """Folder of config.json, perhaps with weights; else they are random."""
    tokenizer: str
    method: str
    batch_size: int
    length: int
    accumulation: int
    warmup_steps: int
    """Steps before those that are measured."""
    steps: int
    precision: str
    folder: str
    qloop_flags: dict[str, str]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def all_steps(self) -> int:
        return self.warmup_steps + self.steps


class Record(NamedTuple):
    """A step."""

    seconds: float
    targets: int
    flops: float
    """Of the model, for documents of the lengths that were trained on; see qloop.model.flops."""
    peak_bytes: int
    """So far."""


def wait(setup: Setup) -> None:
    """So that a clock shows what a GPU has done, not what it was asked for."""
    if setup.device.type == "cuda":
        torch.cuda.synchronize()


def build_flops(setup: Setup):
    from qloop.config.keys import LoraConfig, ModelConfig
    from qloop.model.flops import build_model_flops
    from qloop.planning.meta_model import build_meta_model

    config = ModelConfig(model_name=setup.model, training_method=setup.method)
    return build_model_flops(build_meta_model(config, LoraConfig(), setup.precision))


def record(setup: Setup, started: float, targets: int, lengths: list[int]) -> Record:
    """Ends a step."""
    wait(setup)
    seconds = time.perf_counter() - started
    peak = measure_memory(setup.device).peak
    return Record(seconds, targets, build_flops(setup).of(np.array(lengths)), peak)


def read_documents(setup: Setup) -> list[str]:
    """Reads the very documents that qloop trains on, by qloop's reader."""
    from qloop.data.documents import Document, iterate_documents, list_source_files

    found = iterate_documents(list_source_files(Path(setup.corpus)), "text")
    texts = [document.text for document in found if isinstance(document, Document)]
    return list(dict.fromkeys(texts))  # copies are left out there


def build_plain_model(setup: Setup):
    """Builds as people do: fp32 masters for full, the base's own type for adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if setup.method == "full" else setup.dtype
    if has_weights(setup):
        return AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(setup.model), dtype=dtype)


def has_weights(setup: Setup) -> bool:
    return any(Path(setup.model).glob("*.safetensors"))


def load_plain_tokenizer(setup: Setup):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(setup.tokenizer)


def run_plain(setup: Setup) -> list[Record]:
    """A loop as one writes it first: a document at a time, cut at the block's length."""
    assert setup.method == "full"
    tokenizer = load_plain_tokenizer(setup)
    pieces = []
    for text in read_documents(setup):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        pieces += [ids[first : first + setup.length] for first in range(0, len(ids), setup.length)]
    order = np.random.default_rng(0).permutation(
        [n for n, ids in enumerate(pieces) if len(ids) > 1]
    )
    model = build_plain_model(setup).to(setup.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    records, next_piece = [], 0
    for _ in range(setup.all_steps):
        wait(setup)
        started, lengths = time.perf_counter(), []
        for _ in range(setup.accumulation):
            ids = torch.tensor([pieces[order[next_piece % len(order)]]], device=setup.device)
            next_piece += 1
            lengths.append(ids.shape[1])
            with torch.autocast(setup.device.type, torch.bfloat16, setup.precision == "bf16"):
                loss = model(input_ids=ids, labels=ids).loss
            (loss / setup.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        records.append(record(setup, started, sum(lengths) - len(lengths), lengths))
    return records


def run_trl(setup: Setup, at_its_best: bool) -> list[Record]:
    """TRL's trainer, as the reference pipeline configures it or with all that makes it fast."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    records: list[Record] = []
    seen: list[tuple[int, list[int]]] = []

    class Counted(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(count_trl(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.clear()
            wait(setup)
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            lengths = [length for _, some in seen for length in some]
            targets = sum(targets for targets, _ in seen)
            records.append(record(setup, self.started, targets, lengths))

    best = {"packing": True, "packing_strategy": "bfd_split", "gradient_checkpointing": False}
    has_liger = setup.device.type == "cuda" and is_installed("liger_kernel")
    config = SFTConfig(
        output_dir=setup.folder,
        max_length=setup.length,
        per_device_train_batch_size=setup.batch_size,
        gradient_accumulation_steps=setup.accumulation,
        max_steps=setup.all_steps,
        learning_rate=1e-5,
        warmup_steps=1,
        seed=0,
        bf16=setup.precision == "bf16",
        use_cpu=setup.device.type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        **(best if at_its_best else {"packing": False, "gradient_checkpointing": True}),
        **({"use_liger_kernel": True} if at_its_best and has_liger else {}),
    )
    tokenizer = load_plain_tokenizer(setup)
    adapters = {}
    if setup.method != "full":
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    trainer = Counted(
        model=build_plain_model(setup),
        args=config,
        train_dataset=Dataset.from_dict({"text": read_documents(setup)}),
        processing_class=tokenizer,
        callbacks=[Clock()],
        **adapters,
    )
    trainer.train()
    return records


def count_trl(inputs) -> tuple[int, list[int]]:
    """Counts targets, and the lengths of documents by their positions or their masks."""
    labels = inputs["labels"]
    targets = int((labels[:, 1:] != -100).sum())
    if "position_ids" in inputs:
        starts = (inputs["position_ids"].flatten() == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], labels.numel()]
        return targets, [end - start for start, end in zip(starts, ends, strict=True)]
    return targets, inputs["attention_mask"].sum(dim=1).tolist()


def run_qloop(setup: Setup, **keys: str) -> list[Record]:
    """The real command's own parts, with its defaults, but for what is saved at the end."""
    from qloop.config.loading import load_config
    from qloop.distributed.stops import StopRequest
    from qloop.report.files import read_records
    from qloop.run import build_run
    from qloop.train import run_steps

    name = "model_name" if has_weights(setup) else "model_config_file"
    flags = {
        "train_file": setup.corpus,
        "output_dir": setup.folder,
        "experiment_name": "run",
        "training_method": setup.method,
        name: setup.model if has_weights(setup) else f"{setup.model}/config.json",
        "tokenizer_name": setup.tokenizer,
        "held_out_share": "0.0",
        "max_seq_length": setup.length,
        "batch_size": setup.batch_size,
        "gradient_accumulation_steps": setup.accumulation,
        "max_steps": setup.all_steps,
        "warmup_steps": 0,
        "learning_rate": "1e-5",
        "precision": setup.precision,
        **setup.qloop_flags,
        **keys,
    }
    config = load_config(None, {key: str(value) for key, value in flags.items()}).config
    with StopRequest() as stop:
        run = build_run(config)
        run.checkpoints.save = lambda *_: None
        run_steps(run, stop)
    records = []
    for step in read_records(run.folder.directory.metrics):
        seconds = step["target_tokens"] / step["tokens_per_second"]
        flops = step["flops_per_second"] * seconds
        records.append(Record(seconds, step["target_tokens"], flops, step["peak_memory_bytes"]))
    if not isinstance(run.built.plan, str):
        planned.append(run.built.plan.peak_bytes)
    return records


planned: list[int] = []
"""Bytes at the peak, as qloop planned them."""


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


CONTESTANTS = {
    "qloop": run_qloop,
    "qloop, compiled": lambda setup: run_qloop(setup, compile="true"),
    "TRL at its best": lambda setup: run_trl(setup, at_its_best=True),
    "TRL as the reference has it": lambda setup: run_trl(setup, at_its_best=False),
    "a plain loop": run_plain,
}


def main() -> None:
    from qloop.hardware import measure_matmul_flops

    name, file = sys.argv[1:]
    setup = Setup(**json.loads(Path(file).read_text()))
    output = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no result
    import transformers

    if name.startswith("TRL"):
        import trl  # noqa: F401  (before memory is looked at)
    transformers.utils.logging.set_verbosity_error()
    matmul_flops = measure_matmul_flops(setup.device, setup.dtype)
    if setup.device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    else:
        torch.cuda.reset_peak_memory_stats()
    before = measure_memory(setup.device).now
    records = CONTESTANTS[name](setup)[setup.warmup_steps :]
    seconds = sum(record.seconds for record in records)
    result = {
        "name": name,
        "targets_per_second": sum(record.targets for record in records) / seconds,
        "flops_per_second": sum(record.flops for record in records) / seconds,
        "targets": sum(record.targets for record in records),
        "peak_bytes": records[-1].peak_bytes - before,
        "matmul_flops": matmul_flops,
        "planned_bytes": planned[0] if planned else None,
    }
    print(json.dumps(result), file=output, flush=True)
    os._exit(0)  # trainers leave threads behind


if __name__ == "__main__":
    main()
