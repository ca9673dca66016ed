"""The tokenizer of the tests as an encoder, and a folder with a corpus."""

import pytest
from corpora import Place, load, save_framing_tokenizer
from transformers import PreTrainedTokenizerBase

from qloop.data.encoder import Encoder, build_encoder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> PreTrainedTokenizerBase:
    return load(tokenizer_dir)


@pytest.fixture(scope="session")
def encoder(tokenizer) -> Encoder:
    return build_encoder(tokenizer)


@pytest.fixture(scope="session")
def starting_encoder(tokenizer_dir, tmp_path_factory) -> Encoder:
    """Of a tokenizer that puts a start token before every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("starting")
    save_framing_tokenizer(tokenizer_dir, folder, "<s> $A")
    return build_encoder(load(folder))


@pytest.fixture
def place(tmp_path, encoder) -> Place:
    return Place(tmp_path, encoder)
