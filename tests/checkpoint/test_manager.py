"""Checkpoints: whole or absent, and loadable by the libraries that people know."""

import errno
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qloop.checkpoint.manager import CheckpointManager
from qloop.checkpoint.resume import read_checkpoint, restore
from qloop.checkpoint.store import CheckpointStore, DamagedError
from qloop.errors import CheckpointError, LockedError
from qloop.run import Assembly, assemble
from qloop.storage.filesystem import FileSystem
from qloop.storage.tensors import (
    LazyTensor,
    SavedTensors,
    TensorSpec,
    align,
    deal_out,
    encode_tensors,
    gather_mine,
    spec_of,
)
from qloop.train import train


class FullDisk(FileSystem):
    """A disk on which nothing can be created while it is full."""

    is_full = False

    def create(self, path: Path) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().create(path)


@pytest.fixture
def parts(make_config):
    parts = assemble(make_config(async_checkpoint="false"), [])
    for parameter in parts.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts.engine.optimizer.step()
    yield parts
    parts.close()


def put_on(disk: FileSystem, parts: Assembly, **keys) -> tuple[CheckpointManager, list[str]]:
    """Builds the manager of a run on another disk, with other keys; gives what it says, too."""
    said: list[str] = []
    store = CheckpointStore(parts.run.checkpoints, disk)
    section = parts.config.checkpoint.model_copy(update=keys)
    provenance, files = parts.checkpoints._provenance, parts.checkpoints._files
    manager = CheckpointManager(store, section, parts.accelerator, provenance, files, said.append)
    return manager, said


def save(
    parts: Assembly,
    step: int = 1,
    manager: CheckpointManager | None = None,
    held_out_loss: float | None = None,
    must_succeed: bool = False,
) -> Path:
    parts.progress.step = step
    (manager or parts.checkpoints).save(
        parts.engine, parts.progress, 2.5, held_out_loss, must_succeed
    )
    return parts.run.checkpoint_path(step)


def kinds_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return align({name: spec_of(tensor) for name, tensor in tensors.items()})


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    kinds = kinds_of(tensors)
    file.write_bytes(b"".join(encode_tensors(kinds, [tensors[name] for name in kinds])))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def verify(path: Path):
    return CheckpointStore(path.parent, FileSystem()).verify(path)


def rewrite(path: Path, file: str, content: bytes) -> None:
    """Changes a file and lets manifest and COMMIT vouch for the change."""
    import hashlib

    (path / file).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


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


def test_a_full_checkpoint_holds_what_save_pretrained_writes(parts, tmp_path):
    folder = save(parts)
    parts.model.save_pretrained(tmp_path / "theirs")
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


def test_nothing_in_a_checkpoint_is_a_pickle(parts):
    folder = save(parts)
    endings = {file.suffix for file in folder.iterdir() if file.name != "COMMIT"}
    assert endings <= {".safetensors", ".json", ".md"}


def test_progress_is_readable(parts):
    parts.progress.advance(blocks=4, target_tokens=99)
    checkpoint = read_checkpoint(save(parts))
    assert (checkpoint.progress.step, checkpoint.progress.blocks_seen) == (1, 4)
    assert checkpoint.progress.tokens_seen == 99
    assert checkpoint.provenance.config["schedule"]["learning_rate"] == 0.01
    assert set(checkpoint.provenance.fingerprints) == {"corpus", "tokenizer", "frozen_weights"}
    assert checkpoint.provenance.step_blocks == 4


def test_a_manifest_vouches_for_every_file(parts):
    folder = save(parts, 7, held_out_loss=1.5)
    manifest = verify(folder)
    assert (manifest.step, manifest.held_out_loss, manifest.facts) == (7, 1.5, {"loss": 2.5})
    assert manifest.files.keys() == names_in(folder) - {"manifest.json", "COMMIT"}
    assert manifest.total_bytes == sum((folder / name).stat().st_size for name in manifest.files)


