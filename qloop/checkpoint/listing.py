"""`qloop checkpoint`: what is there, and whether it is good; reads, and changes nothing."""

from pathlib import Path
from typing import NamedTuple

from qloop.checkpoint.store import (
    CheckpointStore,
    DamagedError,
    GoodCheckpoint,
    Manifest,
    find_best,
)
from qloop.errors import CheckpointError
from qloop.storage.filesystem import FileSystem
from qloop.storage.folders import show_bytes


class Listed(NamedTuple):
    """A step directory as it was found."""

    path: Path
    manifest: Manifest | None
    """None where it is damaged."""
    problem: str


def list_checkpoints(run: Path, with_hashes: bool = True) -> list[Listed]:
    """Examines all checkpoints of a run, the oldest first, then those that were moved aside.

    Args:
        run: A run's folder, its checkpoints folder, or one checkpoint.
        with_hashes: False looks at names and sizes only.

    Raises:
        CheckpointError: It is none of these, or may not be read.
    """
    if (run / "COMMIT").exists() or (run / "manifest.json").exists():
        store, paths = CheckpointStore(run.parent, FileSystem()), [run]
    else:
        folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
        store = CheckpointStore(folder, FileSystem())
        paths = [*store.list_checkpoints(), *store.list_damaged()]
    if not paths:
        raise CheckpointError(f"{run}: holds no checkpoint; give a run's folder or a checkpoint-N")
    return [_examine(store, path, with_hashes) for path in paths]


def format_table(listed: list[Listed], with_hashes: bool = True) -> str:
    """Shows name, size, losses and state of each, in columns."""
    good = [
        GoodCheckpoint(path, manifest)
        for path, manifest, _ in listed
        if manifest and path.name.startswith("checkpoint-")
    ]
    best = find_best(good)
    rows: list[tuple[str, ...]] = [("checkpoint", "size", "held-out loss", "loss", "state")]
    for path, manifest, problem in listed:
        if manifest is None:
            rows.append((path.name, "", "", "", f"damaged: {problem}"))
            continue
        state = "good" if with_hashes else "whole by names and sizes"
        if best and best.path == path:
            state += ", best"
        losses = [_show_loss(manifest.held_out_loss), _show_loss(manifest.facts.get("loss"))]
        rows.append((path.name, show_bytes(manifest.total_bytes), *losses, state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *figures, state in rows:
        columns = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns, state]))
    return "\n".join(lines)


def _examine(store: CheckpointStore, path: Path, with_hashes: bool) -> Listed:
    try:
        return Listed(path, store.verify(path, with_hashes), "")
    except DamagedError as error:
        return Listed(path, None, str(error))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _show_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
