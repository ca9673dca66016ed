"""The table of `qloop checkpoint`: all checkpoints of a run and their state. Read-only."""

from pathlib import Path
from typing import NamedTuple

from qloop.checkpoint.store import (
    CheckpointStore,
    DamagedError,
    GoodCheckpoint,
    Manifest,
    find_best,
    locate_checkpoints,
)
from qloop.errors import CheckpointError
from qloop.storage.folders import show_bytes


class Listed(NamedTuple):
    """A checkpoint: a good one has a manifest, a damaged one has None and a problem."""

    path: Path
    manifest: Manifest | None
    problem: str


def list_checkpoints(run: Path, with_hashes: bool = True) -> list[Listed]:
    """Examines all checkpoints of a run: the oldest first, at the end those moved aside.

    Without hashes, only names and sizes are compared.

    Raises:
        CheckpointError: There is none, or one cannot be read.
    """
    store, paths = locate_checkpoints(run)
    if paths != [run]:
        paths += store.list_damaged()
    if not paths:
        raise CheckpointError(f"{run}: holds no checkpoint; give a run's folder or a checkpoint-N")
    return [_examine(store, path, with_hashes) for path in paths]


def format_table(listed: list[Listed], with_hashes: bool = True) -> str:
    """Returns a table with the name, size, losses and state of each checkpoint."""
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