# Tensors

TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float16)


@given(
    st.dictionaries(
        st.text("ab./", min_size=1, max_size=5),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_tensors_are_written_as_the_library_reads_them(tmp_path_factory, kinds):
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    file = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    write_tensors(file, tensors)
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].equal(tensors[name]) for name in tensors)
    assert SavedTensors(file.parent, "t").kinds == kinds_of(tensors)


def test_a_tensor_that_is_no_contiguous_memory_is_written_by_its_values(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"t": tensor})
    assert load_file(file)["t"].equal(tensor)


def test_a_type_that_has_no_name_in_the_format_is_refused():
    with pytest.raises(CheckpointError, match="complex64 cannot be saved"):
        spec_of(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(2), "holds 1 that the model has not, the first b"),
        ("a", torch.zeros(3), r"the first a: F32 \[3\] instead of F32 \[2\]"),
        ("a", torch.zeros(2, dtype=torch.float16), r"a: F16 \[2\] instead of F32 \[2\]"),
    ],
)
def test_tensors_of_another_name_type_or_shape_are_not_loaded(tmp_path, name, tensor, message):
    file = tmp_path / "t.safetensors"
    save_file({name: tensor}, file)
    with pytest.raises(CheckpointError, match=message):
        SavedTensors(tmp_path, "t").refuse_misfits({"a": spec_of(torch.zeros(2))})


@given(
    st.dictionaries(
        st.text("ab./", min_size=1, max_size=5),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_every_tensor_is_dealt_to_one_writer(kinds, num_writers):
    dealt = {n: spec_of(torch.empty(shape, dtype=dtype)) for n, (dtype, shape) in kinds.items()}
    shares = deal_out(dealt, num_writers)
    assert len(shares) == num_writers
    assert sorted(name for share in shares for name in share) == sorted(dealt)
    assert all(share == align(share) for share in shares)
    sizes = [sum(kind.nbytes for kind in share.values()) for share in shares]
    largest = max((kind.nbytes for kind in dealt.values()), default=0)
    assert max(sizes) - min(sizes) <= largest, "as even as whole tensors allow"


def test_tensors_of_several_files_are_read_as_of_one(tmp_path):
    whole = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2), "c": torch.zeros(())}
    for number, share in enumerate(deal_out(kinds_of(whole), 2)):
        write_tensors(tmp_path / f"t-{number}-of-2.safetensors", {n: whole[n] for n in share})
    saved = SavedTensors(tmp_path, "t")
    saved.refuse_misfits(kinds_of(whole))
    assert all(saved.read(name).equal(whole[name]) for name in whole)
    assert saved.read("a", slice(1, 3)).equal(whole["a"][1:3])


def test_gathering_ones_own_takes_part_in_gathering_the_others():
    asked: list[str] = []

    def gather(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.zeros(1)

    kind = spec_of(torch.zeros(1))
    pieces = {name: LazyTensor(kind, functools.partial(gather, name)) for name in ("a", "b", "c")}
    assert len(list(gather_mine(pieces, {"b": kind}))) == 1
    assert list(gather_mine(pieces, {})) == []
    assert asked == ["a", "b", "c"] * 2


# Saving and rotating


def test_rotation_keeps_the_newest_by_number(parts):
    for step in (8, 9, 10, 11):
        save(parts, step)
    assert names_in(parts.run.checkpoints) == {"checkpoint-10", "checkpoint-11", "checkpoint-9"}


def test_rotation_spares_the_best_and_every_so_many(parts):
    manager, _ = put_on(FileSystem(), parts, keep_checkpoints=2, keep_every=10)
    losses = {5: 3.0, 10: 2.9, 15: 1.0, 20: 2.0, 25: None, 30: 2.5, 35: 2.4, 40: 2.3}
    for step, loss in losses.items():
        save(parts, step, manager, held_out_loss=loss)
    steps = {int(name.split("-")[1]) for name in names_in(parts.run.checkpoints)}
    assert steps == {10, 15, 20, 30, 35, 40}


def test_the_best_goes_when_a_better_one_comes_or_it_is_not_wanted(parts):
    manager, _ = put_on(FileSystem(), parts, keep_checkpoints=2)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 0.5), (5, 3.0), (6, 3.0)):
        save(parts, step, manager, held_out_loss=loss)
    assert names_in(parts.run.checkpoints) == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}
    manager, _ = put_on(FileSystem(), parts, keep_checkpoints=2, keep_best=False)
    save(parts, 7, manager)
    assert names_in(parts.run.checkpoints) == {"checkpoint-6", "checkpoint-7"}


