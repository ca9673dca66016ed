"""The token store: what becomes of every document and of every one of its tokens."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from workspace import load_corpus

from qloop.config.keys import DataConfig, ModelConfig
from qloop.data.corpus import Corpus, is_held_out, open_corpus
from qloop.data.documents import Document, Refusal, Source
from qloop.data.encoder import Encoder, build_encoder
from qloop.data.sources import find_sources
from qloop.data.tokens import TokenStore
from qloop.errors import DataError
from qloop.model.pretrained import load_tokenizer

END = "<|endoftext|>"


def load(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(tokenizer_name=str(folder)))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> PreTrainedTokenizerBase:
    return load(tokenizer_dir)


@pytest.fixture(scope="session")
def encoder(tokenizer) -> Encoder:
    return build_encoder(tokenizer)


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


def save_framing_tokenizer(tokenizer_dir: Path, folder: Path, template: str) -> None:
    """The same tokenizer with a start token, which it puts where the template says."""
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", END)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=END
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def starting_encoder(tokenizer_dir, tmp_path_factory) -> Encoder:
    """Of a tokenizer that puts a start token before every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("starting")
    save_framing_tokenizer(tokenizer_dir, folder, "<s> $A")
    return build_encoder(load(folder))


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


def write_jsonl(file: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


class Place:
    """A folder with a corpus and a cache; reads the one into the other."""

    def __init__(self, folder: Path, encoder: Encoder):
        self.folder, self.encoder, self.cache = folder, encoder, folder / "cache"

    def write(self, *rows, held_out: list | None = None) -> None:
        write_jsonl(self.folder / "data" / "filtered_train.jsonl", list(rows))
        if held_out is not None:
            write_jsonl(self.folder / "data" / "filtered_test.jsonl", held_out)

    def read(self, encoder: Encoder | None = None, **keys) -> Corpus:
        data = DataConfig(**{"data_dir": self.folder / "data", "held_out_share": 0.0, **keys})
        return load_corpus(
            *find_sources(data),
            encoder or self.encoder,
            self.cache,
            data.held_out_share,
            data.train_on_prompt,
            data.deduplicate,
        )

    def places(self, corpus: Corpus, side: str = "train") -> list[dict[str, str]]:
        file = self.cache / "tokens" / corpus.fingerprint / side / "places.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def files(self) -> list[Path]:
        return sorted(path for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path, encoder) -> Place:
    return Place(tmp_path, encoder)


def texts(*contents: str) -> list[dict[str, str]]:
    return [{"text": content} for content in contents]


def tokens_of(store: TokenStore, document: int = 0) -> list[int]:
    return store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()


# The ledger

MIXED = [
    *texts("a:til 10\n", "b:sum a\n", "a:til 10\n", "held:1b\n", "c:avg a\n", "a:til 10\n"),
    {"prompt": "/ the sum of sizes\n", "completion": "sum size"},
    {"prompt": "", "completion": "select from trade"},
    {"text": None},
    {"text": ""},
    {"text": "a\0b"},
    {"body": "x"},
    [1],
    b"",
    b'{"text": "sel',
    b'{"text": "\xff"}',
]
MIXED_HELD_OUT = [*texts("held:1b\n", "held:2b\n", "held:1b\n"), {"text": 5}]


@pytest.fixture(params=[False, True], ids=["prompts not learned", "prompts learned"])
def mixed(request, place) -> Corpus:
    place.write(*MIXED, held_out=MIXED_HELD_OUT)
    return place.read(train_on_prompt=request.param)


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_whatever_is_read_is_used_or_refused_or_a_copy(mixed, side):
    ledger = mixed.report[side]
    left_out = ledger["refused"] + ledger["duplicates"] + ledger["also_held_out"]
    assert ledger["documents"] + left_out == ledger["read"]


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_every_token_is_a_target_or_the_first_or_of_a_prompt(mixed, side):
    ledger = mixed.report[side]
    assert ledger["targets"] + ledger["first_tokens"] + ledger["prompt_tokens"] == ledger["tokens"]


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_the_ledger_agrees_with_the_store(mixed, side):
    store, ledger = getattr(mixed, side), mixed.report[side]
    assert ledger["documents"] == ledger["first_tokens"] == len(store)
    assert ledger["tokens"] == len(store.tokens) == store.offsets[-1]
    assert ledger["targets"] == store.target_tokens
    assert ledger["tokens"] - ledger["documents"] == store.positions.sum()


def test_the_ledger_counts_each_thing_once(mixed):
    assert {name: mixed.report["train"][name] for name in ("read", "documents", "refused")} == {
        "read": 16,
        "documents": 5,
        "refused": 8,
    }
    assert (mixed.report["train"]["duplicates"], mixed.report["train"]["also_held_out"]) == (2, 1)
    assert {name: mixed.report["held_out"][name] for name in ("read", "documents")} == {
        "read": 4,
        "documents": 2,
    }
    assert (mixed.report["held_out"]["duplicates"], mixed.report["held_out"]["refused"]) == (1, 1)


def test_the_ledger_counts_refusals_by_reason(mixed):
    assert mixed.report["train"]["refused_by_reason"] == {
        "wrong_type": 1,
        "empty": 2,
        "nul": 1,
        "missing_field": 1,
        "not_an_object": 1,
        "malformed_json": 1,
        "not_utf8": 1,
    }
    assert mixed.report["held_out"]["refused_by_reason"] == {"wrong_type": 1}


def test_every_refusal_is_reported_with_its_side_place_reason_and_detail(mixed, tmp_path):
    refusals = mixed.report["refusals"]
    assert len(refusals) == 9
    assert refusals[:2] == [
        {
            "side": "held_out",
            "place": f"{tmp_path / 'data' / 'filtered_test.jsonl'}:4",
            "reason": "wrong_type",
            "detail": '"text" is int, not text',
        },
        {
            "side": "train",
            "place": f"{tmp_path / 'data' / 'filtered_train.jsonl'}:9",
            "reason": "wrong_type",
            "detail": '"text" is null, not text',
        },
    ]


def test_the_ledger_counts_the_bytes_of_what_is_used(place):
    place.write(*texts("a:1", "a:1"), {"prompt": "caf\u00e9", "completion": "b"}, {"text": None})
    assert place.read().report["train"]["bytes"] == 3 + 5 + 1


# Tokens


def test_each_document_ends_with_the_end_token_which_is_a_target(mixed, encoder):
    for store in (mixed.train, mixed.held_out):
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


@pytest.mark.parametrize("prompt", ["/ the sum of sizes\n", "x"])
def test_the_tokens_of_a_prompt_are_no_targets(place, encoder, prompt):
    place.write({"prompt": prompt, "completion": "sum size"})
    corpus = place.read()
    ((prompt_ids, completion_ids),) = [encoder.encode([prompt, "sum size"])]
    assert corpus.train.first_targets.tolist() == [len(prompt_ids)]
    assert corpus.report["train"]["prompt_tokens"] == len(prompt_ids) - 1
    assert corpus.report["train"]["targets"] == len(completion_ids) + 1


def test_the_tokens_of_a_prompt_are_targets_if_asked_for(place, encoder):
    place.write({"prompt": "/ the sum of sizes\n", "completion": "sum size"})
    corpus = place.read(train_on_prompt=True)
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


def test_an_empty_prompt_is_like_none(place):
    place.write({"prompt": "", "completion": "sum size"})
    corpus = place.read()
    assert corpus.train.first_targets.tolist() == [1]
    assert corpus.report["train"]["prompt_tokens"] == 0


# Bytes of the targets, for bits per byte


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    """In a byte-level vocabulary each character of a token's name stands for one byte."""
    return len(tokenizer.convert_ids_to_tokens(token))


def test_target_bytes_are_those_of_the_text_but_the_first_token(place, tokenizer):
    place.write(*texts(" select vol:sum size by sym from trade"))
    store = place.read().train
    assert tokenizer.decode(tokens_of(store)[0]) == " select"
    assert store.target_bytes.tolist() == [38 - 7]


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
    store = load_corpus(source, None, encoder, tmp_path, 0.0, False, True).train
    first = spelled_bytes(tokenizer, tokens_of(store)[0])
    assert store.target_bytes.tolist() == [len(f"{text}.".encode()) - first]


def test_target_bytes_of_a_completion_are_all_of_its_bytes(place):
    place.write({"prompt": "/ sum\n", "completion": "sum size"})
    assert place.read().train.target_bytes.tolist() == [8]


def test_target_bytes_of_a_learned_prompt_are_its_own_too_but_the_first_tokens(place, tokenizer):
    place.write({"prompt": " select\n", "completion": "from trade"})
    store = place.read(train_on_prompt=True).train
    assert tokenizer.decode(tokens_of(store)[0]) == " select"
    assert store.target_bytes.tolist() == [8 + 10 - 7]


def test_target_bytes_of_a_completion_without_prompt_lack_its_first_token(place, tokenizer):
    place.write({"prompt": "", "completion": " select from trade"})
    store = place.read().train
    assert tokenizer.decode(tokens_of(store)[0]) == " select"
    assert store.target_bytes.tolist() == [18 - 7]


def test_after_a_start_token_target_bytes_are_all_of_the_text(tmp_path, starting_encoder):
    place = Place(tmp_path, starting_encoder)
    place.write(*texts("caf\u00e9:1", "\u00e9:1"))
    assert place.read().train.target_bytes.tolist() == [7, 4]


# Copies


def test_of_equal_documents_the_first_is_kept_and_the_others_are_counted(place, tmp_path):
    place.write(*texts("a:1", "b:2", "a:1", "c:3", "a:1", "b:2"))
    corpus = place.read()
    file = tmp_path / "data" / "filtered_train.jsonl"
    kept = [f"{file}:1", f"{file}:2", f"{file}:4"]
    assert [entry["place"] for entry in place.places(corpus)] == kept
    assert corpus.report["train"]["duplicates"] == 3


def test_copies_are_kept_if_asked_for(place, tokenizer):
    place.write(*texts("a:1", "b:2", "a:1"))
    corpus = place.read(deduplicate=False)
    read = [tokenizer.decode(tokens_of(corpus.train, number)[:-1]) for number in range(3)]
    assert read == ["a:1", "b:2", "a:1"]
    assert corpus.report["train"]["duplicates"] == 0


def test_documents_that_differ_in_white_space_or_prompt_are_no_copies(place):
    place.write(
        *texts("a:1", "a:1\n", " a:1", "a:1\r\n"),
        {"prompt": "/ one", "completion": "a:1"},
        {"prompt": "/ two", "completion": "a:1"},
    )
    assert place.read().report["train"]["documents"] == 6


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_training_text_that_is_also_held_out_is_left_out_and_counted(
    place, tokenizer, deduplicate
):
    place.write(*texts("a:1", "held:1", "b:2", "held:1"), held_out=texts("held:1"))
    corpus = place.read(deduplicate=deduplicate)
    read = [tokenizer.decode(tokens_of(corpus.train, number)[:-1]) for number in range(2)]
    assert read == ["a:1", "b:2"]
    assert (len(corpus.train), len(corpus.held_out)) == (2, 1)
    assert corpus.report["train"]["also_held_out"] == 2


def test_each_document_is_named_by_its_place_and_the_hash_of_its_content(place, tmp_path):
    place.write(*texts("a:1"))
    (entry,) = place.places(place.read())
    assert entry == {
        "place": f"{tmp_path / 'data' / 'filtered_train.jsonl'}:1",
        "sha256": hashlib.sha256(b"\0a:1").hexdigest(),
    }


# Held out by content

SYNTHETIC = [Document(f"f{number}:{{x+{number}}}", "", "a.q") for number in range(2000)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_the_held_out_share_is_close_to_the_nominal(share):
    held_out = sum(is_held_out(document.content_hash, share) for document in SYNTHETIC)
    spread = (2000 * share * (1 - share)) ** 0.5
    assert abs(held_out - 2000 * share) < 4 * spread


def test_a_share_of_zero_holds_out_nothing():
    assert not any(is_held_out(document.content_hash, 0.0) for document in SYNTHETIC)
    assert not is_held_out(bytes(32), 0.0)


def test_the_first_eight_bytes_of_the_hash_are_compared_with_the_share():
    assert is_held_out(bytes.fromhex("3fffffffffffff00" + "ff" * 24), 0.25)
    assert not is_held_out(bytes.fromhex("4000000000000000" + "00" * 24), 0.25)


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    small, large = (
        {doc.text for doc in SYNTHETIC if is_held_out(doc.content_hash, share)}
        for share in (0.05, 0.1)
    )
    assert small < large


def held_out_hashes(place: Place, rows: list, share: float = 0.3) -> set[str]:
    place.write(*rows)
    corpus = place.read(held_out_share=share)
    return {entry["sha256"] for entry in place.places(corpus, "held_out")}


def test_adding_documents_moves_none_to_the_other_side(place):
    some = texts(*(f"f:{number}" for number in range(60)))
    more = texts(*(f"g:{number}" for number in range(60)))
    before = held_out_hashes(place, some)
    after = held_out_hashes(place, [*more, *some])
    some_hashes = {hashlib.sha256(b"\0" + row["text"].encode()).hexdigest() for row in some}
    assert 0 < len(before) < 60
    assert after & some_hashes == before


def test_reordering_documents_moves_none_to_the_other_side(place):
    rows = texts(*(f"f:{number}" for number in range(60)))
    assert held_out_hashes(place, rows) == held_out_hashes(place, rows[::-1])


def test_no_document_is_on_both_sides_and_none_is_lost(place):
    place.write(*texts(*(f"f:{number}" for number in range(60))))
    corpus = place.read(held_out_share=0.3)
    train, held_out = (
        {entry["sha256"] for entry in place.places(corpus, side)} for side in ("train", "held_out")
    )
    assert not train & held_out
    assert len(train) + len(held_out) == 60


def test_copies_are_on_the_same_side(place):
    place.write(*texts(*(f"f:{number // 2}" for number in range(120))))
    corpus = place.read(held_out_share=0.3)
    sides = (corpus.report["train"], corpus.report["held_out"])
    assert [side["documents"] == side["duplicates"] for side in sides] == [True, True]


def test_nothing_is_held_out_if_not_asked_for(place):
    place.write(*texts("a:1"))
    corpus = place.read(held_out_share=0.0)
    assert corpus.held_out is None
    assert corpus.report["held_out"] is None


# The cache

ROWS = texts(*(f"f:{number}" for number in range(40)))


def test_an_unchanged_corpus_is_opened_from_the_cache(place):
    place.write(*ROWS)
    first, second = place.read(held_out_share=0.3), place.read(held_out_share=0.3)
    assert (first.was_cached, second.was_cached) == (False, True)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    for one, two in ((first.train, second.train), (first.held_out, second.held_out)):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert one.offsets.tolist() == two.offsets.tolist()
        assert one.first_targets.tolist() == two.first_targets.tolist()
        assert one.target_bytes.tolist() == two.target_bytes.tolist()


def test_opening_from_the_cache_writes_nothing(place):
    place.write(*ROWS)
    place.read(held_out_share=0.3)
    before = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in place.files()]
    place.read(held_out_share=0.3)
    after = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in place.files()]
    assert len(before) == 11
    assert after == before


