"""`qloop export`: plain directories that transformers loads, with the model that was trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save
from workspace import Workspace, reset_accelerate, write_checkpoint, write_model_config

import qloop.checkpoint.export
from qloop.checkpoint.export import export
from qloop.checkpoint.store import CheckpointStore
from qloop.errors import CheckpointError, ConfigError
from qloop.storage.filesystem import FileSystem
from qloop.train import train

IDS = torch.arange(40)[None] % 300


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("export") / "workspace")


def run(workspace: Workspace, name: str, method: str = "full", **keys: str) -> Path:
    """Makes a run of two steps, once, and gives its folder."""
    folder = workspace.folder / "output" / name
    if not folder.exists():
        keys = {**workspace.method_keys(method), "max_steps": 2, "warmup_steps": 0, **keys}
        reset_accelerate()
        train(workspace.make_config(experiment_name=name, **keys), [])
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def load(folder: Path) -> transformers.PreTrainedModel:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def export_to(folder: Path, source: Path, dtype: str = "fp32", base: str | None = None) -> list:
    said: list[str] = []
    export(source, folder, dtype, base, said.append)
    return said


def remake(folder: Path, checkpoint: Path, **replaced: bytes | None) -> Path:
    """Commits a checkpoint's files in another folder; some replaced, and those of None left out."""
    contents = {file.name: file.read_bytes() for file in checkpoint.iterdir()} | replaced
    files = [
        (name, [memoryview(content)])
        for name, content in contents.items()
        if content is not None and name not in ("COMMIT", "manifest.json")
    ]
    return write_checkpoint(CheckpointStore(folder, FileSystem()), 2, files, {}).path


def test_a_full_checkpoint_in_fp32_keeps_every_bit_and_nothing_of_training(workspace, tmp_path):
    folder = run(workspace, "full")
    said = export_to(tmp_path / "model", folder)
    saved = load_file(folder / "checkpoints/checkpoint-2/model.safetensors")
    found = load_file(tmp_path / "model/model.safetensors")
    assert found.keys() == saved.keys()
    assert all(found[name].equal(saved[name]) for name in saved)
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert "checkpoint-2 to" in said[0]


