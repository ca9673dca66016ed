"""Reads documents from Q files, JSONL, Parquet or a hub dataset; drops nothing silently.

An unusable item becomes a `Refusal` with its place and reason, in the order of reading; reading
goes on. Text is used as it is: no byte is corrected.

    trades.jsonl:1   {"text": "select from trade"}   -> Document
    trades.jsonl:2   {"text": 5}                     -> Refusal wrong_type: "text" is int
    trades.jsonl:3   {"text": "sel                   -> Refusal malformed_json
"""

import codecs
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qloop.errors import DataError

_Q_SUFFIXES = (".q", ".k")
_JSONL_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Document:
    """A source text: `text` is learned; `prompt`, often empty, precedes it."""

    text: str
    prompt: str
    place: str
    """File, and line or row where the file holds several documents."""

    @property
    def content_hash(self) -> bytes:
        """SHA-256 of prompt and text, independent of the place."""
        return hashlib.sha256(f"{self.prompt}\0{self.text}".encode()).digest()


@dataclass(frozen=True)
class Refusal:
    """An unusable item of the corpus, and the reason."""

    place: str
    reason: str
    """One of not_utf8, nul, empty, malformed_json, not_an_object, missing_field, wrong_type,
    not_a_regular_file, unreadable."""
    detail: str


class Source(NamedTuple):
    """Documents to read, and a fingerprint of their content."""

    documents: Callable[[], Iterator[Document | Refusal]]
    """Each call reads them from the start."""
    fingerprint: str
    """The name of the text field and a hash of the content; part of the corpus's fingerprint."""


def list_source_files(path: Path) -> list[Path]:
    """Returns a file, or the `.q` and `.k` files of a folder at any depth, in sorted order.

    Raises:
        DataError: The path does not exist, has no known format, or the folder has no such file.
    """
    if path.is_dir():
        found = sorted(_iterate_folder(path))
        if not found:
            raise DataError(f"{path}: no .q or .k file in this folder or below it")
        return found
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() not in (*_Q_SUFFIXES, *_JSONL_SUFFIXES, ".parquet"):
        raise DataError(
            f"{path}: unknown format; give JSONL (.jsonl), Parquet (.parquet), a .q or .k file, "
            "or a folder of them"
        )
    return [path.resolve()]  # a link that the user names is followed


def iterate_documents(files: list[Path], text_field: str) -> Iterator[Document | Refusal]:
    """Yields the documents of some files, and a refusal for each unusable item.

    Raises:
        DataError: A Parquet file cannot be opened or lacks the columns.
    """
    for file in files:
        if not stat.S_ISREG(file.lstat().st_mode):
            # A link would repeat its target or lead in a circle; a pipe would block.
            yield Refusal(str(file), "not_a_regular_file", "links, pipes and devices are not read")
        elif not os.access(file, os.R_OK):
            yield Refusal(str(file), "unreadable", "no permission to read it")
        elif file.suffix.lower() in _JSONL_SUFFIXES:
            yield from _iterate_jsonl(file, text_field)
        elif file.suffix.lower() == ".parquet":
            yield from _iterate_parquet(file, text_field)
        else:
            yield _read_source(file)


def iterate_rows(
    rows: Iterator[dict[str, Any]], name: str, text_field: str
) -> Iterator[Document | Refusal]:
    """Yields the documents of a hub dataset's rows, and a refusal for each unusable row."""
    for number, row in enumerate(rows):
        yield _document_of(row, text_field, f"{name} row {number}")


def _iterate_folder(path: Path) -> Iterator[Path]:
    """Yields Q files, and links to folders, which are later refused rather than skipped."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(path, onerror=refuse):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        files = [name for name in names if name.lower().endswith(_Q_SUFFIXES)]
        yield from (Path(folder, name) for name in (*links, *files))


def _read_source(file: Path) -> Document | Refusal:
    try:
        return _checked(file.read_bytes().decode(), "", str(file))
    except UnicodeDecodeError as error:
        return _refuse_bytes(error, str(file))


def _iterate_jsonl(file: Path, text_field: str) -> Iterator[Document | Refusal]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            # A byte order mark belongs to the file, not to its first text.
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield _parse_line(content.rstrip(b"\r\n"), text_field, f"{file}:{number}")


def _parse_line(line: bytes, text_field: str, place: str) -> Document | Refusal:
    try:
        text = line.decode()
        if not text.strip():
            return Refusal(place, "empty", "a blank line")
        return _document_of(json.loads(text), text_field, place)
    except UnicodeDecodeError as error:
        return _refuse_bytes(error, place)
    except (ValueError, RecursionError) as error:
        return Refusal(place, "malformed_json", str(error))


def _iterate_parquet(file: Path, text_field: str) -> Iterator[Document | Refusal]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        has = table.schema_arrow.names
        columns = [name for name in (text_field, "prompt", "completion") if name in has]
        if text_field not in has and len(columns) < 2:
            raise DataError(
                f'{file}: has neither a column "{text_field}" nor "prompt" and "completion"; '
                f"columns: {', '.join(has)}"
            )
        batches = table.iter_batches(batch_size=1024, columns=columns)
        rows = itertools.chain.from_iterable(map(_iterate_parquet_rows, batches))
        yield from iterate_rows(rows, str(file), text_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable as Parquet: {error}") from error


def _iterate_parquet_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yields a batch's rows; bad UTF-8 becomes lone surrogates, so that only its row is refused."""
    import pyarrow

    columns = []
    for column in batch.columns:
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            contents = column.cast(pyarrow.large_binary()).to_pylist()
            columns.append([c and c.decode("utf-8", "surrogateescape") for c in contents])
        else:
            columns.append(column.to_pylist())
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _document_of(row: Any, text_field: str, place: str) -> Document | Refusal:
    if not isinstance(row, dict):
        return Refusal(place, "not_an_object", f"a line must be an object, got {_kind(row)}")
    if text_field in row:
        names: tuple[str, ...] = (text_field,)
    elif "prompt" in row and "completion" in row:
        names = ("completion", "prompt")
    else:
        detail = f'has neither "{text_field}" nor "prompt" and "completion"; fields: {list(row)}'
        return Refusal(place, "missing_field", detail)
    for name in names:
        if not isinstance(row[name], str):
            return Refusal(place, "wrong_type", f'"{name}" is {_kind(row[name])}, not text')
    return _checked(row[names[0]], row["prompt"] if len(names) > 1 else "", place)


def _checked(text: str, prompt: str, place: str) -> Document | Refusal:
    if "\0" in text or "\0" in prompt:
        return Refusal(place, "nul", "holds a NUL character; is it a binary file?")
    if not text.strip():
        return Refusal(place, "empty", "nothing but white space")
    for part in (prompt, text):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return Refusal(place, "not_utf8", f"a lone surrogate at character {error.start}")
    return Document(text, prompt, place)


def _refuse_bytes(error: UnicodeDecodeError, place: str) -> Refusal:
    value = error.object[error.start]
    return Refusal(place, "not_utf8", f"byte 0x{value:02x} at offset {error.start}")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
