"""A file that grows by lines, on a disk that may be full for a while."""

from collections.abc import Callable
from pathlib import Path


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
