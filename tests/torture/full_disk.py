"""Runs on a real disk that is too small: a tmpfs of every size, and one that is full for a while.

Needs Linux and leave to make a mount namespace (`unshare -Urm`); the trials run inside of it.
"""

import collections
import contextlib
import ctypes
import json
import os
import subprocess
from pathlib import Path

from kills import find_harm, finish, folder_of, fork, read_run
from rows import Row
from workspace import Workspace, reset_accelerate

from qloop.config.keys import Config
from qloop.errors import QloopError
from qloop.report.metrics import StepRecord
from qloop.report.reporter import Reporter
from qloop.train import train

STEPS = 12
KEYS = {"max_steps": STEPS, "save_steps": 2, "eval_steps": 4, "max_failed_saves": 2}
ENDS: collections.Counter[int] = collections.Counter()
"""Exit codes of the runs on too small disks."""

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def is_allowed() -> bool:
    """Whether file systems can be mounted here, for this process alone."""
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def enter_namespace() -> None:
    """Lets this process, and nobody else, see what it mounts."""
    uid, gid = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def mount(folder: Path, kilobytes: int, options: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options}size={kilobytes}k", "tmpfs", str(folder)]
    subprocess.run(command, check=True)


def start(config: Config) -> tuple[int, str]:
    """Runs in this process; gives the exit code that the command would have, and its message."""
    reset_accelerate()
    try:
        train(config, [])
    except QloopError as error:
        return error.exit_code, str(error)
    return 0, ""


def try_size(workspace: Workspace, kilobytes: int, is_async: bool, wanted: tuple) -> str:
    """Runs on a disk of a size, then makes room and runs again; gives what is wrong, or nothing."""
    name = f"size-{kilobytes}"
    config = workspace.make_config(
        output_dir=workspace.folder / name,
        experiment_name="run",
        async_checkpoint=str(is_async).lower(),
        **KEYS,
    )
    folder = workspace.folder / name
    mount(folder, kilobytes)
    try:
        code, message = start(config)
        ENDS[code] += 1
        if code not in (0, 74) or (code and "No space left on device" not in message):
            return f"{kilobytes} kB: exit code {code}: {message}"
        harm = find_harm(config) if (folder_of(config) / "checkpoints").exists() else ""
        if harm:
            return f"{kilobytes} kB: {harm}"
        mount(folder, 100_000, "remount,")
        code, message = start(config)
        if code:
            return f"{kilobytes} kB, with room again: exit code {code}: {message}"
        return "" if read_run(config, STEPS) == wanted else f"{kilobytes} kB: another curve"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def try_while(workspace: Workspace, wanted: tuple) -> str:
    """Fills the disk up after step 3 and makes room after step 8; nothing may be missing."""
    folder = workspace.folder / "for-a-while"
    keys = {**KEYS, "max_failed_saves": 100, "async_checkpoint": "false"}
    config = workspace.make_config(output_dir=folder, experiment_name="run", **keys)
    mount(folder, 12_000)
    write_step = Reporter.write_step

    def write_step_and_fill(self: Reporter, record: StepRecord) -> None:
        if record.step == 4:
            fill(folder / "filler")
        if record.step == 9:
            (folder / "filler").unlink()
        write_step(self, record)

    Reporter.write_step = write_step_and_fill  # type: ignore[method-assign]
    try:
        code, message = start(config)
        log = (folder_of(config) / "logs/training_log.txt").read_text()
        if code:
            return f"for a while: exit code {code}: {message}"
        if "could not be saved" not in log:
            return "for a while: the disk was not full"
        return "" if read_run(config, STEPS) == wanted else "for a while: another curve"
    finally:
        Reporter.write_step = write_step  # type: ignore[method-assign]
        subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Takes the last byte of a disk."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


def try_all(workspace: Workspace, sizes: list[int], results: Path) -> None:
    """Runs in a child: enters a namespace of its own, and writes what failed."""
    enter_namespace()
    undisturbed = workspace.make_config(experiment_name="undisturbed", **KEYS)
    assert start(undisturbed) == (0, "")
    wanted = read_run(undisturbed, STEPS)
    failures = [
        try_size(workspace, kilobytes, number % 2 == 0, wanted)
        for number, kilobytes in enumerate(sizes)
    ]
    failures.append(try_while(workspace, wanted))
    results.write_text(json.dumps([failures, ENDS[74]]))


def run_full_disks(workspace: Workspace, sizes: list[int]) -> Row:
    """Tries every size in kilobytes, half of them with background saves."""
    results, log = workspace.folder / "full-disk.json", workspace.folder / "full-disk.log"
    code = finish(fork(lambda: try_all(workspace, sizes, results), log))
    failures, refused = [log.read_text()[-2000:]], 0
    if code == 0:
        failures, refused = json.loads(results.read_text())
    failed = [failure for failure in failures if failure]
    return Row(
        "real disks too small for the run, and one full for a while",
        len(sizes) + 1,
        len(sizes) + 1 - len(failed) if code == 0 else 0,
        "ends with 0 or 74; what is saved is good; with room again it finishes to the same bits",
        f"tmpfs of {min(sizes):,} to {max(sizes):,} kB, a checkpoint has 1,040; "
        f"{refused} ended with 74",
        first_failure="; ".join(failed[:3]),
    )


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """Runs all; short: three sizes. Nothing where namespaces are not allowed."""
    if not is_allowed():
        print("full_disk: not run, mount namespaces are not allowed here")
        return []
    sizes = (
        [100, 2300, 4700]
        if is_short
        else [4, 8, 12, 16, 20, 24, 32, 40, 60, 100, 300, *range(600, 7200, 300)]
    )
    return [run_full_disks(workspace, sizes)]
