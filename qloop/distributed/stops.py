"""Signals that stop or save a run: a handler records them, the loop checks after each step."""

import signal
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from qloop.errors import StoppedError


class Request(NamedTuple):
    """A signal's request: to save a checkpoint and, if `stops`, to end the run after it."""

    signal_name: str
    stops: bool


class _LeaveNow(KeyboardInterrupt):
    """Passes through libraries that catch every Exception."""

    state = "stopped"


class StopRequest:
    """Records SIGINT, SIGTERM and SIGUSR1 inside a `with` block.

    SIGUSR1 requests a checkpoint; the others request a checkpoint and the end of the run. Before
    the first step there is nothing to save, so the others end it at once with a StoppedError. A
    second SIGINT ends it at any time with a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.is_running = False
        """Whether the first step has begun. Stays true after the last step: the rest is short."""
        self._stop = 0
        self._save = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
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
        if isinstance(error, _LeaveNow):
            raise StoppedError(str(error)) from None

    def agreed(self, accelerator: Accelerator) -> Request | None:
        """Returns the request that any rank has received, the same on every rank."""
        noted = self._stop or (signal.SIGUSR1 if self._save else 0)
        self._save = False
        # A stop outweighs a save, whichever rank has which.
        weight = noted if noted in (0, signal.SIGUSR1) else noted + signal.NSIG
        largest = int(weight)
        if accelerator.num_processes > 1:  # a single process need not wait for a GPU
            weights = accelerator.gather(torch.tensor([weight], device=accelerator.device))
            largest = int(weights.max())
        if not largest:
            return None
        stops = largest > signal.NSIG
        return Request(signal.Signals(largest - signal.NSIG * stops).name, stops)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        if number == self._stop == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = number
        if not self.is_running:
            raise _LeaveNow(
                f"{signal.Signals(number).name}: stopped between start and first step; "
                "the same command goes on from the newest checkpoint"
            )
