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
from safetensors.torch import load_file
from workspace import Workspace, reset_accelerate

import qloop.export
from qloop.checkpoint.tensors import SavedTensors
from qloop.errors import CheckpointError, ConfigError
from qloop.export import export
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
    monkeypatch.setattr(qloop.export, "_PART_BYTES", 100_000)
    export_to(tmp_path / "model", run(workspace, "full"))
    parts = sorted((tmp_path / "model").glob("model-*-of-*.safetensors"))
    assert len(parts) > 2
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    whole = load(run(workspace, "full") / "checkpoints/checkpoint-2")
    assert logits(load(tmp_path / "model")).equal(logits(whole))


def test_a_checkpoint_in_parts_is_exported_too(workspace, tmp_path, monkeypatch):
    """Parts are what several processes write; an export in parts has the same form."""
    monkeypatch.setattr(qloop.export, "_PART_BYTES", 100_000)
    export_to(tmp_path / "parts", run(workspace, "full"))
    monkeypatch.undo()
    saved = SavedTensors(tmp_path / "parts", "model")
    whole = load_file(run(workspace, "full") / "checkpoints/checkpoint-2/model.safetensors")
    assert all(saved.read(name).equal(whole[name]) for name in whole)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_rslora": "true"},
        {"use_dora": "true"},
        {"modules_to_save": "lm_head"},
    ],
    ids=["lora", "rslora", "dora", "modules_to_save"],
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
    with pytest.raises(CheckpointError, match="holds no good checkpoint"):
        export_to(tmp_path / "model", folder)


def test_a_destination_in_use_is_left_alone(workspace, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and not empty"):
        export_to(tmp_path, run(workspace, "full"))
    (tmp_path / "empty").mkdir()
    export_to(tmp_path / "empty", run(workspace, "full"))
    assert (tmp_path / "empty/config.json").exists()
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(workspace, tmp_path, monkeypatch):
    def full(*values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qloop.export, "encode_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device; make room"):
        export_to(tmp_path / "model", run(workspace, "full"))
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_needs_no_base(workspace, tmp_path):
    with pytest.raises(ConfigError, match="is a whole model and needs none"):
        export_to(tmp_path / "model", run(workspace, "full"), base="elsewhere")


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qloop", "export", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
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
        (("nowhere", "model"), 74, "nowhere: holds no good checkpoint"),
        (("nowhere", "model", "--dtype", "int3"), 78, "'int3' is not one of"),
        (("nowhere",), 78, "Missing argument 'DESTINATION'"),
    ],
)
def test_a_mistake_ends_in_a_message_and_its_exit_code(words, code, message):
    done = command(*words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
