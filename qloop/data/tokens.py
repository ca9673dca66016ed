"""The token store: documents tokenised once, in the files of one folder.

    tokens.bin         every document's tokens, one after another (uint16, or uint32 for large
                       vocabularies)
    offsets.npy        document d is tokens[offsets[d] : offsets[d + 1]]; it ends with the end token
    first_targets.npy  index in document d of its first target: 1, or the completion's first
    target_bytes.npy   UTF-8 bytes of the text that document d's targets spell
    places.jsonl       origin of document d, and its SHA-256

The arrays are memory-mapped: all ranks of a machine share one copy.
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

_ARRAYS = ("offsets", "first_targets", "target_bytes")
_CHUNK = 256
"""Documents tokenised in one call."""


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents; the module docstring explains the arrays."""

    tokens: npt.NDArray[Any]  # [tokens], uint16 or uint32
    offsets: Integers  # [documents + 1]
    first_targets: Integers  # [documents]
    target_bytes: Integers  # [documents]
    end_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def positions(self) -> Integers:
        """Input positions of each document: its tokens except the last; [documents]."""
        return np.diff(self.offsets) - 1

    @property
    def target_tokens(self) -> int:
        """Targets of one epoch."""
        return int((np.diff(self.offsets) - self.first_targets).sum())


@dataclass
class Ledger:
    """Accounts for every document read and every token; each count is of one epoch.

    read = documents + refused + duplicates + also_held_out
    tokens = targets + first_tokens + prompt_tokens
    """

    read: int = 0
    documents: int = 0
    """Documents in the store."""
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
    """Left out of training because the same text is held out."""


def open_store(folder: Path, encoder: Encoder) -> TokenStore:
    """Maps the files of a store into memory.

    Raises:
        FileNotFoundError, ValueError, EOFError: A file is missing, damaged or cut short.
    """
    offsets, first_targets, target_bytes = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
    )
    if len(offsets) == 1:  # an empty file cannot be mapped
        tokens: npt.NDArray[Any] = np.empty(0, dtype=_dtype(encoder))
    else:
        tokens = np.memmap(folder / "tokens.bin", dtype=_dtype(encoder), mode="r")
    if len(tokens) != offsets[-1]:
        raise ValueError(f"{folder.name} holds {len(tokens)} tokens, of {offsets[-1]}")
    return TokenStore(tokens, offsets, first_targets, target_bytes, encoder.end_id)


class StoreWriter:
    """Appends documents to a store on disk; holds one chunk of them in memory."""

    def __init__(self, folder: Path, encoder: Encoder, train_on_prompt: bool) -> None:
        folder.mkdir(parents=True)
        self.ledger = Ledger()
        self._folder = folder
        self._encoder = encoder
        self._train_on_prompt = train_on_prompt
        self._waiting: list[Document] = []
        # 8 bytes per document each; a list would take 40.
        self._arrays = {name: array("q") for name in _ARRAYS}
        self._arrays["offsets"].append(0)
        self._tokens = (folder / "tokens.bin").open("wb")
        self._places = (folder / "places.jsonl").open("w", encoding="utf-8")

    def add(self, document: Document) -> None:
        """Adds a document, to be tokenised together with the next ones."""
        self._waiting.append(document)
        if len(self._waiting) == _CHUNK:
            self._flush()

    def close(self) -> None:
        """Tokenises the last documents, writes the arrays and closes the files."""
        self._flush()
        self._tokens.close()
        self._places.close()
        for name, values in self._arrays.items():
            np.save(self._folder / f"{name}.npy", np.array(values, dtype=np.int64))

    def _flush(self) -> None:
        documents, self._waiting = self._waiting, []
        texts = self._encoder.encode([document.text for document in documents])
        prompts = self._encoder.encode([document.prompt for document in documents])
        for document, text_ids, prompt_ids in zip(documents, texts, prompts, strict=True):
            self._append(document, prompt_ids, text_ids)

    def _append(self, document: Document, prompt_ids: list[int], text_ids: list[int]) -> None:
        ids = [*self._encoder.start_ids, *prompt_ids, *text_ids, self._encoder.end_id]
        learned_from = len(self._encoder.start_ids)
        learned_from += 0 if self._train_on_prompt else len(prompt_ids)
        # The first token has no predecessor, so it can be read but not predicted.
        first_target = max(1, learned_from)
        text_bytes, prompt_bytes = len(document.text.encode()), len(document.prompt.encode())
        learned_bytes = text_bytes + (prompt_bytes if self._train_on_prompt else 0)
        learned_bytes -= self._encoder.count_bytes(ids[learned_from:first_target])

        self._tokens.write(np.array(ids, dtype=_dtype(self._encoder)).tobytes())
        self._arrays["offsets"].append(self._arrays["offsets"][-1] + len(ids))
        self._arrays["first_targets"].append(first_target)
        self._arrays["target_bytes"].append(learned_bytes)
        place = {"place": document.place, "sha256": document.content_hash.hex()}
        self._places.write(json.dumps(place) + "\n")

        self.ledger.documents += 1
        self.ledger.bytes += text_bytes + prompt_bytes
        self.ledger.tokens += len(ids)
        self.ledger.first_tokens += 1
        self.ledger.prompt_tokens += first_target - 1
        self.ledger.targets += len(ids) - first_target


def _dtype(encoder: Encoder) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if encoder.vocabulary_size <= 2**16 else np.uint32
