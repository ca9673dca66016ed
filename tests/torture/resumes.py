"""Resumes at every sort of step, compared to the last bit with a run that was never stopped."""

import itertools
import json
import shutil
from pathlib import Path

from kills import folder_of, read_run
from rows import Row
from workspace import Workspace, reset_accelerate

from qloop.config.keys import Config
from qloop.train import train


def run_whole(workspace: Workspace, name: str, **keys: object) -> Config:
    """Trains without a stop, keeping the checkpoint of every step."""
    config = workspace.make_config(
        experiment_name=name, save_steps=1, keep_every=1, eval_steps=0, **keys
    )
    reset_accelerate()
    train(config, [])
    return config


def cut_back(source: Path, target: Path, step: int) -> None:
    """Leaves of a run what a kill right after a step would have left."""
    if source != target:
        shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def resume(workspace: Workspace, whole: Config, keys: dict, steps: tuple[int, ...]) -> str:
    """Stops a copy of a run after each of some steps; gives what differs in the end."""
    name = f"{whole.run.experiment_name}-at-{'-'.join(map(str, steps))}"
    source, target = folder_of(whole), whole.run.output_dir / name
    config = workspace.make_config(
        experiment_name=name, save_steps=1, keep_every=1, eval_steps=0, **keys
    )
    for step in steps:
        cut_back(source, target, step)
        source = target
        reset_accelerate()
        train(config, [])
    last_step = int(keys["max_steps"])
    is_same = read_run(config, last_step) == read_run(whole, last_step)
    shutil.rmtree(target)
    return "" if is_same else f"{name} differs"


def run_resumes(workspace: Workspace, is_short: bool) -> Row:
    """Full over accumulations and packings, adapters over one of each."""
    settings = [("full", *pair) for pair in itertools.product((1, 2, 4), ("best_fit", "wrapped"))]
    if is_short:
        settings = [("full", 2, "wrapped")]
    settings += [("lora", 2, "best_fit"), ("qlora", 2, "best_fit")]
    trials, failures = 0, []
    for method, accumulation, packing in settings:
        keys = {
            **workspace.method_keys(method),
            "gradient_accumulation_steps": accumulation,
            "packing": packing,
            "max_seq_length": 128,
            "max_steps": 3,
        }
        name = f"{method}-{accumulation}-{packing}"
        # An epoch's length in steps, from a run of a few.
        epoch = measure_epoch(run_whole(workspace, f"{name}-first", **keys))
        keys["max_steps"] = epoch + 4
        whole = run_whole(workspace, name, **keys)
        middle = epoch // 2
        points = [(middle,), (epoch - 1,), (epoch,), (epoch + 1,), (max(1, middle - 1), middle + 1)]
        for steps in points[3:] if is_short else points:
            trials += 1
            failure = resume(workspace, whole, keys, steps)
            failures += [failure] if failure else []
    names = [f"{method} x {number} {packing}" for method, number, packing in settings]
    return Row(
        "resumed in mid-epoch, at and around its end, twice in one",
        trials,
        trials - len(failures),
        "every loss, weight and moment equals the uninterrupted run's to the last bit",
        ", ".join(names),
        first_failure="; ".join(failures[:3]),
    )


def measure_epoch(config: Config) -> int:
    """Gives the step in which the first epoch ends."""
    line = (folder_of(config) / "logs/metrics.jsonl").read_text().splitlines()[-1]
    record = json.loads(line)
    blocks = round(record["blocks_seen"] / record["epoch"])
    return -(-blocks * record["step"] // record["blocks_seen"])


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """Runs all."""
    return [run_resumes(workspace, is_short)]
