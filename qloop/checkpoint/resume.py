"""What a run goes on from: the newest good checkpoint, if it is this run's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qloop.checkpoint.saved import Checkpoint, Origins, config_of, read_checkpoint
from qloop.checkpoint.store import CheckpointStore, DamagedError, Kept
from qloop.config.keys import Config, find_changes
from qloop.errors import CheckpointError, ConfigError, join_names
from qloop.storage.filesystem import FileSystem

_WORDS = ("auto", "never", "restart")


def choose_checkpoint(
    config: Config, store: CheckpointStore, tell: Callable[[str], None]
) -> Checkpoint | None:
    """Finds what to go on from; every byte of it is as it was written.

    Args:
        config: With `resume`.
        store: The run's own checkpoints.
        tell: Gets a line on each damaged checkpoint; it is moved aside.

    Raises:
        ConfigError: Going on would overwrite steps, or change what the run is.
        CheckpointError: The checkpoint that was asked for is damaged or missing; or all are
            damaged, and starting anew was not asked for.
    """
    resume = config.run.resume
    try:
        newest = store.find_newest(tell)
    except OSError as error:
        raise CheckpointError(f"{store.folder}: cannot be read or mended: {error}") from error
    if newest is None and resume == "auto":
        _refuse_to_start_afresh(store)
    if resume == "restart":
        _refuse_to_overwrite(newest)
    path = newest.path if newest else None
    if resume not in _WORDS:
        path = Path(resume)
        _verify_named(path)
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    changes = find_changes(config_of(checkpoint), config)
    if changes:
        raise ConfigError(
            f"{path}: was made with other settings:\n  " + "\n  ".join(changes) + "\n"
            "take its own values to go on with it, or name the keys that may change: "
            f"--allow_change {','.join(change.split(':')[0] for change in changes)}"
        )
    if newest and newest.manifest.step > checkpoint.progress.step:
        raise ConfigError(
            f"resume: {path} is older than {newest.path}, whose steps would be written anew; give "
            "another --experiment_name to branch off, or --resume auto to go on from the newest"
        )
    return checkpoint


def refuse_other_origins(
    checkpoint: Checkpoint, origins: Origins, allow_change: tuple[str, ...]
) -> None:
    """Makes sure that a run goes on with what it was made of.

    Raises:
        ConfigError: The corpus, the tokenizer or the frozen base is another, and `allow_change`
            does not name it.
    """
    before, now = checkpoint.origins.fingerprints, origins.fingerprints
    other = [name for name in now if before.get(name) != now[name] and name not in allow_change]
    if other:
        shown = [f"{name}: {str(before.get(name))[:12]} -> {now[name][:12]}" for name in other]
        raise ConfigError(
            f"{checkpoint.path}: was made of something else, so going on would make another run "
            "of it:\n  " + "\n  ".join(shown) + "\n"
            "bring back what was there, or give another --experiment_name, or say that it may "
            f"change: --allow_change {','.join(other)}"
        )


@dataclass(frozen=True)
class Step:
    """How the blocks of a step are divided."""

    blocks: int
    """Over all ranks; they belong to the run."""
    accumulation: int
    """Micro-batches of `batch_size` blocks that each rank makes of them."""
    notes: tuple[str, ...] = ()
    """What the person should know of it."""


def divide_step(config: Config, num_processes: int, checkpoint: Checkpoint | None) -> Step:
    """Divides a step among the ranks: the first start decides its blocks, later ones follow.

    With batch_size 1, gradient_accumulation_steps 8 and 2 processes a step reads 16 blocks; gone on
    with by 4 processes, each makes 4 micro-batches of one block, and every step reads the blocks
    that it would have read.

    Raises:
        ConfigError: The processes cannot divide the step; with the numbers that can.
    """
    batch = config.batch
    wanted = Step(
        batch.batch_size * batch.gradient_accumulation_steps * num_processes,
        batch.gradient_accumulation_steps,
    )
    if not checkpoint or "step_blocks" in config.run.allow_change:
        return wanted
    blocks = checkpoint.origins.step_blocks
    accumulation, rest = divmod(blocks, batch.batch_size * num_processes)
    if rest or not accumulation:
        micro_batches, odd = divmod(blocks, batch.batch_size)
        counts = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        can = "lower batch_size" if odd else f"start {join_names(list(map(str, counts)))} processes"
        raise ConfigError(
            f"{checkpoint.path}: each of its steps reads {blocks} blocks, which do not divide by "
            f"batch_size {batch.batch_size} x {num_processes} processes; {can}, or let the step "
            "become another: --allow_change step_blocks"
        )
    notes: tuple[str, ...] = ()
    if accumulation != batch.gradient_accumulation_steps:
        notes = (
            f"step       reads {blocks} blocks, as this run has it from the start: "
            f"gradient_accumulation_steps is {accumulation} on every process, not "
            f"{batch.gradient_accumulation_steps}",
        )
    return Step(blocks, accumulation, notes)


def _refuse_to_start_afresh(store: CheckpointStore) -> None:
    damaged = [path.name for path in store.list_damaged()]
    if damaged:
        raise CheckpointError(
            f"{store.folder}: no good checkpoint is left, only {', '.join(damaged)}; bring one "
            "back from a copy under its own name, or start at step 0 with --resume restart"
        )


def _refuse_to_overwrite(newest: Kept | None) -> None:
    if newest:
        raise ConfigError(
            f"resume: restart is for runs whose checkpoints are all damaged, but {newest.path} is "
            "good; give --resume auto to go on, or another --experiment_name to start anew"
        )


def _verify_named(path: Path) -> None:
    try:
        CheckpointStore(path.parent, FileSystem()).verify(path)
    except (DamagedError, OSError) as error:
        raise CheckpointError(
            f"resume: {path}: not a good checkpoint: {error}; give another, or --resume auto for "
            "the newest good one"
        ) from error
