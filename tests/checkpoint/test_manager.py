"""Saving a run: the content of a checkpoint, background saves, rotation, a disk that refuses."""

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qloop.checkpoint.manager import CheckpointManager
from qloop.checkpoint.resume import Provenance, read_checkpoint
from qloop.checkpoint.store import CheckpointStore, Manifest
from qloop.errors import CheckpointError, LockedError
from qloop.model.state import collect_files
from qloop.run import Run, build_run
from qloop.storage.filesystem import FileSystem
from qloop.train import train


class FullDisk(FileSystem):
    """A disk on which nothing can be created while it is full."""

    is_full = False

    def create(self, path: Path) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().create(path)


@pytest.fixture
def run(make_config):
    run = build_run(make_config(async_checkpoint="false"))
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.engine.optimizer.step()
    yield run
    run.close()


def put_on(disk: FileSystem, run: Run, **keys) -> tuple[CheckpointManager, list[str]]:
    """Builds a manager on another disk, with other keys; returns the list of its messages, too."""
    said: list[str] = []
    manager = CheckpointManager(
        store=CheckpointStore(run.folder.directory.checkpoints, disk),
        settings=run.config.checkpoint.model_copy(update=keys),
        accelerator=run.accelerator,
        provenance=Provenance(run.config.model_dump(mode="json"), {}, 4),
        files=collect_files(run.model, run.data.tokenizer),
        say=said.append,
    )
    return manager, said


def save(
    run: Run,
    step: int = 1,
    manager: CheckpointManager | None = None,
    held_out_loss: float | None = None,
    must_succeed: bool = False,
) -> Path:
    run.progress.step = step
    (manager or run.checkpoints).save(run.engine, run.progress, 2.5, held_out_loss, must_succeed)
    return run.folder.directory.checkpoint_path(step)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def verify(path: Path) -> Manifest:
    return CheckpointStore(path.parent, FileSystem()).verify(path)


# What a checkpoint is


def test_a_full_checkpoint_is_a_model_that_transformers_loads(make_config):
    config = make_config()
    train(config, [])
    folder = config.run.output_dir / "run/checkpoints/checkpoint-6"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|endoftext|>"
    logits = model(torch.tensor([tokenizer("select from t")["input_ids"]])).logits
    assert logits.isfinite().all()


def test_a_full_checkpoint_holds_what_save_pretrained_writes(run, tmp_path):
    folder = save(run)
    run.model.save_pretrained(tmp_path / "theirs")
    ours = load_file(folder / "model.safetensors")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in names_in(tmp_path / "theirs") - {"model.safetensors"}:
        assert (folder / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_checkpoint_loads_by_peft_and_holds_no_base(make_config, method):
    import peft

    train(make_config(experiment_name="base", max_steps=3), [])
    base = make_config().run.output_dir / "base/checkpoints/checkpoint-3"
    config = make_config(
        model_config_file=None,
        tokenizer_name=None,
        model_name=base,
        training_method=method,
        max_steps=3,
    )
    train(config, [])
    folder = config.run.output_dir / "run/checkpoints/checkpoint-3"
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(10)[None]
    before = plain(ids).logits
    adapted = peft.PeftModel.from_pretrained(plain, folder)
    assert not torch.allclose(before, adapted(ids).logits, atol=1e-4)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert all("lora_" in name for name in names)
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)


def test_nothing_in_a_checkpoint_is_a_pickle(run):
    folder = save(run)
    endings = {file.suffix for file in folder.iterdir() if file.name != "COMMIT"}
    assert endings <= {".safetensors", ".json", ".md"}


def test_progress_is_readable(run):
    run.progress.advance(blocks=4, target_tokens=99)
    checkpoint = read_checkpoint(save(run))
    assert (checkpoint.progress.step, checkpoint.progress.blocks_seen) == (1, 4)
    assert checkpoint.progress.tokens_seen == 99
    assert checkpoint.provenance.config["schedule"]["learning_rate"] == 0.01
    assert set(checkpoint.provenance.fingerprints) == {"corpus", "tokenizer", "frozen_weights"}
    assert checkpoint.provenance.step_blocks == 4


