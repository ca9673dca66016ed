"""Ends a process whose peers have died, so that it does not wait for them.

When a rank dies (killed, out of memory, its machine lost), the others wait inside a collective:
with NCCL until a time-out of ten minutes, during which no signal from the launcher reaches Python.
So a thread of every rank watches the others. The system reports the end of a process on the same
machine; deaths on other machines, and a sign of life of each machine, are written to the store of
torch.distributed.

    same machine    noticed at once
    other machine   reported by a rank on the dead rank's machine, within _POLL_SECONDS
    whole machine   missed by the main rank after _SILENCE_SECONDS; the main rank's, by all ranks

Silence counts only from the first step on: earlier work may block Python for a long time.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from qloop.errors import PeerError

_POLL_SECONDS = 2.0
_SILENCE_SECONDS = 15.0
_GRACE_SECONDS = 8.0
"""Time for a rank to end by itself: gloo raises an error, NCCL keeps waiting."""


class Peer(NamedTuple):
    """A process of the run."""

    rank: int
    process: int
    host: str
    machine: str
    """Equal for processes that see each other's process ids."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class PeerWatch:
    """Watches the other processes of a run, until `stop`."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Exchanges process ids; all ranks call it together."""
        self._dead = ""
        self._found = threading.Event()
        self._stopped = threading.Event()
        self._steps_began = threading.Event()
        self._is_alone = accelerator.num_processes == 1
        if self._is_alone:
            return
        rank = accelerator.process_index
        me = Peer(rank, os.getpid(), socket.gethostname(), name_machine())
        peers: list[Peer] = gather_object([me])
        self._machines = list(dict.fromkeys(peer.machine for peer in peers))
        near = [peer for peer in peers if peer.machine == me.machine]
        self._me, self._is_first_here = me, near[0].rank == rank
        self._descriptors: dict[int, Peer] = {}
        for peer in near:
            if peer.rank != rank:
                with contextlib.suppress(OSError):  # gone, or an old Linux: a collective will fail
                    self._descriptors[os.pidfd_open(peer.process)] = peer
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def expect_signs_of_life(self) -> None:
        """Makes a machine without a sign of life count as lost from now on."""
        self._steps_began.set()

    def stop(self) -> None:
        """Ends the watch; from now on the other processes may end."""
        self._stopped.set()

    def explain(self, error: BaseException) -> BaseException:
        """Returns a PeerError if a peer's death made a collective fail, else the error itself.

        An error that ends all ranks alike is kept, even if some of them have ended already.
        """
        if not isinstance(error, RuntimeError) or self._is_alone or self._stopped.is_set():
            return error
        return PeerError(self._dead) if self._found.wait(2 * _POLL_SECONDS) else error

    def _watch(self) -> None:
        store = self._connect() if len(self._machines) > 1 else None
        heard = {machine: (b"", time.monotonic()) for machine in self._machines}
        while not self._stopped.is_set() and not self._dead:
            self._dead = self._find_dead_neighbour(_POLL_SECONDS)
            if store:
                try:
                    self._dead = self._exchange(store, heard)
                except Exception as error:  # the store may raise anything once it is gone
                    self._dead = f"the machine of the main process ({error})"
        if self._stopped.is_set():
            return
        self._found.set()
        if not self._stopped.wait(_GRACE_SECONDS):
            sys.stderr.write(f"{PeerError(self._dead)}\n")
            sys.stderr.flush()
            os._exit(PeerError.exit_code)

    def _find_dead_neighbour(self, seconds: float) -> str:
        """Waits for a process of this machine to end; returns its description, or ''."""
        poll = select.poll()
        for descriptor in self._descriptors:
            poll.register(descriptor, select.POLLIN)
        ended = poll.poll(seconds * 1000)
        return str(self._descriptors[ended[0][0]]) if ended else ""

    def _connect(self) -> TCPStore:
        # A client of its own: torch.distributed's may be blocked.
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def _exchange(self, store: TCPStore, heard: dict[str, tuple[bytes, float]]) -> str:
        """Writes a sign of life, or a death, to the store; returns a death that it holds."""
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        if self._dead:
            store.set(f"qloop/{run}/dead", self._dead)
            return self._dead
        if store.check([f"qloop/{run}/dead"]):
            return str(store.get(f"qloop/{run}/dead").decode())
        if self._is_first_here:
            store.set(f"qloop/{run}/alive/{self._me.machine}", str(time.monotonic()))
        if self._me.rank == 0 and not self._steps_began.is_set():
            heard.update({machine: (b"", time.monotonic()) for machine in self._machines})
        elif self._me.rank == 0:
            return self._find_silent_machine(store, f"qloop/{run}/alive/", heard)
        return ""

    def _find_silent_machine(
        self, store: TCPStore, prefix: str, heard: dict[str, tuple[bytes, float]]
    ) -> str:
        for machine in self._machines:
            key = f"{prefix}{machine}"
            sign = store.get(key) if store.check([key]) else b""
            if sign != heard[machine][0]:
                heard[machine] = (sign, time.monotonic())
            elif time.monotonic() - heard[machine][1] > _SILENCE_SECONDS:
                silent = f"the machine {machine}, silent for {_SILENCE_SECONDS:.0f} s"
                store.set(f"{prefix[: -len('alive/')]}dead", silent)
                return silent
        return ""


def name_machine() -> str:
    """Returns a name that is equal for processes that see each other's process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}-{boot[:8]}-{Path('/proc/self/ns/pid').readlink().name}"
