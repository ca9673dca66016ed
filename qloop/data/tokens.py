"""The token store: documents tokenised once, flat, memory-mapped, found again by their content.

    tokens.bin         every document's tokens, one after another (uint16, or uint32 for large
                       vocabularies)
    offsets.npy        document d is tokens[offsets[d] : offsets[d + 1]]; it ends with the end token
    first_targets.npy  index in document d of the first token that is learned: 1, or the
                       completion's first
    target_bytes.npy   UTF-8 bytes of the text that document d's targets spell
    places.jsonl       where document d came from, and its SHA-256

A corpus is two such stores, `train` and `held_out`, and `report.json`, in a folder named by the
hash of all that decides its content: the sources' bytes, the tokenizer, the settings. An edited
file is another corpus; an unchanged one is opened at once. The folder appears by rename, when it is
whole.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qloop.data.documents import Document, Refusal
from qloop.data.packing import Integers
from qloop.errors import DataError

FORMAT = 1
_CHUNK = 256
"""Documents tokenised in one call."""
_LOCK = "in-use.lock"
"""In a folder that is being built; its builder holds it."""


class Encoder(NamedTuple):
    """A tokenizer reduced to what the store needs of it."""

    encode: Callable[[list[str]], list[list[int]]]
    """Token ids of texts, with nothing added, text that spells a special token kept as text."""
    count_bytes: Callable[[list[int]], int]
    """UTF-8 bytes that some ids spell."""
    start_ids: list[int]
    """What the model expects before every document; often nothing."""
    end_id: int
    vocabulary_size: int
    fingerprint: str
    """Hash of all that decides the ids."""


class Source(NamedTuple):
    """Documents to read, and the hash of their content."""

    documents: Callable[[], Iterator[Document | Refusal]]
    fingerprint: str


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents; see the module's description."""

    tokens: npt.NDArray[Any]
    offsets: Integers
    first_targets: Integers
    target_bytes: Integers
    end_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def positions(self) -> Integers:
        """Input positions of each document, its tokens but the last: shape [documents]."""
        return np.diff(self.offsets) - 1

    @property
    def target_tokens(self) -> int:
        """Targets of one epoch."""
        return int((np.diff(self.offsets) - self.first_targets).sum())


@dataclass
class Ledger:
    """What became of everything that was read; all counts are of one epoch.

    documents = used; read = documents + refused + duplicates + also_held_out
    tokens = targets + first_tokens + prompt_tokens
    """

    read: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    targets: int = 0
    first_tokens: int = 0
    prompt_tokens: int = 0
    """Tokens after a document's first that are read but not learned."""
    refused: int = 0
    refused_by_reason: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    also_held_out: int = 0
    """Left out of training, since the same text is held out."""


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
        _delete_leftovers(folder.parent)
        building = folder.with_name(f".building-{key}-{uuid.uuid4().hex[:8]}")
        with _in_use(building):
            sides = _split(train, held_out, held_out_share)
            holds_out = held_out is not None or held_out_share > 0
            report = _build(sides, encoder, building, train_on_prompt, deduplicate, holds_out)
            (building / "report.json").write_text(json.dumps(report), encoding="utf-8")
            _sync(building)
            (building / _LOCK).unlink()
            try:
                building.rename(folder)
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
            train=_open_store(folder / "train", encoder),
            held_out=_open_store(folder / "held_out", encoder) if report["held_out"] else None,
            report=report,
            fingerprint=folder.name,
            was_cached=was_cached,
        )
    except (FileNotFoundError, ValueError, EOFError, KeyError) as error:
        raise DataError(
            f"{folder}: the tokenised corpus is damaged: {error}; delete this folder, and the same "
            "command tokenises it anew"
        ) from error


