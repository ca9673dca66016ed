"""A file that grows by lines, on a disk that may be full for a while."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qloop.report.metrics import StepRecord
from qloop.storage.folders import write_atomically, write_json


class LineFile:
    """Appends lines; what the disk does not take is kept and written with the lines after it.

    So a full disk neither ends a run nor loses a line, as long as it is not full at the end.
    """

    def __init__(self, file: Path, complain: Callable[[str], None]) -> None:
        """Opens the file.

        Args:
            file: Appended to.
            complain: Gets one message when the disk refuses, and one when it takes lines again.
        """
        self._file = file
        self._complain = complain
        self._stream = file.open("ab", buffering=0)
        self._unwritten = b""
        self._is_refused = False

    def write(self, text: str) -> None:
        """Appends text, which ends with a line's end."""
        self._unwritten += text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) or 0 :]
        except OSError as error:
            if not self._is_refused:
                self._is_refused = True
                self._complain(f"{self._file}: {error.strerror}; its lines wait in memory")
        else:
            if self._is_refused:
                self._is_refused = False
                self._complain(f"{self._file}: the lines that waited are written")

    def close(self) -> None:
        """Ends the file, after a last try at what the disk refused."""
        self.write("")
        self._stream.close()


class MetricsFile:
    """metrics.jsonl: every line is on its way to the disk when its step ends."""

    def __init__(self, file: Path, after_step: int, complain: Callable[[str], None]) -> None:
        """Cuts the file back to a step, so that none appears twice, and goes on behind it."""
        lines = [
            json.dumps(record) for record in read_records(file) if record["step"] <= after_step
        ]
        write_atomically(file, "".join(f"{line}\n" for line in lines))
        self._lines = LineFile(file, complain)

    def write(self, record: StepRecord) -> None:
        """Appends a line."""
        self._lines.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def close(self) -> None:
        """Ends the file."""
        self._lines.close()

    def flush(self) -> None:
        """Tries again to write what the disk refused."""
        self._lines.write("")


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line that a crash cut short is left out."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class EvalResultsFile:
    """eval_results.json: a list of the held-out results by step."""

    def __init__(self, file: Path, after_step: int) -> None:
        """Cuts the list back to a step."""
        self._file = file
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self.results: list[dict[str, Any]] = [r for r in before if r["step"] <= after_step]

    def write(self, step: int, result: dict[str, Any]) -> None:
        """Appends a result, in place of an older one of the same step."""
        self.results = [r for r in self.results if r["step"] != step]
        self.results.append({"step": step, **result})
        write_json(self._file, self.results)
