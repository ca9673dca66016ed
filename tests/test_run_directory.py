"""The folder of a run: what it refuses, its files, and its lock."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qloop.config.keys import Config
from qloop.config.loading import load_config
from qloop.errors import ConfigError, LockedError
from qloop.run_directory import RunDirectory, RunLock, locate_run


def build_config(**flags: str) -> Config:
    return load_config(None, flags).config


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A folder that is not there yet."""
    return RunDirectory(tmp_path / "output" / "run")


def refusal_of(run: RunDirectory, config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        run.refuse_another(config)
    return str(caught.value)


# Its name


def test_the_folder_is_named_by_experiment_name():
    config = build_config(output_dir="runs", experiment_name="my_experiment")
    assert locate_run(config).path == Path("runs/my_experiment")


@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("gpt2", "gpt2"),
        ("/models/tiny-q", "tiny-q"),
        ("models/tiny-q/", "tiny-q"),
        ("output/demo/checkpoints/checkpoint-150", "checkpoint-150"),
    ],
)
def test_without_experiment_name_it_is_the_short_name_of_the_model(model_name, name):
    assert locate_run(build_config(model_name=model_name)).path == Path("output") / name


def test_a_model_from_random_weights_has_the_name_of_its_description():
    config = build_config(model_config_file="shapes/small.json", tokenizer_name="folder")
    assert locate_run(config).path == Path("output/small")


@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        (".", ""),
        ("/", ""),
        ("models/..", ".."),
        ("models/.hidden", ".hidden"),
        ("models/tiny q", "tiny q"),
        ("models/" + "q" * 65, "q" * 65),
    ],
)
def test_a_short_name_that_makes_no_folder_name_is_refused(model_name, name):
    with pytest.raises(ConfigError) as caught:
        locate_run(build_config(model_name=model_name))
    assert str(caught.value) == (
        f'experiment_name: the model\'s short name "{name}" is no folder name; give one'
    )


def test_a_given_name_needs_no_short_name():
    config = build_config(model_name=".", experiment_name="run")
    assert locate_run(config).path == Path("output/run")


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "/abs", "a/b", "a\\b", ".hidden", "a b", "a\n", "q" * 65]
)
def test_an_experiment_name_cannot_leave_output_dir(name):
    with pytest.raises(ConfigError, match="experiment_name: must match"):
        build_config(experiment_name=name)


@pytest.mark.parametrize("name", ["a", "1e5", "q-7b.lora_2", "q" * 64])
def test_an_experiment_name_may_have_letters_digits_and_marks_between(name):
    assert locate_run(build_config(experiment_name=name)).path == Path("output") / name


def test_locating_makes_no_folder(tmp_path):
    locate_run(build_config(output_dir=str(tmp_path / "output"), experiment_name="run"))
    assert list(tmp_path.iterdir()) == []


# What it holds already


@pytest.mark.parametrize("resume", ["auto", "never", "output/a/checkpoints/checkpoint-3"])
def test_a_new_folder_is_taken(run, resume):
    run.refuse_another(build_config(resume=resume))


def test_an_empty_folder_is_taken(run):
    run.path.mkdir(parents=True)
    run.refuse_another(build_config())


def test_the_same_config_goes_on(run):
    config = build_config(learning_rate="1e-4", experiment_name="run")
    run.create(config)
    run.refuse_another(config)


def test_a_longer_run_with_other_reports_goes_on(run):
    run.create(build_config(max_steps="500"))
    run.refuse_another(build_config(max_steps="600", log_steps="1", tensorboard="true"))


def test_other_settings_are_refused_and_shown(run):
    run.create(build_config(max_steps="500"))
    after = build_config(max_steps="600", learning_rate="1e-4", data_type="raw")
    assert refusal_of(run, after) == (
        f"{run.path}: holds another run, with other settings:\n"
        '  data_type: "filtered" -> "raw"\n'
        "  learning_rate: 2e-05 -> 0.0001\n"
        "give another --experiment_name to start a new run, the old settings to continue, or the "
        "keys that may change: --allow_change data_type,learning_rate"
    )


