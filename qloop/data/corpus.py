"""The tokenised corpus: the token stores of both sides, the ledger and the split.

    <cache_dir>/tokens/<fingerprint>/
      train/ held_out/    a token store each
      report.json         the ledger of each side, and every refusal

The fingerprint is a hash of everything that determines the content: the sources' bytes, the
tokenizer and the settings. Editing a file makes a new corpus. The folder is complete or absent.
"""

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qloop.data.documents import Document, Refusal, Source
from qloop.data.encoder import Encoder
from qloop.data.tokens import StoreWriter, TokenStore, open_store
from qloop.errors import DataError
from qloop.storage.folders import delete_leftovers, whole_folder

_FORMAT = 1
"""Version of the folder's files; part of the fingerprint."""
_SIDES = ("train", "held_out")
_Item = tuple[str, Document | Refusal]
"""A side, and an item read for it."""


@dataclass(frozen=True)
class Corpus:
    """An open corpus."""

    train: TokenStore
    held_out: TokenStore | None
    report: dict[str, Any]
    """Ledger of each side by its name (None if nothing was read), and `refusals`."""
    fingerprint: str
    """Hash that identifies the content; independent of where the files are."""
    was_cached: bool


def build_corpus(
    train: Source,
    held_out: Source | None,
    encoder: Encoder,
    cache_dir: Path,
    *,
    held_out_share: float,
    train_on_prompt: bool,
    deduplicate: bool,
) -> tuple[Path, bool]:
    """Tokenises the documents, unless the cache has their stores.

    Without a `held_out` source, `held_out_share` of the training documents, in [0, 1), is held out.
    `deduplicate` leaves out exact copies. `cache_dir` is safe to delete.

    Returns:
        The corpus's folder, and whether it existed before.

    Raises:
        DataError: A source cannot be read, or one of the two sides has no usable document.
        OSError: The disk refuses.
    """
    settings = {
        "format": _FORMAT,
        "train": train.fingerprint,
        "held_out": held_out.fingerprint if held_out else held_out_share,
        "tokenizer": encoder.fingerprint,
        "train_on_prompt": train_on_prompt,
        "deduplicate": deduplicate,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / "tokens" / key
    if folder.is_dir():
        return folder, True
    delete_leftovers(folder.parent)
    try:
        with whole_folder(folder) as building:
            writers = {
                side: StoreWriter(building / side, encoder, train_on_prompt) for side in _SIDES
            }
            report = _write_stores(_split(train, held_out, held_out_share), writers, deduplicate)
            _refuse_empty(report, _SIDES if held_out or held_out_share else ("train",))
            (building / "report.json").write_text(json.dumps(report), encoding="utf-8")
    except OSError:
        if not folder.is_dir():  # else another process has built it meanwhile
            raise
    return folder, False


def open_corpus(folder: Path, encoder: Encoder, was_cached: bool) -> Corpus:
    """Maps the stores of a corpus into memory; reads only the report.

    Raises:
        DataError: The folder does not exist, or its files are damaged.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: the tokenised corpus does not exist on {socket.gethostname()}; "
            "--cache_dir must be a folder that all machines of the run share"
        )
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return Corpus(
            train=open_store(folder / "train", encoder),
            held_out=open_store(folder / "held_out", encoder) if report["held_out"] else None,
            report=report,
            fingerprint=folder.name,
            was_cached=was_cached,
        )
    except (FileNotFoundError, ValueError, EOFError, KeyError) as error:
        raise DataError(
            f"{folder}: the tokenised corpus is damaged: {error}; delete this folder, and the same "
            "command tokenises it anew"
        ) from error


def is_held_out(content_hash: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out share, by its content alone.

    It does if the first 8 bytes of the hash, read as a number in [0, 1), are below the share. So a
    document keeps its side when others come or go, and equal documents share a side.
    """
    return int.from_bytes(content_hash[:8], "big") < share * 2**64


def _split(train: Source, held_out: Source | None, share: float) -> Iterator[_Item]:
    """Yields each item with its side; those of a held-out source come first."""
    if held_out:
        for item in held_out.documents():
            yield "held_out", item
    for item in train.documents():
        if held_out or isinstance(item, Refusal):
            yield "train", item
        else:
            yield "held_out" if is_held_out(item.content_hash, share) else "train", item


def _write_stores(
    items: Iterator[_Item], writers: dict[str, StoreWriter], deduplicate: bool
) -> dict[str, Any]:
    """Writes each usable document to the store of its side; returns the report."""
    refusals: list[dict[str, str]] = []
    seen: dict[str, set[bytes]] = {side: set() for side in writers}
    for side, item in items:
        ledger = writers[side].ledger
        ledger.read += 1
        if isinstance(item, Refusal):
            refusals.append({"side": side, **asdict(item)})
            ledger.refused += 1
            reasons = ledger.refused_by_reason
            reasons[item.reason] = reasons.get(item.reason, 0) + 1
        elif side == "train" and item.content_hash in seen["held_out"]:
            ledger.also_held_out += 1
        elif deduplicate and item.content_hash in seen[side]:
            ledger.duplicates += 1
        else:
            if deduplicate or side == "held_out":
                seen[side].add(item.content_hash)
            writers[side].add(item)
    report: dict[str, Any] = {}
    for side, writer in writers.items():
        writer.close()
        report[side] = asdict(writer.ledger) if writer.ledger.read else None
    return {**report, "refusals": refusals}


def _refuse_empty(report: dict[str, Any], required: tuple[str, ...]) -> None:
    empty = next((side for side in required if not (report[side] or {}).get("documents")), None)
    if empty is None:
        return
    lines = [f"the corpus has no usable {empty.replace('_', '-')} document"]
    for side in _SIDES:
        if report[side]:
            counts = ", ".join(
                f"{name.replace('_', ' ')} {report[side][name]}"
                for name in ("read", "documents", "refused", "duplicates", "also_held_out")
            )
            lines.append(f"  {side}: {counts}")
    refusals = report["refusals"][:5]
    lines += [f"  {item['place']}: {item['reason']}: {item['detail']}" for item in refusals]
    lines.append("  give more documents, or change held_out_share or the eval file")
    raise DataError("\n".join(lines))
