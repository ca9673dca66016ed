"""Stopping on request: a signal is only noted; the loop asks at the end of each step."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class StopRequest:
    """Notes SIGINT and SIGTERM; a second SIGINT ends the process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def agreed(self) -> str | None:
        """Names the signal if any rank has received one; every rank gets the same answer."""
        noted = torch.tensor([self._signal], device=self._accelerator.device)
        number = int(self._accelerator.gather(noted).max())
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._signal = number
