"""Pickles that run code when loaded, in each place of a checkpoint: none may ever be loaded."""

import contextlib
import hashlib
import json
import pickle
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from corruption import NEWEST, Runs
from rows import Row
from workspace import Workspace, reset_accelerate

from qloop.config.keys import Config
from qloop.errors import QloopError
from qloop.run import build_run

# Names that some library loads as a pickle.
PICKLED = (
    *("pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin"),
    *("training_args.bin", "random_states_0.pkl", "rng_state.pth", "custom_checkpoint_0.pkl"),
    *(".metadata", "__0_0.distcp"),
)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self):
        return (Path.touch, (self.crater,))


def seal(path: Path) -> None:
    """Lets manifest and COMMIT vouch for all that lies there, as one who knows them could."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.iterdir()
        if file.name not in ("manifest.json", "COMMIT")
    }
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


def place_bomb(config: Config, source: Path, name: str, is_sealed: bool, crater: Path) -> str:
    """Starts a run over a checkpoint with a bomb under a name; gives what was wrong, or nothing."""
    folder = config.run.output_dir / str(config.run.experiment_name)
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
    path = folder / "checkpoints" / NEWEST
    (path / name).write_bytes(pickle.dumps(Bomb(crater)))
    if is_sealed and name not in ("manifest.json", "COMMIT"):
        seal(path)
    reset_accelerate()
    try:
        build_run(config).close()
    except QloopError:
        pass
    except Exception as error:
        return f"{name}, sealed {is_sealed}: crashed: {error!r}"
    if crater.exists():
        crater.unlink()
        return f"{name}, sealed {is_sealed}: the bomb went off"
    return ""


def run_bombs(workspace: Workspace, methods: tuple[str, ...]) -> Row:
    """Puts a bomb in place of each file, and beside them under each pickled name."""
    crater = workspace.folder / "crater"
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists(), "the bomb works"
    crater.unlink()
    trials, failures = 0, []
    for method in methods:
        runs = Runs(workspace, method)
        names = [file.name for file in (runs.folder_of(runs.config) / NEWEST).iterdir()]
        with tempfile.TemporaryDirectory() as place:
            source = Path(place) / "run"
            shutil.copytree(runs.folder_of(runs.config).parent, source)
            for name in (*names, *PICKLED):
                for is_sealed in (False, True):
                    trials += 1
                    failure = place_bomb(runs.config, source, name, is_sealed, crater)
                    failures += [failure] if failure else []
    return Row(
        "pickle bombs in each place of a checkpoint, half of them vouched for by a forged manifest",
        trials,
        trials - len(failures),
        "none goes off, none ends in a traceback",
        baseline=bomb_baseline(crater),
        first_failure="; ".join(failures[:3]),
    )


def bomb_baseline(crater: Path) -> str:
    """Throws the same bombs at `accelerate.load_state`."""
    exploded = []
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(4, 4)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.register_for_checkpointing(
            torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
        )
        with tempfile.TemporaryDirectory() as place:
            accelerator.save_state(place)
            (Path(place) / name).write_bytes(pickle.dumps(Bomb(crater)))
            with contextlib.suppress(Exception):
                accelerator.load_state(place)
        if crater.exists():
            crater.unlink()
            exploded.append(name)
    return f"bombs that go off in `load_state`: {', '.join(exploded) or 'none'} (of 3 places)"


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """Runs all; short: adapters only."""
    return [run_bombs(workspace, ("lora",) if is_short else ("full", "lora"))]
