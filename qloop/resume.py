"""What a run goes on from: the newest good checkpoint, if it is this run's."""

from collections.abc import Callable
from pathlib import Path

from qloop.checkpoint.filesystem import FileSystem
from qloop.checkpoint.manager import Checkpoint, Origins, read_checkpoint
from qloop.checkpoint.store import CheckpointStore, DamagedError, Kept
from qloop.config import Config, find_changes
from qloop.errors import CheckpointError, ConfigError

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
    try:
        before = Config.model_validate(checkpoint.origins.config)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its config is none of this version of qloop: {error}; go on with the version "
            "that wrote it, or give another --experiment_name"
        ) from error
    changes = find_changes(before, config)
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
        ConfigError: The corpus, the tokenizer, the frozen base or the size of a step is another,
            and `allow_change` does not name it.
    """
    before = {**checkpoint.origins.fingerprints, "step_blocks": checkpoint.origins.step_blocks}
    now = {**origins.fingerprints, "step_blocks": origins.step_blocks}
    other = [name for name in now if before.get(name) != now[name] and name not in allow_change]
    if other:
        shown = [f"{name}: {_show(before.get(name))} -> {_show(now[name])}" for name in other]
        raise ConfigError(
            f"{checkpoint.path}: was made of something else, so going on would make another run "
            "of it:\n  " + "\n  ".join(shown) + "\n"
            "bring back what was there, or give another --experiment_name, or say that it may "
            f"change: --allow_change {','.join(other)}"
        )


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


def _show(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