@pytest.mark.parametrize(
    ("dtype", "type_"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_model_loads_in_the_type_that_was_asked_for(workspace, tmp_path, dtype, type_):
    export_to(tmp_path / "model", run(workspace, "full"), dtype)
    model = load(tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {type_}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("select from t")["input_ids"]) == "select from t"


def test_large_models_are_written_in_parts(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(qloop.checkpoint.export, "_PART_BYTES", 100_000)
    export_to(tmp_path / "model", run(workspace, "full"))
    parts = sorted((tmp_path / "model").glob("model-*-of-*.safetensors"))
    assert len(parts) > 2
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    whole = load(run(workspace, "full") / "checkpoints/checkpoint-2")
    assert logits(load(tmp_path / "model")).equal(logits(whole))


def test_a_checkpoint_in_parts_is_exported_too(workspace, tmp_path):
    """Parts are what several processes write; these are cut by transformers itself."""
    checkpoint = run(workspace, "full") / "checkpoints/checkpoint-2"
    load(checkpoint).save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    parts = {file.name: file.read_bytes() for file in (tmp_path / "cut").glob("model*")}
    assert {"model-00001-of-00003.safetensors", "model.safetensors.index.json"} < parts.keys()
    export_to(
        tmp_path / "model",
        remake(tmp_path, checkpoint, **{"model.safetensors": None}, **parts),
    )
    assert not list((tmp_path / "model").glob("model-*"))
    whole = load_file(checkpoint / "model.safetensors")
    found = load_file(tmp_path / "model/model.safetensors")
    assert found.keys() == whole.keys()
    assert all(found[name].equal(whole[name]) for name in whole)


def test_a_weight_too_large_for_the_type_is_refused(workspace, tmp_path):
    checkpoint = run(workspace, "full") / "checkpoints/checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = -70000.0
    large = remake(tmp_path, checkpoint, **{"model.safetensors": save(weights, {"format": "pt"})})
    message = "model.norm.weight holds 7e\\+04, more than fp16 can, whose largest is 6.55e\\+04"
    with pytest.raises(ConfigError, match=message):
        export_to(tmp_path / "model", large, "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    export_to(tmp_path / "model", large, "bf16")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"precision": "bf16"},
        {"use_rslora": "true"},
        {"use_dora": "true"},
        {"modules_to_save": "lm_head"},
    ],
    ids=["lora", "bf16", "rslora", "dora", "modules_to_save"],
)
def test_a_merged_adapter_gives_the_logits_of_base_and_adapter(workspace, tmp_path, keys):
    folder = run(workspace, f"lora-{'-'.join(keys)}", "lora", **keys)
    export_to(tmp_path / "model", folder)
    base = load(workspace.folder / "output/base/checkpoints/checkpoint-3")
    plain = logits(base)
    apart = logits(peft.PeftModel.from_pretrained(base, folder / "checkpoints/checkpoint-2"))
    merged = logits(load(tmp_path / "model"))
    assert (merged - apart).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 1e-3, "the adapter does something"


def test_a_qlora_adapter_is_merged_into_the_base_in_full_precision(workspace, tmp_path):
    folder = run(workspace, "qlora", "qlora")
    said = export_to(tmp_path / "model", folder)
    assert "was trained on in 4 bits, so it cannot be compared" in said[0]
    base = load(workspace.folder / "output/base/checkpoints/checkpoint-3")
    apart = logits(peft.PeftModel.from_pretrained(base, folder / "checkpoints/checkpoint-2"))
    assert (logits(load(tmp_path / "model")) - apart).abs().max() < 1e-5


def test_the_base_may_have_moved(workspace, tmp_path):
    folder = run(workspace, "lora-", "lora")
    moved = shutil.copytree(
        workspace.folder / "output/base/checkpoints/checkpoint-3", tmp_path / "b"
    )
    export_to(tmp_path / "model", folder, base=str(moved))
    export_to(tmp_path / "other", folder)
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("model", "other"))
    assert all(first[name].equal(second[name]) for name in first)


def test_another_base_is_refused(workspace, tmp_path):
    folder, other = run(workspace, "lora-", "lora"), run(workspace, "full")
    with pytest.raises(ConfigError, match="not those that this adapter was trained on"):
        export_to(tmp_path / "model", folder, base=str(other / "checkpoints/checkpoint-2"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_of_another_shape_is_refused(workspace, tmp_path, method):
    wide = write_model_config(tmp_path / "wide", hidden_size=64)
    other = run(workspace, "wide", model_config_file=wide) / "checkpoints/checkpoint-2"
    adapter = run(workspace, "lora-" if method == "lora" else "qlora", method)
    with pytest.raises(ConfigError, match=r"cannot be the base of .* give its place by --base"):
        export_to(tmp_path / "model", adapter, base=str(other))
    assert not (tmp_path / "model").exists()


def test_a_base_that_is_not_there_is_named_with_what_to_do(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"^no/where: cannot be .* give its place by --base"):
        export_to(tmp_path / "model", run(workspace, "lora-", "lora"), base="no/where")


def test_an_adapter_of_another_version_of_qloop_is_refused(workspace, tmp_path):
    checkpoint = run(workspace, "lora-", "lora") / "checkpoints/checkpoint-2"
    progress = json.loads((checkpoint / "progress.json").read_text())
    progress["config"]["model"]["key_to_come"] = 1
    changed = remake(tmp_path, checkpoint, **{"progress.json": json.dumps(progress).encode()})
    with pytest.raises(CheckpointError, match=r"none of this version of qloop: .*\n.*key_to_come"):
        export_to(tmp_path / "model", changed)


def test_what_an_editor_left_in_a_checkpoint_is_no_part_of_the_model(workspace, tmp_path):
    checkpoint = remake(tmp_path, run(workspace, "full") / "checkpoints/checkpoint-2")
    (checkpoint / ".ipynb_checkpoints").mkdir()
    (checkpoint / ".notes").write_text("mine")
    export_to(tmp_path / "model", checkpoint)
    assert not list((tmp_path / "model").glob(".*"))


def test_of_a_run_the_newest_good_checkpoint_is_taken_and_nothing_is_moved(workspace, tmp_path):
    folder = run(workspace, "three", save_steps=1, max_steps=3)
    file = folder / "checkpoints/checkpoint-3/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    said = export_to(tmp_path / "model", folder)
    assert "checkpoint-3: not a good checkpoint: model.safetensors is not as it was" in said[0]
    assert "checkpoint-2 to" in said[1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before


def test_a_damaged_checkpoint_is_refused(workspace, tmp_path):
    folder = shutil.copytree(run(workspace, "full") / "checkpoints/checkpoint-2", tmp_path / "c")
    (folder / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match=r"COMMIT is missing\n.*: no good checkpoint; give a"):
        export_to(tmp_path / "model", folder)


def test_a_destination_in_use_is_left_alone(workspace, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and not empty"):
        export_to(tmp_path, run(workspace, "full"))
    (tmp_path / "empty").mkdir()
    export_to(tmp_path / "empty", run(workspace, "full"))
    assert (tmp_path / "empty/config.json").exists()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_destination_that_is_no_new_folder_is_refused(workspace, tmp_path, monkeypatch):
    folder = run(workspace, "full")
    checkpoint = folder / "checkpoints/checkpoint-2"
    with pytest.raises(ConfigError, match="would be a part of the checkpoint"):
        export_to(checkpoint / "model", folder)
    CheckpointStore(checkpoint.parent, FileSystem()).verify(checkpoint)
    with pytest.raises(ConfigError, match="File name too long; give another folder"):
        export_to(tmp_path / ("x" * 300), folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is where you are; give the name of a new folder"):
        export_to(Path(), folder)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_where_models_go_is_followed(workspace, tmp_path):
    (tmp_path / "link").symlink_to("models")
    export_to(tmp_path / "link", run(workspace, "full"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "models/config.json").exists()


def test_the_name_is_given_when_every_file_is_on_the_disk(workspace, tmp_path, monkeypatch):
    source = run(workspace, "full")
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def record_rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    export_to(tmp_path / "model", source)
    *synced, folder, renamed, parent = calls
    assert {file.name for file in (tmp_path / "model").iterdir()} <= set(synced)
    assert folder.startswith(".exporting-model-")
    assert (renamed, parent) == ("rename", tmp_path.name)


def test_a_destination_that_is_filled_meanwhile_is_left_alone(workspace, tmp_path, monkeypatch):
    find_checkpoint = qloop.checkpoint.export.find_checkpoint

    def find_and_fill(*values):
        (tmp_path / "model").mkdir()
        (tmp_path / "model/mine").write_text("mine")
        return find_checkpoint(*values)

    source = run(workspace, "full")
    monkeypatch.setattr(qloop.checkpoint.export, "find_checkpoint", find_and_fill)
    with pytest.raises(ConfigError, match="Directory not empty; give another folder"):
        export_to(tmp_path / "model", source)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


def test_a_whole_model_needs_no_base(workspace, tmp_path):
    with pytest.raises(ConfigError, match="is a whole model and needs none"):
        export_to(tmp_path / "model", run(workspace, "full"), base="elsewhere")


def command(*words: str, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*within, sys.executable, "-m", "qloop", "export", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_says_what_it_wrote_and_how_to_load_it(workspace, tmp_path):
    done = command(str(run(workspace, "full")), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert f"from_pretrained('{tmp_path}/model', dtype='auto')" in done.stdout
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nowhere", "model"), 78, "Directory 'nowhere' does not exist"),
        ((".", "model", "--dtype", "int3"), 78, "'int3' is not one of"),
        ((".",), 78, "Missing argument 'DESTINATION'"),
    ],
)
def test_a_mistake_ends_in_a_message_and_its_exit_code(words, code, message):
    done = command(*words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_and_an_unwritable_place_end_in_a_message(workspace, tmp_path):
    good = run(workspace, "full") / "checkpoints/checkpoint-2"
    damaged = shutil.copytree(good, tmp_path / "damaged")
    (damaged / "config.json").write_text("{}")
    for source, target, code, message in (
        (damaged, tmp_path / "model", 74, "config.json has 2 bytes instead of"),
        (good, Path("/proc/model"), 78, "/proc/model: cannot be written: "),
    ):
        done = command(str(source), str(target))
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr


ON_SMALL_DISK = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=120k tmpfs "$0" && "$@"')


@pytest.mark.skipif(
    subprocess.run([*ON_SMALL_DISK, "/mnt", "true"], capture_output=True, check=False).returncode,
    reason="mount namespaces are not allowed here",
)
def test_a_full_disk_ends_in_a_message_and_leaves_nothing(workspace, tmp_path):
    """A model of 190 kB, a disk of 120; what is left on it is listed before it goes."""
    listing = (*ON_SMALL_DISK, str(tmp_path), "sh", "-c", '"$@"; code=$?; ls -A "$0"; exit $code')
    source, target = run(workspace, "full"), tmp_path / "model"
    done = command(str(source), str(target), within=(*listing, str(tmp_path)))
    assert done.returncode == 74
    assert f"{target}: cannot be written: No space left on device; make room" in done.stderr
    assert done.stdout == ""
