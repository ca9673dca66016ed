"""Quantities that follow from (config, step) alone: counters, seeds, block ids, the last step.

There is no data loader and no random state. The blocks and the random numbers of any step can be
computed in any order, on any number of processes:

    >>> block_ids_at(0, step_blocks=4, num_blocks=6, seed=1).tolist()
    [4, 0, 2, 1]
    >>> block_ids_at(4, step_blocks=4, num_blocks=6, seed=1).tolist()  # the epoch ends in mid-step
    [5, 3, 1, 4]
"""

import dataclasses
import functools
import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from qloop.config.keys import BatchConfig, ScheduleConfig
from qloop.errors import ConfigError, DataError, join_names

DEFAULT_MAX_STEPS = 1000
"""Steps of a run with neither max_steps nor num_epochs."""


@dataclasses.dataclass
class Progress:
    """The counters that survive a restart; with the tensors, the whole state of a run."""

    step: int = 0
    """Optimizer updates made."""
    blocks_seen: int = 0
    """Blocks read, over all ranks and epochs."""
    tokens_seen: int = 0
    """Targets trained on."""

    def advance(self, blocks: int, target_tokens: int) -> None:
        """Counts one update."""
        self.step += 1
        self.blocks_seen += blocks
        self.tokens_seen += target_tokens

    def is_due(self, every_steps: int, last_step: int) -> bool:
        """Whether an action due every `every_steps` steps (0: never) and at the end is due now."""
        return self.step == last_step or (every_steps > 0 and self.step % every_steps == 0)


def seed_at(seed: int, step: int, micro_batch: int) -> int:
    """Returns the seed of one forward pass, after `step` updates.

    Micro-batches are numbered in the step over all ranks, so no two ranks share a seed.
    """
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def seed_forward_pass(seed: int) -> None:
    """Seeds torch, Python and numpy: a model's own code may draw from each."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits


def block_ids_at(
    blocks_seen: int, step_blocks: int, num_blocks: int, seed: int
) -> npt.NDArray[np.int64]:
    """Returns the blocks of a step, over all ranks, in their global order.

    Every epoch is a permutation of all `num_blocks` blocks, drawn from (seed, epoch). A step may
    span the end of one epoch and the start of the next. `blocks_seen` counts the blocks read before
    the step; `step_blocks` is batch_size * gradient_accumulation_steps * ranks.
    """
    places = np.arange(blocks_seen, blocks_seen + step_blocks)
    epochs, offsets = np.divmod(places, num_blocks)
    ids = np.empty(step_blocks, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        ids[epochs == epoch] = _permutation(num_blocks, seed, epoch)[offsets[epochs == epoch]]
    return ids


@functools.lru_cache(maxsize=2)
def _permutation(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_blocks)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class StepLayout:
    """How the blocks of a step are divided into micro-batches."""

    blocks: int
    """Over all ranks; fixed for the whole run."""
    accumulation: int
    """Micro-batches of `batch_size` blocks in a step of each rank."""


def divide_step(
    batch: BatchConfig, num_processes: int, saved_blocks: int | None, checkpoint: Path | None
) -> StepLayout:
    """Divides a step among the ranks: the first start fixes its size, later starts keep it.

    With batch_size 1, gradient_accumulation_steps 8 and 2 processes, a step reads 16 blocks.
    Resumed on 4 processes, each makes 4 micro-batches of one block, and every step reads the same
    blocks as before. `saved_blocks` is the checkpoint's step size; None takes the config's.

    Raises:
        ConfigError: The processes cannot divide the step; the message names the numbers that can.
    """
    size = batch.batch_size
    if saved_blocks is None:
        accumulation = batch.gradient_accumulation_steps
        return StepLayout(size * accumulation * num_processes, accumulation)
    accumulation, rest = divmod(saved_blocks, size * num_processes)
    if rest or not accumulation:
        micro_batches, odd = divmod(saved_blocks, size)
        counts = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        can = "lower batch_size" if odd else f"start {join_names(list(map(str, counts)))} processes"
        raise ConfigError(
            f"{checkpoint}: each of its steps reads {saved_blocks} blocks, which cannot be divided "
            f"into micro-batches of batch_size {size} on {num_processes} processes; {can}, or "
            "allow another step size: --allow_change step_blocks"
        )
    return StepLayout(saved_blocks, accumulation)


def count_steps(
    schedule: ScheduleConfig,
    batch: BatchConfig,
    block_length: int,
    num_blocks: int,
    step_blocks: int,
    progress: Progress,
) -> int:
    """Returns the step at which the run ends: max_steps or num_epochs, whichever comes first.

    The last step may read on into another epoch, so that every block is read. `batch` and
    `block_length` only serve the message.

    Raises:
        DataError: The corpus is smaller than one step.
        ConfigError: The warm-up is as long as the run, or the run is already past its end.
    """
    if num_blocks < step_blocks:
        raise DataError(
            f"the corpus fills {num_blocks} blocks of {block_length} tokens, but one step reads "
            f"{step_blocks} (batch_size {batch.batch_size} x gradient_accumulation_steps "
            f"{batch.gradient_accumulation_steps} on every process); lower one of them or "
            "max_seq_length, or give more documents"
        )
    limits = [schedule.max_steps] if schedule.max_steps else []
    if schedule.num_epochs:
        left = schedule.num_epochs * num_blocks - progress.blocks_seen
        limits.append(progress.step + math.ceil(left / step_blocks))
    last_step = min(limits, default=DEFAULT_MAX_STEPS)
    if last_step < progress.step:
        raise ConfigError(
            f"max_steps: the run has made {progress.step} steps already and would end at "
            f"{last_step}; give more, or another --experiment_name"
        )
    if schedule.warmup_steps >= last_step:
        raise ConfigError(
            f"warmup_steps: must be below the run's {last_step} steps, got {schedule.warmup_steps}"
        )
    return last_step
