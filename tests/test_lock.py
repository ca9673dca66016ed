"""One writer for a run's folder, and a lock that nobody has to clean up."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from qloop.errors import ConfigError, LockedError
from qloop.lock import RunLock

HOLD = (
    "import sys, time, pathlib, qloop.lock as l; "
    "l.RunLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
)


def hold_elsewhere(folder) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path):
    holder = hold_elsewhere(tmp_path / "run")
    try:
        with pytest.raises(LockedError) as error:
            RunLock(tmp_path / "run").acquire()
    finally:
        holder.kill()
        holder.wait()
    assert error.value.exit_code == 77
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    holder = hold_elsewhere(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    lock.release()


def test_a_released_lock_is_free_and_a_folder_made_for_nothing_goes(tmp_path):
    for folder in (tmp_path, tmp_path / "new/run"):
        for _ in range(2):
            lock = RunLock(folder)
            lock.acquire()
            lock.release()
    assert tmp_path.is_dir()
    assert not (tmp_path / "new/run").exists()


def test_a_folder_that_was_used_stays(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    (tmp_path / "run/config.yaml").write_text("")
    lock.release()
    assert (tmp_path / "run/config.yaml").exists()


def test_a_lock_whose_file_was_deleted_is_taken_anew(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lock").unlink()
    lock.check()
    with pytest.raises(LockedError):
        RunLock(tmp_path).acquire()
    lock.release()


def test_a_lock_that_another_took_after_its_file_was_deleted_is_lost(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lock").unlink()
    holder = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(LockedError, match=f"taken this run's folder .process {holder.pid} on"):
            lock.check()
    finally:
        holder.kill()
        holder.wait()
        lock.release()


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        RunLock(tmp_path / "file/run").acquire()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / "other").read_text() == "mine"


def test_many_starts_at_once_have_one_winner(tmp_path):
    """They meet on a folder that another run, which is just leaving, deletes under them."""
    script = (
        "import sys, time, pathlib, qloop.lock as l, qloop.errors as e\n"
        "lock = l.RunLock(pathlib.Path(sys.argv[1]))\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try: lock.acquire(); print('won', flush=True); time.sleep(3)\n"
        "except e.LockedError: print('lost')\n"
    )
    start = str(time.time() + 1.5)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "run"), start],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    results = [process.communicate()[0].strip() for process in processes]
    assert sorted(results) == ["lost"] * 5 + ["won"]
