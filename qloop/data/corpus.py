"""The tokenised corpus: two token stores, the ledger, and which documents are held out."""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qloop.data.documents import Document, Refusal, Source
from qloop.data.encoder import Encoder
from qloop.data.tokens import StoreWriter, TokenStore, open_store
from qloop.errors import DataError
from qloop.storage.folders import delete_leftovers, whole_folder

FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """The tokenised corpus and the account of its reading."""

    train: TokenStore
    held_out: TokenStore | None
    report: dict[str, Any]
    fingerprint: str
    """Names the content: the same corpus has the same, wherever it lies."""
    was_cached: bool


def build_corpus(
    train: Source,
    held_out: Source | None,
    encoder: Encoder,
    cache_dir: Path,
    held_out_share: float,
    train_on_prompt: bool,
    deduplicate: bool,
) -> tuple[Path, bool]:
    """Makes sure that this content is tokenised.

    Args:
        train: Documents to learn from, and to hold some out of if `held_out` is none.
        held_out: Documents never to learn from.
        encoder: The tokenizer.
        cache_dir: Where stores are kept; safe to delete.
        held_out_share: Of the training documents, when `held_out` is none; 0 holds out nothing.
        train_on_prompt: Whether a prompt's tokens are targets.
        deduplicate: Whether exact copies are left out.

    Returns:
        The folder of its stores, and whether it was there before.

    Raises:
        DataError: Nothing is usable, or no document is on one of the two sides.
    """
    settings = {
        "format": FORMAT,
        "train": train.fingerprint,
        "held_out": held_out.fingerprint if held_out else held_out_share,
        "tokenizer": encoder.fingerprint,
        "train_on_prompt": train_on_prompt,
        "deduplicate": deduplicate,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / "tokens" / key
    was_cached = folder.is_dir()
    if not was_cached:
        delete_leftovers(folder.parent)
        sides = _split(train, held_out, held_out_share)
        holds_out = held_out is not None or held_out_share > 0
        try:
            with whole_folder(folder) as building:
                report = _build(sides, encoder, building, train_on_prompt, deduplicate, holds_out)
                (building / "report.json").write_text(json.dumps(report), encoding="utf-8")
        except OSError:
            if not folder.is_dir():  # else another process built the same in the meantime
                raise
    return folder, was_cached


def open_corpus(folder: Path, encoder: Encoder, was_cached: bool) -> Corpus:
    """Maps the stores of a corpus; nothing but the report is read.

    Raises:
        DataError: The folder is not there, or its files are damaged.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: the tokenised corpus is not to be seen from {socket.gethostname()}; "
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
    """Whether a document belongs to the held-out share: by its content alone.

    The first 8 bytes of the hash, read as a number in [0, 1), lie below the share. So a document
    keeps its side whatever else is in the corpus, and equal documents are always on the same side.
    """
    return int.from_bytes(content_hash[:8], "big") < share * 2**64


_Side = tuple[str, Document | Refusal]


def _split(train: Source, held_out: Source | None, share: float) -> Iterator[_Side]:
    """Yields each thing read with its side; the held-out file first, to know its texts."""
    if held_out:
        for item in held_out.documents():
            yield "held_out", item
    for item in train.documents():
        if held_out or isinstance(item, Refusal):
            yield "train", item
        else:
            yield "held_out" if is_held_out(item.content_hash, share) else "train", item


def _build(
    items: Iterator[_Side],
    encoder: Encoder,
    folder: Path,
    train_on_prompt: bool,
    deduplicate: bool,
    holds_out: bool,
) -> dict[str, Any]:
    """Tokenises everything into two stores; returns the report."""
    writers = {
        side: StoreWriter(folder / side, encoder, train_on_prompt) for side in ("train", "held_out")
    }
    refusals: list[dict[str, str]] = []
    reasons: dict[str, Counter[str]] = {side: Counter() for side in writers}
    seen: dict[str, set[bytes]] = {side: set() for side in writers}
    for side, item in items:
        ledger = writers[side].ledger
        ledger.read += 1
        if isinstance(item, Refusal):
            refusals.append({"side": side, **asdict(item)})
            reasons[side][item.reason] += 1
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
        writer.ledger.refused = sum(reasons[side].values())
        writer.ledger.refused_by_reason = dict(reasons[side])
        report[side] = asdict(writer.ledger) if writer.ledger.read else None
    for side in ("train", "held_out"):
        if not writers[side].ledger.documents and (side == "train" or holds_out):
            raise DataError(_nothing_usable(side, report, refusals))
    return {**report, "refusals": refusals}


def _nothing_usable(side: str, report: dict[str, Any], refusals: list[dict[str, str]]) -> str:
    lines = [f"the corpus has no usable {side.replace('_', '-')} document"]
    for name in ("train", "held_out"):
        if report[name]:
            counts = ", ".join(
                f"{word.replace('_', ' ')} {report[name][word]}"
                for word in ("read", "documents", "refused", "duplicates", "also_held_out")
            )
            lines.append(f"  {name}: {counts}")
    lines += [f"  {item['place']}: {item['reason']}: {item['detail']}" for item in refusals[:5]]
    lines.append("  give more documents, or change held_out_share or the eval file")
    return "\n".join(lines)
