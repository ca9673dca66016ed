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

import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qloop.data.documents import Document
from qloop.data.encoder import Encoder
from qloop.data.packing import Integers

_CHUNK = 256
"""Documents tokenised in one call."""


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


class StoreWriter:
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
        """Takes a document, and tokenises it with the next ones."""
        self._waiting.append(document)
        if len(self._waiting) == _CHUNK:
            self._flush()

    def close(self) -> None:
        """Tokenises the last documents and closes the files."""
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


def open_store(folder: Path, encoder: Encoder) -> TokenStore:
    """Maps the files of a store.

    Raises:
        ValueError: They do not fit together.
    """
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
