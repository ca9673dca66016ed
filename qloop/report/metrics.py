"""Files that a program reads: one JSON line per step, and the held-out results."""

from dataclasses import dataclass

import torch

from qloop.data.packing import BlockIndex, Integers
from qloop.hardware import measure_memory
from qloop.model.flops import ModelFlops
from qloop.steps import Progress


@dataclass(frozen=True)
class StepRecord:
    """All that is known of a step; a line of metrics.jsonl."""

    step: int
    loss: float
    """Nats per target, over the whole step and all ranks."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    target_tokens: int
    tokens_seen: int
    blocks_seen: int
    epoch: float
    data_seconds: float
    forward_backward_seconds: float
    update_seconds: float
    tokens_per_second: float
    """Targets of all ranks over the step's seconds."""
    padding_share: float
    """Of the step's positions; 0 to 1."""
    flops_per_second: float | None
    """Model FLOPs of all ranks over the step's seconds, see model.flops; none if not countable."""
    mfu: float | None
    """Those as a share of what the devices reach in a plain matrix product; 0 to 1."""
    memory_bytes: int
    """In tensors on this rank's GPU; on a CPU, resident memory of this process."""
    peak_memory_bytes: int
    """The most of it since the start of the process."""
    reserved_memory_bytes: int
    """What torch keeps of the GPU, in use or not; on a CPU, the same as memory_bytes."""


@dataclass(frozen=True)
class Meter:
    """Measures what a step cost: on the host, from the lengths of its slices."""

    index: BlockIndex
    flops: ModelFlops | None
    matmul_flops: float
    """FLOP/s that the devices of all ranks together reach in a matrix product."""
    device: torch.device
    memory_before: int
    """Bytes in use before there was a model: on a CPU, Python and its libraries."""

    def measure_peak(self) -> int:
        """Gives the most that model and training have used, in bytes."""
        return measure_memory(self.device).peak - self.memory_before

    def count_work(self, block_ids: Integers) -> tuple[int | None, float]:
        """Gives the model FLOPs of some blocks, and the share of their positions that is padding.

        Padding is computed like any document, but nobody asked for it: its FLOPs do not count.
        """
        lengths, padding = self.index.lengths_of(block_ids)
        share = float(padding.sum()) / (len(block_ids) * self.index.block_length)
        return (None if self.flops is None else self.flops.of(lengths)), share


def build_step_record(
    progress: Progress,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    target_tokens: int,
    block_ids: Integers,
    meter: Meter,
    times: tuple[float, float, float, float],
) -> StepRecord:
    """Builds the record of the step that `progress` has just accounted for.

    Args:
        progress: After the step.
        loss: Nats per target.
        learning_rate: The step's.
        grad_norm: Before clipping.
        target_tokens: The step's, over all ranks.
        block_ids: The step's, over all ranks.
        meter: Of this run.
        times: Clock at the start, when the data was there, the gradients, and the new weights.
    """
    started, fetched, computed, updated = times
    flops, padding_share = meter.count_work(block_ids)
    flops_per_second = None if flops is None else flops / (updated - started)
    memory = measure_memory(meter.device)
    return StepRecord(
        step=progress.step,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        target_tokens=target_tokens,
        tokens_seen=progress.tokens_seen,
        blocks_seen=progress.blocks_seen,
        epoch=progress.blocks_seen / len(meter.index),
        data_seconds=fetched - started,
        forward_backward_seconds=computed - fetched,
        update_seconds=updated - computed,
        tokens_per_second=target_tokens / (updated - started),
        padding_share=padding_share,
        flops_per_second=flops_per_second,
        mfu=None if flops_per_second is None else flops_per_second / meter.matmul_flops,
        memory_bytes=memory.now,
        peak_memory_bytes=memory.peak,
        reserved_memory_bytes=memory.reserved,
    )