def test_rotation_counts_only_good_ones(parts):
    for step in (1, 2, 3):
        save(parts, step)
    weights = parts.run.checkpoint_path(3) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    manager, said = put_on(FileSystem(), parts, keep_checkpoints=3)
    save(parts, 4, manager)
    assert names_in(parts.run.checkpoints) == {
        *("checkpoint-1", "checkpoint-2", "checkpoint-4", "damaged-checkpoint-3"),
    }
    assert "damaged: model.safetensors has" in said[0]


def test_a_directory_that_nobody_expects_is_moved_aside_and_kept(parts):
    for _ in range(3):
        folder = parts.run.checkpoint_path(1)
        folder.mkdir(exist_ok=True)
        (folder / "occupied").write_text("x")
        save(parts)
        verify(folder)
    kept = sorted(names_in(parts.run.checkpoints) - {"checkpoint-1"})
    assert kept == ["damaged-checkpoint-1", "damaged-checkpoint-1-2", "damaged-checkpoint-1-3"]
    assert (parts.run.checkpoints / kept[0] / "occupied").read_text() == "x"


def test_what_a_crash_left_goes_with_the_next_save_and_other_names_stay(parts):
    folder = parts.run.checkpoints
    for name in (
        ".unfinished-checkpoint-2-abcd",
        ".deleted-checkpoint-1",
        ".nfs000",
        "checkpoint-x",
    ):
        (folder / name / "inside").mkdir(parents=True)
    assert CheckpointStore(folder, FileSystem()).list_checkpoints() == []
    save(parts)
    assert names_in(folder) == {"checkpoint-1", ".nfs000", "checkpoint-x"}


# Behind the loop


def test_a_save_behind_the_loop_holds_the_step_it_was_taken_at(parts):
    manager, said = put_on(FileSystem(), parts, async_checkpoint=True)
    here = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    moments = {
        name: parts.engine.optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in parts.model.named_parameters()
    }
    save(parts, 1, manager)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(1.0)
            parts.engine.optimizer.state[parameter]["exp_avg"].add_(1.0)
    manager.poll(wait=True)
    saved = load_file(parts.run.checkpoint_path(1) / "model.safetensors")
    assert all(torch.equal(saved[name], here[name]) for name in saved)
    optimizer = load_file(parts.run.checkpoint_path(1) / "optimizer.safetensors")
    assert all(torch.equal(optimizer[f"{name}/exp_avg"], moments[name]) for name in moments)
    assert "the loop stood still for" in said[-1]


def test_the_next_save_waits_for_the_one_before(parts):
    manager, said = put_on(FileSystem(), parts, async_checkpoint=True)
    for step in (1, 2, 3):
        save(parts, step, manager)
    manager.poll(wait=True)
    assert [line.split()[1].rsplit("-", 1)[1] for line in said] == ["1", "2", "3"]


def test_a_copy_that_does_not_fit_in_memory_is_not_made(parts, monkeypatch):
    import psutil

    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    manager, said = put_on(FileSystem(), parts, async_checkpoint=True)
    save(parts, 1, manager)
    verify(parts.run.checkpoint_path(1))
    assert "does not fit in the 1 kB of free memory" in said[0]
    assert manager._copies.nbytes == 0


