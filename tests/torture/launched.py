"""The same signals to runs under `accelerate launch`, with one process and with two."""

import signal

from rows import Row
from stops import ALONE, TWO, Trial, at_random, run_stops, to_a_trainer
from workspace import Workspace

ALL_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"

LAUNCHED = [
    Trial("SIGTERM to the launcher", ALONE, at_random(signal.SIGTERM), "stopped", None),
    Trial("SIGINT to the launcher", ALONE, at_random(signal.SIGINT), "stopped", None),
]
TWOFOLD = [
    Trial("SIGTERM to the launcher", TWO, at_random(signal.SIGTERM), "stopped", None),
    Trial("SIGINT to the launcher", TWO, at_random(signal.SIGINT), "stopped", None),
    Trial("SIGUSR1 to a worker", TWO, to_a_trainer, "finished", 0),
    Trial("SIGUSR1 to the launcher", TWO, at_random(signal.SIGUSR1), "stopped", None),
    Trial(
        *("SIGUSR1 to a launcher that passes it on", TWO, at_random(signal.SIGUSR1)),
        *("finished or stopped", None, ALL_SIGNALS),
    ),
]


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """Both; short: one stop of two processes."""
    two = "two processes under accelerate launch"
    if is_short:
        return [run_stops(workspace, two, TWOFOLD[:1], 1, seed=9)]
    one = "single process under accelerate launch"
    return [
        run_stops(workspace, one, LAUNCHED, 3, seed=8),
        run_stops(workspace, two, TWOFOLD, 2, seed=9),
    ]