def test_resume_never_is_refused_where_a_run_is(run):
    run.create(build_config())
    assert refusal_of(run, build_config(resume="never")) == (
        f"{run.path}: holds a run already, and resume is never; give another "
        "--experiment_name, or --resume auto to continue it"
    )


def test_a_folder_with_foreign_files_is_refused(run):
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("")
    assert refusal_of(run, build_config()) == (
        f"{run.path}: is not empty but has no config.yaml, so it is no run of qloop; give "
        "another --experiment_name or --output_dir"
    )


def test_a_file_in_its_place_is_refused(run):
    run.path.parent.mkdir()
    run.path.write_text("")
    config = build_config(output_dir=str(run.path.parent), experiment_name=run.path.name)
    with pytest.raises(ConfigError, match="is no folder"):
        locate_run(config)


@pytest.mark.parametrize("link", ["", "checkpoints", "logs", "results"])
def test_a_link_out_of_output_dir_is_refused(run, tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (run.path / link).parent.mkdir(parents=True, exist_ok=True)
    (run.path / link).symlink_to(outside)
    config = build_config(output_dir=str(run.path.parent), experiment_name=run.path.name)
    with pytest.raises(ConfigError, match="outside of output_dir"):
        locate_run(config)


def test_a_run_whose_config_cannot_be_read_is_refused_by_its_name(run):
    run.create(build_config())
    run.config.write_text("max_steps: [500\n")
    assert refusal_of(run, build_config()).startswith(f"{run.config}: not valid YAML: ")


def test_a_refusal_changes_nothing(run):
    run.create(build_config())
    before = run.config.read_text()
    refusal_of(run, build_config(seed="7"))
    assert run.config.read_text() == before


# Its files


def test_creating_makes_every_folder(run):
    run.create(build_config())
    assert sorted(entry.name for entry in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "logs",
        "results",
    ]


def test_the_written_config_is_the_one_that_ran(run):
    folders = {"output_dir": "/runs", "data_dir": "/data"}
    config = build_config(learning_rate="1e-4", max_steps="500", **folders)
    run.create(config)
    assert load_config(run.config, {}).config == config


def test_creating_again_keeps_what_is_there(run):
    run.create(build_config(max_steps="500"))
    run.metrics.write_text('{"step": 1}\n')
    run.create(build_config(max_steps="600"))
    assert run.metrics.read_text() == '{"step": 1}\n'
    assert load_config(run.config, {}).config.schedule.max_steps == 600


def test_what_a_kill_left_before_the_config_was_there_is_no_other_run(run):
    run.path.mkdir(parents=True)
    for name in (".lock", ".config.yaml.tmp"):
        (run.path / name).write_text("")
    run.refuse_another(build_config())
    run.create(build_config())
    assert sorted(path.name for path in run.path.iterdir()) == [
        *(".lock", "checkpoints", "config.yaml", "logs", "results"),
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("config", "config.yaml"),
        ("checkpoints", "checkpoints"),
        ("training_log", "logs/training_log.txt"),
        ("metrics", "logs/metrics.jsonl"),
        ("eval_results", "logs/eval_results.json"),
        ("data_report", "logs/data_report.json"),
        ("results", "results"),
        ("status", "status.json"),
    ],
)
def test_each_file_has_the_place_that_people_know(run, name, place):
    assert getattr(run, name) == run.path / place


def test_the_status_holds_state_step_and_reason(run):
    run.create(build_config())
    run.write_status("stopped", 7, "SIGTERM: stopped and saved")
    assert json.loads(run.status.read_text()) == {
        "state": "stopped",
        "step": 7,
        "reason": "SIGTERM: stopped and saved",
    }


def test_a_status_without_reason_says_so(run):
    run.create(build_config())
    run.write_status("running", 0)
    assert json.loads(run.status.read_text()) == {"state": "running", "step": 0, "reason": ""}


def test_a_status_replaces_the_one_before(run):
    run.create(build_config())
    run.write_status("diverged", 1234, "step 1235: loss is nan")
    run.write_status("finished", 9)
    assert json.loads(run.status.read_text())["state"] == "finished"


# Its lock

HOLD = (
    "import sys, time, pathlib, qloop.run_directory as l; "
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
        "import sys, time, pathlib, qloop.run_directory as l, qloop.errors as e\n"
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