def test_an_edited_file_is_tokenised_anew(place):
    place.write(*ROWS)
    before = place.read()
    place.write(*ROWS[:-1], {"text": "f:edited"})
    after = place.read()
    assert not after.was_cached
    assert after.fingerprint != before.fingerprint


def test_an_edit_taken_back_is_found_in_the_cache(place):
    place.write(*ROWS)
    before = place.read()
    place.write(*ROWS[:-1])
    place.read()
    place.write(*ROWS)
    after = place.read()
    assert after.was_cached
    assert after.fingerprint == before.fingerprint


def test_a_corpus_that_lies_elsewhere_is_the_same(place, tmp_path):
    place.write(*ROWS)
    before = place.read()
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    after = place.read(data_dir=tmp_path / "elsewhere")
    assert after.was_cached
    assert after.fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "keys",
    [
        {"held_out_share": 0.4},
        {"train_on_prompt": True},
        {"deduplicate": False},
        {"text_field": "prompt"},
        {"eval_file": "held_out.jsonl"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_another_setting_is_another_corpus(place, tmp_path, keys):
    place.write(*({**row, "prompt": f"/ {row['text']}", "completion": "x"} for row in ROWS))
    write_jsonl(tmp_path / "held_out.jsonl", texts("held:1"))
    if "eval_file" in keys:
        keys = {"eval_file": tmp_path / "held_out.jsonl"}
    before = place.read(held_out_share=0.3)
    after = place.read(**{"held_out_share": 0.3, **keys})
    assert not after.was_cached
    assert after.fingerprint != before.fingerprint


def test_an_edited_held_out_file_is_another_corpus(place):
    place.write(*ROWS, held_out=texts("held:1"))
    before = place.read()
    place.write(*ROWS, held_out=texts("held:2"))
    assert place.read().fingerprint != before.fingerprint


def test_the_share_says_nothing_beside_a_held_out_file(place):
    place.write(*ROWS, held_out=texts("held:1"))
    before = place.read(held_out_share=0.3)
    assert place.read(held_out_share=0.4).fingerprint == before.fingerprint


def test_another_tokenizer_is_another_corpus(place, starting_encoder):
    place.write(*ROWS)
    before = place.read()
    after = place.read(starting_encoder)
    assert not after.was_cached
    assert after.fingerprint != before.fingerprint


def test_a_tokenizer_loaded_again_has_the_same_fingerprint(tokenizer_dir, encoder):
    again = load(tokenizer_dir)
    again("a text", split_special_tokens=False, truncation=True, max_length=1)
    assert build_encoder(again).fingerprint == encoder.fingerprint


def test_corpora_lie_beside_each_other_in_the_cache(place):
    place.write(*ROWS)
    one, two = place.read(), place.read(deduplicate=False)
    folders = sorted(folder.name for folder in (place.cache / "tokens").iterdir())
    assert folders == sorted([one.fingerprint, two.fingerprint])


def test_a_corpus_that_another_process_built_in_the_meantime_is_opened(tmp_path, encoder):
    """The other one reads the same documents while this one is in the midst of them."""
    documents = SYNTHETIC[:3]
    other = Source(lambda: iter(documents), "the same")

    def read_slowly():
        yield documents[0]
        load_corpus(other, None, encoder, tmp_path, 0.0, False, True)
        yield from documents[1:]

    corpus = load_corpus(Source(read_slowly, "the same"), None, encoder, tmp_path, 0.0, False, True)
    assert len(corpus.train) == 3
    assert [folder.name for folder in (tmp_path / "tokens").iterdir()] == [corpus.fingerprint]


# Nothing usable


def test_a_corpus_without_a_usable_document_says_how_many_and_why(place, tmp_path):
    file = tmp_path / "data" / "filtered_train.jsonl"
    place.write({"text": None}, {"text": ""}, b'{"text": "sel')
    with pytest.raises(DataError) as error:
        place.read()
    assert str(error.value).splitlines() == [
        "the corpus has no usable train document",
        "  train: read 3, documents 0, refused 3, duplicates 0, also held out 0",
        f'  {file}:1: wrong_type: "text" is null, not text',
        f"  {file}:2: empty: nothing but white space",
        f"  {file}:3: malformed_json: Unterminated string starting at: line 1 column 10 (char 9)",
        "  give more documents, or change held_out_share or the eval file",
    ]


def test_an_empty_corpus_is_an_error(place):
    place.write()
    with pytest.raises(DataError, match="the corpus has no usable train document"):
        place.read()


def test_of_many_refusals_the_first_five_are_named(place, tmp_path):
    file = tmp_path / "data" / "filtered_train.jsonl"
    place.write(*[{"text": None}] * 9)
    with pytest.raises(DataError) as error:
        place.read()
    assert "train: read 9, documents 0, refused 9" in str(error.value)
    assert f"{file}:5: wrong_type" in str(error.value)
    assert f"{file}:6" not in str(error.value)


def test_a_corpus_of_nothing_but_held_out_texts_says_so(place):
    place.write(*texts("a:1", "b:2"), held_out=texts("a:1", "b:2", "c:3"))
    with pytest.raises(DataError) as error:
        place.read()
    assert str(error.value).splitlines()[:3] == [
        "the corpus has no usable train document",
        "  train: read 2, documents 0, refused 0, duplicates 0, also held out 2",
        "  held_out: read 3, documents 3, refused 0, duplicates 0, also held out 0",
    ]


def test_a_share_that_holds_out_everything_is_an_error(place):
    place.write(*texts("a:1", "b:2"))
    with pytest.raises(DataError, match="the corpus has no usable train document"):
        place.read(held_out_share=0.9999999)


def test_a_share_that_holds_out_nothing_is_an_error(place):
    place.write(*texts("a:1", "b:2"))
    with pytest.raises(DataError) as error:
        place.read(held_out_share=0.0000001)
    assert str(error.value).splitlines() == [
        "the corpus has no usable held-out document",
        "  train: read 2, documents 2, refused 0, duplicates 0, also held out 0",
        "  give more documents, or change held_out_share or the eval file",
    ]


def test_a_held_out_file_without_a_usable_document_is_an_error(place, tmp_path):
    place.write(*texts("a:1"), held_out=[{"text": 5}])
    with pytest.raises(DataError) as error:
        place.read()
    assert str(error.value).splitlines() == [
        "the corpus has no usable held-out document",
        "  train: read 1, documents 1, refused 0, duplicates 0, also held out 0",
        "  held_out: read 1, documents 0, refused 1, duplicates 0, also held out 0",
        f'  {tmp_path / "data" / "filtered_test.jsonl"}:1: wrong_type: "text" is int, not text',
        "  give more documents, or change held_out_share or the eval file",
    ]


def test_a_build_that_fails_leaves_nothing_in_the_cache(place):
    place.write({"text": None})
    with pytest.raises(DataError):
        place.read()
    assert list((place.cache / "tokens").iterdir()) == []


def test_a_build_that_breaks_off_leaves_nothing_in_the_cache(tmp_path, encoder):
    def break_off():
        yield Document("a:1", "", "a.q")
        yield Refusal("b.q", "empty", "nothing but white space")
        raise DataError("c.parquet: not readable as Parquet")

    with pytest.raises(DataError, match=r"c\.parquet"):
        load_corpus(Source(break_off, "x"), None, encoder, tmp_path, 0.0, False, True)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_corpus_that_is_mended_can_be_read(place):
    place.write({"text": None})
    with pytest.raises(DataError):
        place.read()
    place.write({"text": "a:1"})
    assert len(place.read().train) == 1


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


def test_the_tokens_are_mapped_not_read(place):
    place.write(*ROWS)
    assert isinstance(place.read().train.tokens, np.memmap)


def test_positions_are_the_tokens_of_each_document_but_the_last(tmp_path):
    place = Place(tmp_path, character_encoder(200, 199))
    place.write(*texts("a", "a:til 10"))
    store = place.read().train
    assert store.offsets.tolist() == [0, 2, 11]
    assert store.positions.tolist() == [1, 8]
    assert store.target_tokens == 9


# What a killed process leaves


SLOW_BUILD = """
import sys, time
from pathlib import Path
from qloop.data.documents import Document
from qloop.data.tokens import Encoder, Source, build_corpus

def read():
    yield Document("a:1", "", "a.q")
    print("reading", flush=True)
    time.sleep(600)

encoder = Encoder(None, None, [], 0, 9, "slow")
build_corpus(Source(read, "slow"), None, encoder, Path(sys.argv[1]), 0.0, False, True)
"""


def test_what_a_process_is_building_is_left_alone_until_it_is_killed(place):
    place.write(*ROWS)
    tokens = place.cache / "tokens"
    command = [sys.executable, "-c", SLOW_BUILD, str(place.cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"reading\n"
            one = place.read()
            (building,) = tokens.glob(".building-*")
            assert (building / "train/tokens.bin").exists()
        finally:
            other.kill()
    two = place.read(deduplicate=False)
    names = sorted(folder.name for folder in tokens.iterdir())
    assert names == sorted([one.fingerprint, two.fingerprint])


def test_a_corpus_that_this_machine_does_not_see_is_an_error(tmp_path, encoder):
    with pytest.raises(DataError) as error:
        open_corpus(tmp_path / "abc", encoder, True)
    assert str(error.value) == (
        f"{tmp_path / 'abc'}: the tokenised corpus is not to be seen from {socket.gethostname()}; "
        "--cache_dir must be a folder that all machines of the run share"
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("report.json", 20),
        ("train/tokens.bin", 0),
        ("train/tokens.bin", 7),
        ("train/tokens.bin", 8),
        ("train/offsets.npy", 0),
        ("train/offsets.npy", 200),
        ("train/target_bytes.npy", 60),
    ],
)
def test_a_corpus_that_was_cut_short_is_an_error_and_says_what_to_do(place, name, size):
    place.write(*ROWS)
    folder = place.cache / "tokens" / place.read().fingerprint
    os.truncate(folder / name, size)
    with pytest.raises(DataError) as error:
        place.read()
    assert str(error.value).startswith(f"{folder}: the tokenised corpus is damaged: ")
    assert str(error.value).endswith("; delete this folder, and the same command tokenises it anew")


def test_arrays_of_a_store_are_mapped_and_not_read(tmp_path, corpus_dir, encoder):
    sources = find_sources(DataConfig(train_file=corpus_dir))
    corpus = load_corpus(*sources, encoder, tmp_path, 0.2, False, True)
    for values in (corpus.train.offsets, corpus.train.first_targets, corpus.train.target_bytes):
        assert isinstance(values, np.memmap)