# A disk that refuses


@pytest.mark.parametrize("is_async", [False, True])
def test_training_goes_on_over_a_full_disk_until_too_many_saves_failed(parts, is_async):
    disk = FullDisk()
    manager, said = put_on(disk, parts, async_checkpoint=is_async, max_failed_saves=3)

    def save_now(step: int) -> None:
        save(parts, step, manager)
        manager.poll(wait=True)

    save_now(1)
    disk.is_full = True
    save_now(2)
    save_now(3)
    disk.is_full = False
    save_now(4)
    assert names_in(parts.run.checkpoints) == {"checkpoint-1", "checkpoint-4"}
    assert "No space left on device" in said[1]
    assert "2 more failed in a row will end the run" in said[1]
    assert "1 more failed in a row will end the run" in said[2]
    disk.is_full = True
    save_now(5)
    save_now(6)
    with pytest.raises(CheckpointError, match="3 saves in a row failed, every older checkpoint"):
        save_now(7)
    assert names_in(parts.run.checkpoints) == {"checkpoint-1", "checkpoint-4"}


def test_a_save_that_must_succeed_fails_at_once(parts):
    disk = FullDisk()
    disk.is_full = True
    manager, _ = put_on(disk, parts, async_checkpoint=True)
    with pytest.raises(CheckpointError, match="1 save in a row failed"):
        save(parts, 1, manager, must_succeed=True)
    assert names_in(parts.run.checkpoints) == set()


def test_an_old_checkpoint_that_cannot_go_does_not_fail_the_save(parts, monkeypatch):
    disk = FileSystem()
    manager, said = put_on(disk, parts, keep_checkpoints=2, keep_best=False)
    save(parts, 1, manager)
    save(parts, 2, manager)
    monkeypatch.setattr(
        disk, "delete_file", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
    )
    save(parts, 3, manager)
    assert "an old checkpoint could not go" in said[-2]
    verify(parts.run.checkpoint_path(3))
    monkeypatch.undo()
    save(parts, 4, manager)
    assert names_in(parts.run.checkpoints) == {"checkpoint-3", "checkpoint-4"}


def test_a_folder_that_another_process_has_taken_gets_no_checkpoint(parts):
    lock = parts.run.path / ".lock"
    lock.write_text('{"host": "b", "process": 7, "since": "now", "id": "x"}')
    with pytest.raises(LockedError, match=r"another process has taken .*process 7 on b"):
        save(parts)
    assert parts.run.checkpoint_path(1).name not in names_in(parts.run.checkpoints)


def test_a_disk_too_small_for_what_is_to_come_is_told_before(parts, monkeypatch):
    assert parts.checkpoints.describe_space(parts.engine, 0, 6) == []
    disk = FileSystem()
    monkeypatch.setattr(disk, "count_free_bytes", lambda path: 200_000)
    manager, _ = put_on(disk, parts, save_steps=1)
    size = verify(save(parts)).total_bytes
    [warning] = manager.describe_space(parts.engine, 0, 6)
    assert "200 kB are free" in warning
    each = float(warning.split("(")[1].split(" ")[0]) * 1e6
    assert each == pytest.approx(size, rel=0.03)
    needed = float(warning.split("need ")[1].split(" ")[0]) * 1e6
    assert needed == pytest.approx(5 * each, rel=0.02), "3 newest, the best, the one being written"


# Going back


