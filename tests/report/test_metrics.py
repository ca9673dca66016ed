"""The figures of a step."""

import numpy as np
import torch

from qloop.data.packing import pack_wrapped
from qloop.model.flops import Flops, ModelFlops
from qloop.report.files import read_records
from qloop.report.metrics import Meter, StepRecord
from qloop.steps import Progress
from qloop.train import train


def make_meter(flops: ModelFlops | None) -> Meter:
    index = pack_wrapped(np.array([6, 3, 4]), block_length=5)  # 5 | 1 3 1 | 3
    return Meter(index, flops, matmul_flops=1e6, device=torch.device("cpu"), memory_before=0)


def build_record(meter: Meter) -> StepRecord:
    clock = (10.0, 10.5, 12.0, 12.5)
    return meter.build_record(Progress(1, 2, 8), 2.5, 1e-4, 0.5, 8, np.array([2, 0]), clock)


def test_mfu_is_the_steps_flops_by_its_seconds_and_by_what_a_product_reaches():
    flops = ModelFlops(Flops(1000, 2000), attention_width=10, windows={None: 3})
    record = build_record(make_meter(flops))
    # A slice of 5, one of 3: 15 + 6 pairs in each of 3 layers; padding of 2 does not count.
    work = 8 * 3000 + 3 * (4 * 10 * 3 * (15 + 6))
    assert record.flops_per_second == work / 2.5
    assert record.mfu == work / 2.5 / 1e6
    assert record.padding_share == 0.2


def test_what_cannot_be_counted_is_none_and_nothing_else_changes():
    record = build_record(make_meter(None))
    assert (record.flops_per_second, record.mfu) == (None, None)
    assert (record.padding_share, record.tokens_per_second) == (0.2, 3.2)


def test_a_run_says_how_much_of_the_machine_each_step_used(make_config):
    config = make_config()
    train(config, [])
    records = read_records(config.run.output_dir / "run/logs/metrics.jsonl")
    for record in records:
        assert 0 < record["mfu"] < 1
        assert 0 <= record["padding_share"] < 1
        assert 0 < record["memory_bytes"] <= record["peak_memory_bytes"]
