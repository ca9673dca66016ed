"""The arithmetic of many GPUs, against numbers worked out by hand and a model of that config."""

import pytest
import torch
from arithmetic import MODELS, Model, compute_seconds, send_seconds, sent_bytes, state_bytes
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = Model(
    "small", hidden=8, layers=1, intermediate=16, heads=2, key_value_heads=1, vocabulary=1000
)


@pytest.mark.parametrize("model", [*MODELS, SMALL], ids=lambda model: model.name)
def test_parameters_are_those_that_transformers_counts(model):
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        intermediate_size=model.intermediate,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        vocab_size=model.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert model.parameters == sum(parameter.numel() for parameter in built.parameters())


def test_state_by_engine():
    p, unit = SMALL.parameters, 4 * 8000  # the embedding is the largest unit
    assert state_bytes(SMALL, "DDP", 4) == 16 * p
    assert state_bytes(SMALL, "FSDP2", 4) == 4 * p + unit
    assert state_bytes(SMALL, "ZeRO-2", 4) == 2 * p + 4 * p
    assert state_bytes(SMALL, "ZeRO-3", 4) == 4.5 * p + unit


def test_bytes_sent_in_a_step_of_three_micro_batches_by_four():
    p = SMALL.parameters
    assert sent_bytes(SMALL, "DDP", 4, 3) == 6 * p
    assert sent_bytes(SMALL, "FSDP2", 4, 3) == 18 * p
    assert sent_bytes(SMALL, "ZeRO-2", 4, 3) == 10.5 * p
    assert sent_bytes(SMALL, "ZeRO-3", 4, 3) == 18 * p


def test_one_machine_sends_nine_times_as_fast_as_several():
    assert send_seconds(9e9, 8) == pytest.approx(0.02)
    assert send_seconds(9e9, 16) == pytest.approx(0.18)


def test_computing_takes_eight_operations_a_parameter_and_token():
    assert compute_seconds(MODELS[0], 1) == pytest.approx(
        8 * MODELS[0].parameters * 8192 / (0.4 * 989e12)
    )
