"""The record of a step, and the meter that fills it: speed, FLOP/s, padding and memory."""

from dataclasses import dataclass

import torch

from qloop.data.packing import BlockIndex, Integers
from qloop.hardware import measure_memory
from qloop.model.flops import ModelFlops
from qloop.steps import Progress


@dataclass(frozen=True)
class StepRecord:
    """The figures of a step; one line of metrics.jsonl."""

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
    """flops_per_second as a share of the devices' rate in a plain matrix product; 0 to 1."""
    memory_bytes: int
    """In tensors on this rank's GPU; on a CPU, resident memory of this process."""
    peak_memory_bytes: int
    """Its maximum since the start of the process."""
    reserved_memory_bytes: int
    """Memory that torch holds on the GPU, used or not; on a CPU, equal to memory_bytes."""


@dataclass(frozen=True)
class Meter:
    """Measures the cost of a step on the host, from the lengths of its slices."""

    index: BlockIndex
    flops: ModelFlops | None
    matmul_flops: float
    """FLOP/s of a matrix product on the devices of all ranks together."""
    device: torch.device
    memory_before: int
    """Bytes in use before the model was built: on a CPU, Python and its libraries."""

    def measure_peak(self) -> int:
        """Returns the peak memory of model and training, in bytes."""
        return measure_memory(self.device).peak - self.memory_before

    def build_record(
        self,
        progress: Progress,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        target_tokens: int,
        block_ids: Integers,
        times: tuple[float, float, float, float],
    ) -> StepRecord:
        """Builds the record of the step that `progress` has just counted.

        Padding is computed like any document, but its FLOPs do not count.

        Args:
            progress: After the step.
            loss: Nats per target.
            learning_rate: Of the step.
            grad_norm: Before clipping.
            target_tokens: Over all ranks.
            block_ids: Over all ranks.
            times: Clock at the start, and when data, gradients and new weights were ready.
        """
        started, fetched, computed, updated = times
        lengths, padding = self.index.lengths_of(block_ids)
        flops = None if self.flops is None else self.flops.of(lengths)
        flops_per_second = None if flops is None else flops / (updated - started)
        memory = measure_memory(self.device)
        return StepRecord(
            step=progress.step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            target_tokens=target_tokens,
            tokens_seen=progress.tokens_seen,
            blocks_seen=progress.blocks_seen,
            epoch=progress.blocks_seen / len(self.index),
            data_seconds=fetched - started,
            forward_backward_seconds=computed - fetched,
            update_seconds=updated - computed,
            tokens_per_second=target_tokens / (updated - started),
            padding_share=float(padding.sum()) / (len(block_ids) * self.index.block_length),
            flops_per_second=flops_per_second,
            mfu=None if flops_per_second is None else flops_per_second / self.matmul_flops,
            memory_bytes=memory.now,
            peak_memory_bytes=memory.peak,
            reserved_memory_bytes=memory.reserved,
        )
