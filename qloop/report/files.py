"""Files that programs read: metrics.jsonl, eval_results.json and the ledger of data_report.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qloop.data.corpus import Corpus
from qloop.data.packing import BlockIndex
from qloop.storage.folders import write_atomically, write_json


class LineFile:
    """Appends lines; those that a full disk refuses are kept and written with later ones.

    So a full disk neither ends a run nor loses a line, unless it is still full at the end.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        """Opens the file; `say` prints a message when the disk refuses or accepts lines again."""
        self._file, self._say = file, say
        self._stream = file.open("ab", buffering=0)
        self._unwritten = b""
        self._is_refused = False

    def write(self, text: str = "") -> None:
        """Appends whole lines; without any, tries again to write those that the disk refused."""
        self._unwritten += text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) or 0 :]
        except OSError as error:
            if not self._is_refused:
                self._is_refused = True
                self._say(f"{self._file}: {error.strerror}; its lines are kept in memory")
        else:
            if self._is_refused:
                self._is_refused = False
                self._say(f"{self._file}: the lines kept in memory are written")

    def close(self) -> None:
        """Closes the file, after a last attempt to write what the disk refused."""
        self.write()
        self._stream.close()


def open_metrics(file: Path, after_step: int, say: Callable[[str], None]) -> LineFile:
    """Opens metrics.jsonl, cut back to a step, so that none appears twice."""
    records = [record for record in read_records(file) if record["step"] <= after_step]
    write_atomically(file, "".join(f"{json.dumps(record)}\n" for record in records))
    return LineFile(file, say)


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, without a last line that a crash cut short."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class EvalResultsFile:
    """eval_results.json: the list of held-out results by step."""

    def __init__(self, file: Path, after_step: int) -> None:
        """Cuts the list back to a step."""
        self._file = file
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self.results: list[dict[str, Any]] = [r for r in before if r["step"] <= after_step]

    def write(self, step: int, result: dict[str, Any]) -> None:
        """Appends a result; replaces an older one of the same step."""
        self.results = [r for r in self.results if r["step"] != step]
        self.results.append({"step": step, **result})
        write_json(self._file, self.results)


def describe_corpus(
    corpus: Corpus, index: BlockIndex, held_out: BlockIndex | None
) -> dict[str, Any]:
    """Returns the ledger with the figures of packing: the content of data_report.json."""
    report = dict(corpus.report)
    for side, blocks in (("train", index), ("held_out", held_out)):
        if blocks:
            report[side] = {
                **report[side],
                "blocks": len(blocks),
                "block_length": blocks.block_length,
                "padding": blocks.padding_tokens,
                "padding_share": blocks.padding_tokens / (len(blocks) * blocks.block_length),
            }
    return {"fingerprint": corpus.fingerprint, **report}
