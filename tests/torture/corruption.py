"""Damages real checkpoints in every way that came to mind, and looks at what a run makes of them.

The newest of two checkpoints is damaged; then the run is asked what it would go on from. Right is
the older one, with the damaged one moved aside and whole for a look; or a refusal with a message.
Wrong is to accept it, or to crash. The baseline does the same to `accelerate.save_state`.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from rows import Row
from safetensors.torch import load_file
from workspace import Workspace, reset_accelerate

from qloop.checkpoint.resume import choose_checkpoint
from qloop.checkpoint.store import CheckpointStore
from qloop.config.keys import Config
from qloop.errors import QloopError
from qloop.storage.filesystem import FileSystem
from qloop.train import train

PROMISE = "none accepted wrong, the older one used, the damaged one kept aside"
NEWEST, OLDER = "checkpoint-6", "checkpoint-3"

Harm = Callable[[random.Random, Path, Path], None]
"""Damages a checkpoint (the second argument); the third is the same one of another run."""

HARMS: dict[str, Harm] = {}


def harm(function: Harm) -> Harm:
    """Enters a way to do damage in the list."""
    HARMS[function.__name__.replace("_", " ")] = function
    return function


def pick(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def edit(file: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


def flip(rng: random.Random, content: bytearray) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def edit_manifest(path: Path, change: Callable[[dict], object], is_sealed: bool) -> None:
    """Changes the manifest, and has COMMIT vouch for the change if `is_sealed`."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    if is_sealed:
        (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


@harm
def flip_a_bit(rng, path, other):
    edit(
        pick(rng, path),
        lambda c: c.__setitem__(i := rng.randrange(len(c)), c[i] ^ 1 << rng.randrange(8)),
    )


@harm
def cut(rng, path, other):
    edit(pick(rng, path), lambda c: c.__delitem__(slice(rng.randrange(len(c)), None)))


@harm
def zero_64_bytes(rng, path, other):
    weights = rng.choice(sorted(path.glob("*.safetensors")))
    start = rng.randrange(8 + 1024, weights.stat().st_size - 64)
    edit(weights, lambda c: c.__setitem__(slice(start, start + 64), bytes(64)))


@harm
def zero_a_page(rng, path, other):
    file = pick(rng, path)
    edit(file, lambda c: c.__setitem__(slice(0, 4096), bytes(min(4096, len(c)))))


@harm
def append(rng, path, other):
    edit(pick(rng, path), lambda c: c.extend(rng.randbytes(rng.randrange(1, 50))))


@harm
def swap_two_files(rng, path, other):
    one, two = rng.sample(sorted(path.iterdir()), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


@harm
def swap_two_tensors(rng, path, other):
    """Of one shape, so that nothing but the values tells."""
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = sorted(name for name in header if name.endswith("layernorm.weight/exp_avg"))
    spans = names and [header[name]["data_offsets"] for name in rng.sample(names, 2)]
    if not spans:  # adapters have no norms
        names = sorted(name for name in header if "lora_A" in name and "/exp_avg" in name)
        same = [n for n in names if header[n]["shape"] == header[names[0]]["shape"]]
        spans = [header[name]["data_offsets"] for name in rng.sample(same, 2)]
    (a, b), (c, d) = [(8 + size + start, 8 + size + end) for start, end in spans]
    content[a:b], content[c:d] = content[c:d], content[a:b]
    file.write_bytes(content)


@harm
def delete_a_file(rng, path, other):
    pick(rng, path).unlink()


@harm
def take_a_file_of_the_older(rng, path, other):
    names = ("optimizer.safetensors", "progress.json", "manifest.json", "COMMIT")
    name = rng.choice([*names, *(file.name for file in path.glob("*model.safetensors"))])
    shutil.copy(path.with_name(OLDER) / name, path / name)


@harm
def take_a_file_of_another_run(rng, path, other):
    names = ("optimizer.safetensors", "progress.json", "manifest.json", "COMMIT")
    name = rng.choice([*names, *(file.name for file in path.glob("*model.safetensors"))])
    shutil.copy(other / name, path / name)


@harm
def take_the_whole_older_one(rng, path, other):
    shutil.rmtree(path)
    shutil.copytree(path.with_name(OLDER), path)


@harm
def take_the_whole_of_another_run(rng, path, other):
    shutil.rmtree(path)
    shutil.copytree(other, path)


@harm
def edit_the_manifest(rng, path, other):
    changes = [
        lambda m: m.update(step=rng.randrange(100, 200)),
        lambda m: m["files"]["progress.json"].update(bytes=1),
        lambda m: m["files"].pop("optimizer.safetensors"),
        lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": ""}}),
        lambda m: m.update(format=2),
        lambda m: m.clear(),
    ]
    edit_manifest(path, rng.choice(changes), is_sealed=False)


@harm
def edit_the_manifest_and_seal_it_again(rng, path, other):
    changes = [
        lambda m: m.update(step=rng.randrange(100, 200)),
        lambda m: m.update(step="6"),
        lambda m: m["files"]["progress.json"].update(sha256="0" * 64),
        lambda m: m["files"]["optimizer.safetensors"].update(bytes=1),
        lambda m: m["files"].pop("optimizer.safetensors"),
        lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"].update({"x.pkl": {"bytes": 1, "sha256": ""}}),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={"a": 1}),
        lambda m: m.pop("files"),
        lambda m: m.update(format=2),
    ]
    edit_manifest(path, rng.choice(changes), is_sealed=True)


@harm
def nest_the_manifest_deep(rng, path, other):
    text = b"[" * 100_000 + b"]" * 100_000
    (path / "manifest.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


@harm
def empty_the_commit(rng, path, other):
    (path / "COMMIT").write_bytes(b"")


@harm
def put_a_link_in_place_of_a_file(rng, path, other):
    file = pick(rng, path)
    target = path.parent.parent / "linked"
    file.rename(target)
    file.symlink_to(target)


@harm
def put_a_pipe_in_place_of_a_file(rng, path, other):
    file = pick(rng, path)
    file.unlink()
    os.mkfifo(file)


@harm
def put_a_folder_in_place_of_a_file(rng, path, other):
    file = pick(rng, path)
    file.unlink()
    file.mkdir()


@harm
def put_a_link_in_place_of_the_folder(rng, path, other):
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    (target / "COMMIT").unlink()
    path.symlink_to(target)


@harm
def add_a_file(rng, path, other):
    names = ("pytorch_model.bin", "adapter_config.json", "config.json.py", "x.pkl", "evil.py")
    name = rng.choice(names)
    while (path / name).exists():
        name = rng.choice(names)
    (path / name).write_bytes(rng.randbytes(20))


class Runs:
    """Finished runs of one method, and others of another seed to take foreign files from."""

    def __init__(self, workspace: Workspace, method: str) -> None:
        keys = workspace.method_keys(method)
        self.config = workspace.make_config(experiment_name=method, **keys)
        self.other = workspace.make_config(experiment_name=f"other-{method}", seed=7, **keys)
        for config in (self.config, self.other):
            reset_accelerate()
            with contextlib.redirect_stdout(io.StringIO()):
                train(config, [])

    def folder_of(self, config: Config) -> Path:
        return config.run.output_dir / str(config.run.experiment_name) / "checkpoints"


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Gives what lies in a folder, byte for byte."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.iterdir()):
        is_plain = path.is_file() and not path.is_symlink()
        found[path.name] = path.read_bytes() if is_plain else f"{path.lstat().st_mode}"
    return found


def try_harm(runs: Runs, name: str, seed: str, store_type: type = CheckpointStore) -> str:
    """Damages a copy; gives `fell back`, `refused`, or what was wrong, which begins with WRONG."""
    source, other = runs.folder_of(runs.config), runs.folder_of(runs.other) / NEWEST
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoints"
        shutil.copytree(source, folder)
        before = {file.name: file.read_bytes() for file in (folder / NEWEST).iterdir()}
        HARMS[name](random.Random(seed), folder / NEWEST, other)
        harmed = snapshot(folder / NEWEST)
        if harmed == before:
            return "nothing changed"
        told: list[str] = []
        try:
            store = store_type(folder, FileSystem())
            checkpoint = choose_checkpoint(runs.config, store, told.append)
        except QloopError:
            aside = folder / NEWEST
            return "refused" if snapshot(aside) == harmed else "WRONG: refused and changed"
        except Exception as error:
            return f"WRONG: crashed: {error!r}"
        if checkpoint is None or checkpoint.path.name != OLDER:
            return f"WRONG: accepted {checkpoint and checkpoint.path.name}"
        aside = folder / f"damaged-{NEWEST}"
        if snapshot(aside) != harmed or not told or NEWEST not in told[0]:
            return "WRONG: not moved aside whole, or not told"
        return "fell back"


def run_corruptions(
    workspace: Workspace, trials: int, seed: int, store_type: type = CheckpointStore
) -> Row:
    """Damages checkpoints of a full run and of a lora run, each way in its turn."""
    runs = [Runs(workspace, method) for method in ("full", "lora")]
    outcomes: collections.Counter[str] = collections.Counter()
    first_failure = ""
    for number in range(trials):
        name = list(HARMS)[number // 2 % len(HARMS)]
        outcome = try_harm(runs[number % 2], name, f"{seed}-{number}", store_type)
        outcomes[outcome.split(":")[0]] += 1
        if outcome.startswith("WRONG"):
            first_failure = first_failure or f"seed {seed}-{number}, {name}: {outcome}"
    return Row(
        f"checkpoints damaged in {len(HARMS)} ways",
        trials,
        trials - outcomes["WRONG"],
        PROMISE,
        ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common()),
        harm_baseline(min(trials, 400), seed),
        first_failure=first_failure,
    )


# What can be done to a folder of any format.
PLAIN_HARMS = (
    *("flip a bit", "cut", "zero 64 bytes", "zero a page", "append", "swap two files"),
    *("delete a file", "take the whole older one"),
)


def save_states(folder: Path) -> Accelerator:
    """Saves two states of a small model by accelerate, under the names of our checkpoints."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for name in (OLDER, NEWEST):
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        accelerator.save_state(str(folder / name))
    return accelerator


def harm_baseline(trials: int, seed: int) -> str:
    """Does to accelerate's folders what was done to ours; counts the loads that notice nothing."""
    silent = 0
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place) / "whole", Path(place) / "harmed"
        accelerator = save_states(whole)
        for number in range(trials):
            shutil.copytree(whole, folder)
            # Of its own: load_state sets the global random state back.
            rng = random.Random(f"{seed}-{number}")
            HARMS[PLAIN_HARMS[number % len(PLAIN_HARMS)]](rng, folder / NEWEST, whole)
            with contextlib.suppress(Exception):
                accelerator.load_state(str(folder / NEWEST))
                silent += 1
            shutil.rmtree(folder)
    return (
        f"`accelerate.load_state` loads {silent} of {trials} without a word, damaged in "
        f"{len(PLAIN_HARMS)} of these ways"
    )


def flip_baseline(flips: int, seed: int) -> str:
    """Flips bits in what accelerate saved; counts the loads that notice nothing."""
    results = []
    with tempfile.TemporaryDirectory() as place:
        accelerator = save_states(Path(place))
        for name in ("model.safetensors", "optimizer.bin"):
            file = Path(place) / NEWEST / name
            whole = file.read_bytes()
            silent = 0
            for number in range(flips):
                edit(file, functools.partial(flip, random.Random(f"{seed}-{name}-{number}")))
                with contextlib.suppress(Exception):
                    accelerator.load_state(str(file.parent))
                    silent += 1
                file.write_bytes(whole)
            results.append(f"{name} {silent} of {flips}")
    return f"`accelerate.load_state` loads without a word: {', '.join(results)}"


def run_flips(workspace: Workspace, flips: int, seed: int) -> Row:
    """Flips bits in both tensor files; the baseline column is accelerate's."""
    runs = Runs(workspace, "full")
    source = runs.folder_of(runs.config) / NEWEST
    noticed, first_failure = 0, ""
    files = sorted(source.glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / NEWEST
        shutil.copytree(source, path)
        for number in range(2 * flips):
            file = path / files[number % 2].name
            whole = file.read_bytes()
            rng = random.Random(f"{seed}-{number}")
            edit(
                file,
                lambda c, r=rng: c.__setitem__(
                    i := r.randrange(len(c)), c[i] ^ 1 << r.randrange(8)
                ),
            )
            try:
                CheckpointStore(path.parent, FileSystem()).verify(path)
                first_failure = first_failure or f"seed {seed}-{number}"
            except Exception:
                noticed += 1
            file.write_bytes(whole)
        assert load_file(path / files[0].name)
    return Row(
        "single flipped bits in weights and moments", 2 * flips, noticed, "every one is noticed",
        baseline=flip_baseline(flips, seed), first_failure=first_failure,
    )  # fmt: skip


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """Runs both; short: every way to do damage twice."""
    return [
        run_corruptions(workspace, 2 * len(HARMS) if is_short else 2500, seed=4),
        run_flips(workspace, 20 if is_short else 400, seed=5),
    ]
