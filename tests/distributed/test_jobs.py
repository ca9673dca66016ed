"""The scripts of launch/ start, stop and go on, on two processes of this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import failures
import pytest
import yaml
from launching import ON_CPU, ROOT, Run, Setting, largest_difference
from workspace import Workspace

pytestmark = pytest.mark.distributed

TWO = ROOT / "launch/cpu_two_processes.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("jobs") / "workspace")


# Each node's launcher is a process of this machine. As with Slurm's own srun, SIGTERM to srun is
# SIGKILL to all that it started.
SRUN = """
kill_with_children() {
    for child in $(ps -o pid= --ppid "$1"); do kill_with_children "$child"; done
    kill -KILL "$1"
}
while [[ $1 == --*=* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    launchers+=($!)
done
trap 'for launcher in "${launchers[@]}"; do kill_with_children "$launcher"; done' TERM
echo "${launchers[@]}" > "$HERE/launchers"
code=0
for launcher in "${launchers[@]}"; do wait "$launcher" || code=$?; done
exit "$code"
"""
SCONTROL = """
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$HERE/asked"
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With the Slurm of one node; scontrol writes what it is asked."""
    (tmp_path / "bin").mkdir()
    for name, body in {"srun": SRUN, "scontrol": SCONTROL}.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{body}")
        file.chmod(0o755)
    job_id = str(os.getpid())  # the port follows from it
    slurm = {"NNODES": "1", "JOB_ID": job_id, "JOB_NODELIST": "n[1-2]", "JOB_NAME": "q"}
    return {
        **with_commands_of_this_python(),
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "SLURM_GPUS_ON_NODE": "2",
        "LAUNCH": str(TWO),
        "HERE": str(tmp_path),
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def with_commands_of_this_python() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def flags_of(run: Run, *left_out: str, **keys) -> list[str]:
    flags = run.workspace.flags(**{**run.keys, **keys})
    return [w for k, v in flags.items() if k not in left_out for w in (f"--{k}", v)]


def start_slurm(run: Run, environment: dict[str, str]) -> subprocess.Popen:
    output_dir = str(run.workspace.folder / "output")
    words = flags_of(run, "experiment_name", "output_dir", gradient_accumulation_steps=4)
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/slurm.sbatch"), *words],
        env={**environment, "EXPERIMENT": run.name, "OUTPUT_DIR": output_dir},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def signal_launchers(environment: dict[str, str]) -> None:
    """Does what Slurm does to the tasks of a job when its time is up, or another preempts it."""
    for launcher in Path(environment["HERE"], "launchers").read_text().split():
        os.kill(int(launcher), signal.SIGTERM)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_job_runs_to_its_end(workspace, environment, tmp_path, nodes):
    run = Run(workspace, f"slurm-{nodes}", max_steps=6)
    slurm = {"SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(2 // nodes)}
    outcome = run.wait(start_slurm(run, {**environment, **slurm}))
    assert outcome.code == 0, outcome.text
    assert failures.read_status(run)["state"] == "finished"
    assert run.read_progress()["num_processes"] == 2
    assert len((tmp_path / "launchers").read_text().split()) == nodes
    assert not (tmp_path / "asked").exists(), "nothing to put back into the queue"


def test_a_slurm_job_that_is_stopped_saves_and_goes_back_into_the_queue(
    workspace, environment, tmp_path
):
    run = Run(workspace, "requeued", max_steps=150, save_steps=200)
    process = start_slurm(run, environment)
    failures.wait_for_step(run, 5)
    signal_launchers(environment)
    outcome = run.wait(process)
    assert outcome.code == 0, outcome.text
    assert (tmp_path / "asked").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    status = failures.read_status(run)
    assert (status["state"], status["step"]) == ("stopped", run.read_progress()["step"])
    assert not failures.find_ranks(run)
    again = run.wait(start_slurm(run, environment))
    assert failures.read_status(run)["state"] == "finished", again.text
    assert f"{status['step']} of 150 made; going on from" in again.text


def test_a_slurm_job_that_is_cancelled_saves_and_stays_away(workspace, environment, tmp_path):
    """`scancel` signals the script, too."""
    run = Run(workspace, "cancelled", max_steps=400, save_steps=500)
    process = start_slurm(run, environment)
    failures.wait_for_step(run, 5)
    process.send_signal(signal.SIGTERM)
    signal_launchers(environment)
    outcome = run.wait(process)
    assert outcome.code != 0
    status = failures.read_status(run)
    assert (status["state"], status["step"]) == ("stopped", run.read_progress()["step"])
    assert not (tmp_path / "asked").exists()


def test_a_slurm_job_that_cannot_start_is_not_requeued_for_an_earlier_stop(
    workspace, environment, tmp_path
):
    run = Run(workspace, "wrong", learning_rate="-1")
    run.folder.mkdir(parents=True)
    (run.folder / "status.json").write_text('{"state": "stopped", "step": 3, "reason": "SIGTERM"}')
    outcome = run.wait(start_slurm(run, environment))
    assert outcome.code != 0
    assert "learning_rate: must be above 0, got -1" in outcome.text
    assert not (tmp_path / "asked").exists()


def test_the_command_of_the_kubernetes_job_trains_with_two_processes(workspace):
    runtime, _ = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    own = {item["name"]: item["value"] for item in container["env"]}
    # What the runtime sets in the pod of a job of one node.
    torch = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    torch |= {"PET_MASTER_PORT": "0", "PET_NPROC_PER_NODE": "auto"}
    changed = {"LAUNCH": str(TWO), "GPUS_PER_NODE": "2"}
    run = Run(workspace, "pod", max_steps=6)
    done = subprocess.run(
        [*container["command"], *flags_of(run, gradient_accumulation_steps=4)],
        env={**with_commands_of_this_python(), **own, **torch, **changed},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert run.read_progress()["num_processes"] == 2


def test_two_launchers_make_one_run_as_on_two_machines(workspace):
    """By launch/multi_node.yaml, each with one process, and sharded over both."""
    alone = Run(workspace, "one-machine", max_steps=6)
    alone.start(Setting("FSDP2", 2))
    run = Run(workspace, "two-machines", max_steps=6)
    port = str(20_000 + os.getpid() % 20_000)
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(ROOT / "launch/multi_node.yaml"), "--machine_rank", rank),
                *("--num_processes", "2", "--main_process_ip", "127.0.0.1"),
                *("--main_process_port", port, str(ON_CPU), "train"),
                *flags_of(run, gradient_accumulation_steps=4),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in ("0", "1")
    ]
    outcomes = [run.wait(launcher) for launcher in launchers]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert run.read_progress()["num_processes"] == 2
    assert largest_difference(run.read_metrics(), alone.read_metrics(), "loss") == 0.0


def debug(run: Run, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "launch/debug.sh"), *flags_of(run)],
        env={**with_commands_of_this_python(), **environment},
        input=stdin,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_debug_script_runs_to_the_end_and_twice_the_same(workspace):
    curves = []
    for name in ("debugged-once", "debugged-twice"):
        run = Run(workspace, name, max_steps=2, warmup_steps=0)
        done = debug(run, PDB="0")
        assert done.returncode == 0, done.stderr
        assert failures.read_status(run)["state"] == "finished"
        curves.append(failures.read_curve(run))
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


def test_the_debug_script_names_the_operation_whose_backward_gives_nan(workspace):
    run = Run(workspace, "debugged", max_steps=6, warmup_steps=0, learning_rate="1e30")
    done = debug(run, PDB="0")
    assert done.returncode == 1
    assert "LinearTargetLossBackward' returned nan values" in done.stderr, done.stderr
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["run"]["deterministic"] is True


def test_the_debug_script_stops_in_the_loop_with_the_step_at_hand(workspace):
    run = Run(workspace, "stepped", max_steps=6)
    lines = (ROOT / "qloop/train.py").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "engine.measure_grad_norm()" in text)
    commands = f"b {ROOT}/qloop/train.py:{line}\nc\np 'targets', target_tokens\nq\n"
    done = debug(run, commands)
    assert "('targets', " in done.stdout, done.stdout + done.stderr
    assert json.loads((run.folder / "status.json").read_text())["step"] == 0