def test_a_manifest_vouches_for_every_file(run):
    folder = save(run, 7, held_out_loss=1.5)
    manifest = verify(folder)
    assert (manifest.step, manifest.held_out_loss, manifest.facts) == (7, 1.5, {"loss": 2.5})
    assert manifest.files.keys() == names_in(folder) - {"manifest.json", "COMMIT"}
    assert manifest.total_bytes == sum((folder / name).stat().st_size for name in manifest.files)


# In the background


def test_a_background_save_holds_the_step_it_was_taken_at(run):
    manager, said = put_on(FileSystem(), run, async_checkpoint=True)
    here = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    moments = {
        name: run.engine.optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in run.model.named_parameters()
    }
    save(run, 1, manager)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
            run.engine.optimizer.state[parameter]["exp_avg"].add_(1.0)
    manager.poll(wait=True)
    saved = load_file(run.folder.directory.checkpoint_path(1) / "model.safetensors")
    assert all(torch.equal(saved[name], here[name]) for name in saved)
    optimizer = load_file(run.folder.directory.checkpoint_path(1) / "optimizer.safetensors")
    assert all(torch.equal(optimizer[f"{name}/exp_avg"], moments[name]) for name in moments)
    assert "blocked the loop for" in said[-1]


def test_the_next_save_waits_for_the_one_before(run):
    manager, said = put_on(FileSystem(), run, async_checkpoint=True)
    for step in (1, 2, 3):
        save(run, step, manager)
    manager.poll(wait=True)
    assert [line.split()[1].rsplit("-", 1)[1] for line in said] == ["1", "2", "3"]


def test_a_copy_that_does_not_fit_in_memory_is_not_made(run, monkeypatch):
    import psutil

    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    manager, said = put_on(FileSystem(), run, async_checkpoint=True)
    save(run, 1, manager)
    verify(run.folder.directory.checkpoint_path(1))
    assert "does not fit in the 1 kB of free memory" in said[0]


class SlowDisk(FileSystem):
    """A disk on which the files of a save wait for leave to be created."""

    def __init__(self) -> None:
        self.leave = threading.Event()

    def create(self, path: Path) -> int:
        assert self.leave.wait(timeout=60)
        return super().create(path)


def test_a_background_save_is_committed_by_the_poll_that_finds_it_written(run):
    disk = SlowDisk()
    manager, said = put_on(disk, run, async_checkpoint=True)
    save(run, 1, manager)
    manager.poll()
    assert said == []
    assert not run.folder.directory.checkpoint_path(1).exists()
    disk.leave.set()
    manager.poll(wait=True)
    assert said[0].startswith(f"saved {run.folder.directory.checkpoint_path(1)}")
    verify(run.folder.directory.checkpoint_path(1))


def test_a_run_that_ends_by_an_error_finishes_its_background_save(run):
    manager, said = put_on(FileSystem(), run, async_checkpoint=True)
    save(run, 1, manager)
    manager.close()
    verify(run.folder.directory.checkpoint_path(1))
    assert said[0].startswith("saved ")


def test_an_error_of_the_last_background_save_hides_no_other(run):
    disk = FullDisk()
    disk.is_full = True
    manager, said = put_on(disk, run, async_checkpoint=True)
    save(run, 1, manager)
    manager.close()
    assert "the last save failed: [Errno 28]" in said[0]


def test_what_a_background_save_has_replaced_is_deleted_with_the_next(run):
    manager, _ = put_on(FileSystem(), run, async_checkpoint=True, keep_checkpoints=2)
    for step in (1, 2, 3):
        save(run, step, manager)
    manager.poll(wait=True)
    assert names_in(run.folder.directory.checkpoints) == {
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    }
    save(run, 4, manager, must_succeed=True)
    assert names_in(run.folder.directory.checkpoints) == {"checkpoint-3", "checkpoint-4"}


def test_a_damaged_checkpoint_is_reported_by_the_save_that_meets_it(run):
    (save(run, 1) / "COMMIT").unlink()
    manager, said = put_on(FileSystem(), run, async_checkpoint=True)
    save(run, 2, manager)
    manager.poll(wait=True)
    assert "checkpoint-1: damaged: COMMIT is missing" in said[0]
    assert names_in(run.folder.directory.checkpoints) == {"damaged-checkpoint-1", "checkpoint-2"}


