"""The token store: the tokens of documents, their targets, and their bytes."""

import hashlib
import shutil

import numpy as np
import pytest
from corpora import END, Place, texts, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from workspace import load_corpus

from qloop.data.documents import Document, Source
from qloop.data.encoder import Encoder, build_encoder


def encode_characters(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


def count_character_bytes(ids: list[int]) -> int:
    return len("".join(chr(character) for character in ids).encode())


def character_encoder(vocabulary_size: int, end_id: int) -> Encoder:
    """A tokenizer whose tokens are Unicode's characters, for any size of vocabulary."""
    return Encoder(
        encode=encode_characters,
        count_bytes=count_character_bytes,
        start_ids=[],
        end_id=end_id,
        vocabulary_size=vocabulary_size,
        fingerprint=f"characters {vocabulary_size} {end_id}",
    )


# Tokens


def test_each_document_ends_with_the_end_token_which_is_a_target(place, encoder):
    completion = {"prompt": "/ the sum of sizes\n", "completion": "sum size"}
    place.write(*texts("a:til 10\n", "b:sum a\n"), completion, held_out=texts("held:1b\n"))
    corpus = place.read()
    for store in (corpus.train, corpus.held_out):
        lengths = np.diff(store.offsets)
        assert (store.tokens[store.offsets[1:] - 1] == encoder.end_id).all()
        assert (store.first_targets <= lengths - 1).all()


def test_the_end_token_stands_nowhere_else(place, encoder):
    place.write(*texts(f"a:1{END}b:2", END, "c:3"))
    store = place.read().train
    assert int((store.tokens == encoder.end_id).sum()) == 3


def test_the_tokens_of_a_document_spell_its_text_byte_for_byte(place, tokenizer):
    contents = [
        "a:1\r\nb:2",
        "\ufeffa:1\n",
        "\n\n  a \t\n",
        "/ caf\u00e9 \u20ac \U0001f40d",
        " . , !",
    ]
    place.write(*texts(*contents))
    store = place.read().train
    read = [tokenizer.decode(tokens_of(store, document)[:-1]) for document in range(5)]
    assert read == contents


def test_a_documents_tokens_do_not_depend_on_its_neighbours(place, tokenizer):
    """More documents than are tokenised in one call, of many lengths."""
    contents = [f"f{number}:{{x+{'y' * (number % 17)}{number}}}" for number in range(600)]
    place.write(*texts(*contents))
    store = place.read().train
    read = [tokenizer.decode(tokens_of(store, document)[:-1]) for document in range(600)]
    assert read == contents


def test_prompt_and_completion_are_tokenised_apart(place, encoder):
    place.write({"prompt": "sel", "completion": "ect from trade"})
    ((prompt, completion),) = [encoder.encode(["sel", "ect from trade"])]
    assert tokens_of(place.read().train) == [*prompt, *completion, encoder.end_id]


def test_each_document_is_named_by_its_place_and_the_hash_of_its_content(place, tmp_path):
    place.write(*texts("a:1"))
    (entry,) = place.places(place.read())
    assert entry == {
        "place": f"{tmp_path / 'data' / 'filtered_train.jsonl'}:1",
        "sha256": hashlib.sha256(b"\0a:1").hexdigest(),
    }


# Targets


@pytest.mark.parametrize("prompt", ["/ the sum of sizes\n", "x"])
def test_the_tokens_of_a_prompt_are_no_targets(place, encoder, prompt):
    place.write({"prompt": prompt, "completion": "sum size"})
    corpus = place.read()
    ((prompt_ids, completion_ids),) = [encoder.encode([prompt, "sum size"])]
    assert corpus.train.first_targets.tolist() == [len(prompt_ids)]
    assert corpus.report["train"]["prompt_tokens"] == len(prompt_ids) - 1
    assert corpus.report["train"]["targets"] == len(completion_ids) + 1


@pytest.mark.parametrize(
    ("prompt", "train_on_prompt"), [("", False), ("/ the sum of sizes\n", True)]
)
def test_after_an_empty_or_a_learned_prompt_all_but_the_first_token_are_targets(
    place, prompt, train_on_prompt
):
    place.write({"prompt": prompt, "completion": "sum size"})
    corpus = place.read(train_on_prompt=train_on_prompt)
    assert corpus.train.first_targets.tolist() == [1]
    assert corpus.report["train"]["prompt_tokens"] == 0
    assert corpus.report["train"]["targets"] == corpus.report["train"]["tokens"] - 1


def test_after_a_start_token_a_prompt_is_no_target_either(tmp_path, starting_encoder):
    place = Place(tmp_path, starting_encoder)
    place.write({"prompt": "/ sum\n", "completion": "sum size"})
    corpus = place.read()
    (prompt_ids,) = starting_encoder.encode(["/ sum\n"])
    assert corpus.train.first_targets.tolist() == [1 + len(prompt_ids)]
    assert corpus.report["train"]["prompt_tokens"] == len(prompt_ids)


# Bytes of the targets, for bits per byte


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    """In a byte-level vocabulary each character of a token's name stands for one byte."""
    return len(tokenizer.convert_ids_to_tokens(token))


@pytest.mark.parametrize(
    ("row", "train_on_prompt", "learned", "first"),
    [
        ({"text": " select vol:sum size by sym from trade"}, False, 38, " select"),
        ({"prompt": "", "completion": " select from trade"}, False, 18, " select"),
        ({"prompt": "/ sum\n", "completion": "sum size"}, False, 8, ""),
        ({"prompt": " select\n", "completion": "from trade"}, True, 8 + 10, " select"),
    ],
    ids=["text", "empty prompt", "prompt", "learned prompt"],
)
def test_target_bytes_are_those_of_what_is_learned_but_the_first_token(
    place, tokenizer, row, train_on_prompt, learned, first
):
    place.write(row)
    store = place.read(train_on_prompt=train_on_prompt).train
    assert first in ("", tokenizer.decode(tokens_of(store)[0]))
    assert store.target_bytes.tolist() == [learned - len(first)]


@pytest.mark.parametrize("text", ["\u00e9:1", "\ufeffa:1\n", "\u20ac", "\U0001f40d:1"])
def test_target_bytes_are_right_when_the_first_token_is_part_of_a_character(place, tokenizer, text):
    place.write(*texts(text))
    store = place.read().train
    first = spelled_bytes(tokenizer, tokens_of(store)[0])
    assert store.target_bytes.tolist() == [len(text.encode()) - first]


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_target_bytes_and_those_of_the_first_token_are_the_bytes_of_any_text(
    tmp_path, tokenizer, text
):
    encoder = build_encoder(tokenizer)
    shutil.rmtree(tmp_path, ignore_errors=True)
    source = Source(lambda: iter([Document(f"{text}.", "", "x")]), "any text")
    store = load_corpus(source, None, encoder, tmp_path).train
    first = spelled_bytes(tokenizer, tokens_of(store)[0])
    assert store.target_bytes.tolist() == [len(f"{text}.".encode()) - first]


def test_after_a_start_token_target_bytes_are_all_of_the_text(tmp_path, starting_encoder):
    place = Place(tmp_path, starting_encoder)
    place.write(*texts("caf\u00e9:1", "\u00e9:1"))
    assert place.read().train.target_bytes.tolist() == [7, 4]


# On disk


@pytest.mark.parametrize(
    ("vocabulary_size", "end_id", "text", "kind"),
    [
        (65_536, 65_535, "a\ufffd", np.uint16),
        (65_537, 65_536, "a\uffff", np.uint32),
        (0x110_001, 0x110_000, "a\U0001f40d\U0010ffff", np.uint32),
    ],
)
def test_a_store_holds_the_largest_id_of_its_vocabulary(
    tmp_path, vocabulary_size, end_id, text, kind
):
    place = Place(tmp_path, character_encoder(vocabulary_size, end_id))
    place.write(*texts(text))
    for corpus in (place.read(), place.read()):
        assert corpus.train.tokens.dtype == kind
        assert tokens_of(corpus.train) == [*encode_characters([text])[0], end_id]


def test_the_token_file_has_two_or_four_bytes_for_each_token(tmp_path):
    sizes = []
    for folder, vocabulary_size in (("small", 60_000), ("large", 160_000)):
        place = Place(tmp_path / folder, character_encoder(vocabulary_size, 59_999))
        place.write(*texts("a:til 10"))
        place.read()
        (file,) = place.cache.rglob("train/tokens.bin")
        sizes.append(file.stat().st_size)
    assert sizes == [9 * 2, 9 * 4]


def test_the_arrays_are_mapped_not_read(place):
    place.write(*texts("a:1"))
    store = place.read().train
    for values in (store.tokens, store.offsets, store.first_targets, store.target_bytes):
        assert isinstance(values, np.memmap)


def test_positions_are_the_tokens_of_each_document_but_the_last(tmp_path):
    place = Place(tmp_path, character_encoder(200, 199))
    place.write(*texts("a", "a:til 10"))
    store = place.read().train
    assert store.offsets.tolist() == [0, 2, 11]
    assert store.positions.tolist() == [1, 8]
    assert store.target_tokens == 9