@pytest.mark.parametrize("harm", ["missing", "renamed", "reshaped", "retyped", "garbage"])
def test_moments_that_do_not_fit_are_refused_by_name(parts, harm):
    folder = save(parts)
    tensors = load_file(folder / "optimizer.safetensors")
    name = "model.norm.weight"
    if harm == "missing":
        tensors = {key: value for key, value in tensors.items() if key != f"{name}/exp_avg"}
    elif harm == "renamed":
        tensors["nobody/exp_avg"] = tensors.pop(f"{name}/exp_avg")
    elif harm == "reshaped":
        tensors[f"{name}/exp_avg"] = torch.zeros(3)
    elif harm == "retyped":
        tensors[f"{name}/exp_avg"] = tensors[f"{name}/exp_avg"].half()
    save_file(tensors, folder / "optimizer.safetensors")
    if harm == "garbage":
        (folder / "optimizer.safetensors").write_bytes(b"no tensors")
    before = {p: dict(state) for p, state in parts.engine.optimizer.state.items()}
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        restore(parts.engine, read_checkpoint(folder), "adamw")
    assert {p: dict(state) for p, state in parts.engine.optimizer.state.items()} == before


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / "COMMIT").unlink(), "COMMIT is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{}"), "not the one that COMMIT"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "model.bin").write_text(""), "model.bin was put there by someone"),
        (lambda path: rewrite(path, "model.bin", b"x"), "model.bin is no file that a checkpoint"),
        (lambda path: rewrite(path, "../x.json", b"x"), "../x.json is no file that a checkpoint"),
        (lambda path: path.rename(path.with_name("checkpoint-5")), "the checkpoint of step 1"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x"), "has 1 bytes instead of"),
    ],
)
def test_a_damaged_directory_is_named_with_its_reason(parts, harm, reason):
    path = save(parts)
    harm(path)
    [path] = CheckpointStore(path.parent, FileSystem()).list_checkpoints()
    with pytest.raises(DamagedError, match=reason.replace(".", r"\.")):
        verify(path)


def test_a_single_flipped_bit_is_found(parts):
    path = save(parts)
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "optimizer.safetensors").write_bytes(content)
    with pytest.raises(DamagedError, match=r"optimizer\.safetensors is not as it was written"):
        verify(path)


def test_a_link_in_place_of_a_file_is_refused(parts, tmp_path):
    path = save(parts)
    (path / "config.json").rename(tmp_path / "config.json")
    (path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(DamagedError, match=r"config\.json is no plain file"):
        verify(path)


def test_the_newest_good_one_is_found_and_newer_damaged_ones_are_moved_aside(parts):
    for step in (1, 2, 3):
        save(parts, step)
    for step in (2, 3):
        (parts.run.checkpoint_path(step) / "COMMIT").unlink()
    told: list[str] = []
    kept = CheckpointStore(parts.run.checkpoints, FileSystem()).find_newest(told.append)
    assert kept is not None
    assert kept.path == parts.run.checkpoint_path(1)
    assert names_in(parts.run.checkpoints) == {
        *("checkpoint-1", "damaged-checkpoint-2", "damaged-checkpoint-3"),
    }
    assert [line.split(": ", 1)[0] for line in told] == [
        str(parts.run.checkpoint_path(3)),
        str(parts.run.checkpoint_path(2)),
    ]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_what_cannot_be_read_for_now_is_not_moved_aside(parts, number, monkeypatch):
    save(parts)

    class Busy(FileSystem):
        def read(self, path: Path):
            raise OSError(number, "not now", str(path))

    with pytest.raises(OSError, match="not now"):
        CheckpointStore(parts.run.checkpoints, Busy()).find_newest(print)
    assert names_in(parts.run.checkpoints) == {"checkpoint-1"}


def test_all_bytes_of_wide_items_are_written(tmp_path):
    content = memoryview(bytes((1 << 22) + 400)).cast("f")
    disk = FileSystem()
    descriptor = disk.create(tmp_path / "file")
    disk.append(descriptor, content)
    disk.close(descriptor)
    assert (tmp_path / "file").stat().st_size == (1 << 22) + 400


def test_no_checkpoint_is_newest_of_an_empty_or_missing_folder(tmp_path):
    assert CheckpointStore(tmp_path / "missing", FileSystem()).find_newest(print) is None
