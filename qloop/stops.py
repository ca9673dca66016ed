"""Stopping on request: a signal is only noted; the loop asks at the end of each step."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator


class StopRequest:
    """Notes SIGINT and SIGTERM while it is entered; a second SIGINT ends the process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def agreed(self) -> str | None:
        """Names the signal if any rank has received one; every rank gets the same answer."""
        noted = torch.tensor([self._signal], device=self._accelerator.device)
        number = int(self._accelerator.gather(noted).max())
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
