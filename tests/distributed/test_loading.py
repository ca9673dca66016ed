"""A model is read once, and cut over the ranks with every weight still trained."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from launching import ROOT
from workspace import Workspace

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("loading") / "workspace")


@pytest.fixture(scope="module")
def large(workspace):
    """A base of 100 MB in fp32, so that what a rank holds of it can be told from everything else.

    Stored in bf16: fp32 would be mapped from the file, and be nobody's memory until it is used.
    """
    folder = workspace.folder / "large"
    config = transformers.AutoConfig.for_model(
        "qwen2", vocab_size=1024, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(workspace.tokenizer).save_pretrained(folder)
    return folder


def look_inside(workspace: Workspace, launch: str, **keys) -> list[dict]:
    folder = workspace.folder / "-".join(["facts", *map(str, keys.values())]).replace("/", "_")
    folder.mkdir()
    (folder / "flags.json").write_text(json.dumps(workspace.flags(**keys)))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "launch" / launch), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "tests/distributed/inside.py")]
    command += [str(folder / "flags.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def base_of(folder) -> dict:
    return {"model_config_file": None, "tokenizer_name": None, "model_name": str(folder)}


def test_under_fsdp2_one_process_reads_the_base_and_each_keeps_its_shards(workspace, large):
    first, second = look_inside(workspace, "fsdp2.yaml", **base_of(large))
    assert first["model_bytes"] == second["model_bytes"] > 90e6
    assert first["built_bytes"] > 0.9 * first["model_bytes"], "it has read them"
    assert second["built_bytes"] < 0.3 * second["model_bytes"], "places, and libraries"
    for rank in (first, second):
        assert rank["local_bytes"] == pytest.approx(rank["model_bytes"] / 2, rel=0.02)
    assert first["buffers"] == second["buffers"] != 0, "which are in no file, and are not sent"
    assert first["checksum"] == second["checksum"] > 0, "shards of the same model"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_trained_weight_of_every_rank_is_in_the_optimizer(workspace, large, method):
    keys = {**base_of(large), "training_method": method, "experiment_name": "all"}
    for rank in look_inside(workspace, "fsdp2.yaml", **keys):
        assert rank["trained"] == rank["optimized"] > 70


def test_a_4_bit_base_is_cut_too(workspace, large):
    keys = {**base_of(large), "training_method": "qlora"}
    for rank in look_inside(workspace, "fsdp2_qlora.yaml", **keys):
        assert rank["sharded_base_layers"] == rank["base_layers"] == 6 * 7
        assert rank["local_bytes"] == pytest.approx(rank["model_bytes"] / 2, rel=0.1)