@contextlib.contextmanager
def _in_use(building: Path) -> Iterator[None]:
    """Makes a folder that is locked as long as this process is at work in it, and then gone."""
    building.mkdir(parents=True)
    try:
        # A file that is open for writing: NFS locks such on all machines, a folder on one only.
        with (building / _LOCK).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Returns when all of it is on the disk, so that no loss of power leaves its name to half."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete_leftovers(folder: Path) -> None:
    """Deletes what a process that was killed while tokenising has left."""
    for building in folder.glob(".building-*"):
        with contextlib.suppress(OSError):  # in use, or gone by now
            with (building / _LOCK).open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # One that was made this moment is not locked yet, but has nothing else in it.
                is_leftover = len(list(building.iterdir())) > 1
            if is_leftover:
                shutil.rmtree(building)


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
        side: _StoreWriter(folder / side, encoder, train_on_prompt)
        for side in ("train", "held_out")
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


class _StoreWriter:
    """Appends documents to a store on disk; holds one chunk of them in memory."""

    def __init__(self, folder: Path, encoder: Encoder, train_on_prompt: bool) -> None:
        folder.mkdir(parents=True)
        self.ledger = Ledger()
        self._folder = folder
        self._encoder = encoder
        self._train_on_prompt = train_on_prompt
        self._waiting: list[Document] = []
        # 8 bytes a document each, where a list would take 40.
        self._offsets = array("q", [0])
        self._first_targets = array("q")
        self._target_bytes = array("q")
        self._tokens = (folder / "tokens.bin").open("wb")
        self._places = (folder / "places.jsonl").open("w", encoding="utf-8")

    def add(self, document: Document) -> None:
        self._waiting.append(document)
        if len(self._waiting) == _CHUNK:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._tokens.close()
        self._places.close()
        for name, values in (
            ("offsets", self._offsets),
            ("first_targets", self._first_targets),
            ("target_bytes", self._target_bytes),
        ):
            np.save(self._folder / f"{name}.npy", np.array(values, dtype=np.int64))

    def _flush(self) -> None:
        documents, self._waiting = self._waiting, []
        texts = self._encoder.encode([document.text for document in documents])
        prompts = self._encoder.encode([document.prompt for document in documents])
        for document, text_ids, prompt_ids in zip(documents, texts, prompts, strict=True):
            ids = [*self._encoder.start_ids, *prompt_ids, *text_ids, self._encoder.end_id]
            # Nothing stands before the first token, so that it can be read but not predicted.
            learned_from = len(self._encoder.start_ids)
            learned_from += 0 if self._train_on_prompt else len(prompt_ids)
            first_target = max(1, learned_from)
            unlearned_text = ids[learned_from:first_target]
            text_bytes = len(document.text.encode())
            prompt_bytes = len(document.prompt.encode())
            learned_bytes = text_bytes + (prompt_bytes if self._train_on_prompt else 0)
            self._tokens.write(np.array(ids, dtype=_dtype(self._encoder)).tobytes())
            self._offsets.append(self._offsets[-1] + len(ids))
            self._first_targets.append(first_target)
            self._target_bytes.append(learned_bytes - self._encoder.count_bytes(unlearned_text))
            place = {"place": document.place, "sha256": document.content_hash.hex()}
            self._places.write(json.dumps(place) + "\n")

            self.ledger.documents += 1
            self.ledger.bytes += text_bytes + prompt_bytes
            self.ledger.tokens += len(ids)
            self.ledger.first_tokens += 1
            self.ledger.prompt_tokens += first_target - 1
            self.ledger.targets += len(ids) - first_target


def _open_store(folder: Path, encoder: Encoder) -> TokenStore:
    # Mapped, not read: what all ranks of a machine look at is in its memory once.
    offsets, first_targets, target_bytes = (
        np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("offsets", "first_targets", "target_bytes")
    )
    if len(offsets) == 1:  # an empty file cannot be mapped
        tokens: npt.NDArray[Any] = np.empty(0, dtype=_dtype(encoder))
    else:
        tokens = np.memmap(folder / "tokens.bin", dtype=_dtype(encoder), mode="r")
    if len(tokens) != offsets[-1]:
        raise ValueError(f"{folder.name} holds {len(tokens)} tokens, of {offsets[-1]}")
    return TokenStore(tokens, offsets, first_targets, target_bytes, encoder.end_id)


def _dtype(encoder: Encoder) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if encoder.vocabulary_size <= 2**16 else np.uint32