# A disk that refuses


@pytest.mark.parametrize("is_async", [False, True])
def test_training_goes_on_over_a_full_disk_until_too_many_saves_failed(run, is_async):
    disk = FullDisk()
    manager, said = put_on(disk, run, async_checkpoint=is_async, max_failed_saves=3)

    def save_now(step: int) -> None:
        save(run, step, manager)
        manager.poll(wait=True)

    save_now(1)
    disk.is_full = True
    save_now(2)
    save_now(3)
    disk.is_full = False
    save_now(4)
    assert names_in(run.folder.directory.checkpoints) == {"checkpoint-1", "checkpoint-4"}
    assert "No space left on device" in said[1]
    assert "2 more failed in a row will end the run" in said[1]
    assert "1 more failed in a row will end the run" in said[2]
    disk.is_full = True
    save_now(5)
    save_now(6)
    with pytest.raises(CheckpointError, match="3 saves in a row failed, every older checkpoint"):
        save_now(7)
    assert names_in(run.folder.directory.checkpoints) == {"checkpoint-1", "checkpoint-4"}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_commit_that_the_disk_refuses_is_a_failed_save(run, is_async, monkeypatch):
    disk = FileSystem()
    manager, said = put_on(disk, run, async_checkpoint=is_async)

    def refuse(*values) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "rename", refuse)
    save(run, 1, manager)
    manager.poll(wait=True)
    assert "a checkpoint could not be saved: [Errno 5]" in said[0]
    assert names_in(run.folder.directory.checkpoints) == set()
    monkeypatch.undo()
    save(run, 2, manager)
    manager.poll(wait=True)
    assert names_in(run.folder.directory.checkpoints) == {"checkpoint-2"}


def test_a_save_that_must_succeed_fails_at_once(run):
    disk = FullDisk()
    disk.is_full = True
    manager, _ = put_on(disk, run, async_checkpoint=True)
    with pytest.raises(CheckpointError, match="1 save in a row failed"):
        save(run, 1, manager, must_succeed=True)
    assert names_in(run.folder.directory.checkpoints) == set()


def test_an_old_checkpoint_that_cannot_go_does_not_fail_the_save(run, monkeypatch):
    disk = FileSystem()
    manager, said = put_on(disk, run, keep_checkpoints=2, keep_best=False)
    save(run, 1, manager)
    save(run, 2, manager)
    monkeypatch.setattr(
        disk, "delete_file", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
    )
    save(run, 3, manager)
    assert "an old checkpoint could not go" in said[-2]
    verify(run.folder.directory.checkpoint_path(3))
    monkeypatch.undo()
    save(run, 4, manager)
    assert names_in(run.folder.directory.checkpoints) == {"checkpoint-3", "checkpoint-4"}


def test_a_folder_that_another_process_has_taken_gets_no_checkpoint(run):
    lock = run.folder.directory.path / ".lock"
    lock.write_text('{"host": "b", "process": 7, "since": "now", "id": "x"}')
    with pytest.raises(LockedError, match=r"another process has taken .*process 7 on b"):
        save(run)
    assert run.folder.directory.checkpoint_path(1).name not in names_in(
        run.folder.directory.checkpoints
    )


def test_a_disk_too_small_for_what_is_to_come_is_told_before(run, monkeypatch):
    assert run.checkpoints.describe_space(run.engine, 0, 6) == []
    disk = FileSystem()
    monkeypatch.setattr(disk, "count_free_bytes", lambda path: 200_000)
    manager, _ = put_on(disk, run, save_steps=1)
    size = verify(save(run)).total_bytes
    [warning] = manager.describe_space(run.engine, 0, 6)
    assert "200 kB are free" in warning
    each = float(warning.split("(")[1].split(" ")[0]) * 1e6
    assert each == pytest.approx(size, rel=0.03)
    needed = float(warning.split("need ")[1].split(" ")[0]) * 1e6
    assert needed == pytest.approx(5 * each, rel=0.02), "3 newest, the best, the one being written"
