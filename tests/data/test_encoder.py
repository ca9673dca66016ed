"""The encoder: special tokens in texts stay text, start and end tokens stand once."""

import json
from pathlib import Path

import pytest
from corpora import END, Place, load, save_framing_tokenizer, texts, tokens_of
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qloop.data.encoder import build_encoder


@pytest.fixture(scope="session")
def unmarked_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """The same tokenizer with no added token but the end marked special, as in Qwen2.5."""
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] == END
    folder = tmp_path_factory.mktemp("unmarked")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token=END
    ).save_pretrained(folder)
    return folder


SPELLED = [END, "<|fim_prefix|>", "<|file_sep|>", f"a:1{END}b:2", "x <|fim_prefix|> y"]


@pytest.mark.parametrize("text", SPELLED)
@pytest.mark.parametrize("marked", ["tokenizer_dir", "unmarked_dir"])
def test_text_that_spells_a_special_token_stays_text(place, request, marked, text):
    tokenizer = load(request.getfixturevalue(marked))
    place.write(*texts(text), {"prompt": text, "completion": "a"})
    store = place.read(build_encoder(tokenizer)).train
    added = set(tokenizer.added_tokens_decoder)
    assert tokenizer.decode(tokens_of(store)[:-1]) == text
    assert not added & set(tokens_of(store, 0)[:-1])
    assert not added & set(tokens_of(store, 1)[:-1])


def test_the_unmarked_tokenizer_would_read_the_text_as_a_token(unmarked_dir):
    """Else the test above proves nothing of it."""
    plain = AutoTokenizer.from_pretrained(unmarked_dir)
    ids = plain("<|fim_prefix|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == [plain.convert_tokens_to_ids("<|fim_prefix|>")]


def test_marking_tokens_special_changes_no_id(tokenizer, unmarked_dir):
    assert load(unmarked_dir).get_vocab() == tokenizer.get_vocab()


def test_a_start_token_stands_first_and_is_no_target(tmp_path, starting_encoder):
    place = Place(tmp_path, starting_encoder)
    place.write(*texts("select from trade"))
    corpus = place.read()
    (text_ids,) = starting_encoder.encode(["select from trade"])
    assert len(starting_encoder.start_ids) == 1
    assert tokens_of(corpus.train) == [
        *starting_encoder.start_ids,
        *text_ids,
        starting_encoder.end_id,
    ]
    assert corpus.train.first_targets.tolist() == [1]


def test_after_a_start_token_every_token_of_the_text_is_a_target(tmp_path, starting_encoder):
    place = Place(tmp_path, starting_encoder)
    place.write(*texts("select from trade", "a:1"))
    ledger = place.read().report["train"]
    text_tokens = sum(len(ids) for ids in starting_encoder.encode(["select from trade", "a:1"]))
    assert ledger["targets"] == text_tokens + 2
    assert (ledger["first_tokens"], ledger["prompt_tokens"]) == (2, 0)


def test_a_tokenizer_that_ends_texts_itself_does_not_end_them_twice(tokenizer_dir, tmp_path):
    save_framing_tokenizer(tokenizer_dir, tmp_path / "tokenizer", f"<s> $A {END}")
    place = Place(tmp_path, build_encoder(load(tmp_path / "tokenizer")))
    place.write(*texts("a:1"))
    tokens = tokens_of(place.read().train)
    assert tokens.count(place.encoder.end_id) == 1
    assert tokens[0] == place.encoder.start_ids[0]


def test_a_tokenizer_loaded_again_has_the_same_fingerprint(tokenizer_dir, encoder):
    again = load(tokenizer_dir)
    again("a text", split_special_tokens=False, truncation=True, max_length=1)
    assert build_encoder(again).fingerprint == encoder.fingerprint
