"""The corpus: its ledger, copies, the held-out split, and the cache."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys

import pytest
from corpora import Place, texts, tokens_of, write_jsonl
from workspace import load_corpus

from qloop.data.corpus import Corpus, is_held_out, open_corpus
from qloop.data.documents import Document, Refusal, Source
from qloop.errors import DataError

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
        load_corpus(other, None, encoder, tmp_path)
        yield from documents[1:]

    corpus = load_corpus(Source(read_slowly, "the same"), None, encoder, tmp_path)
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


@pytest.mark.parametrize(
    ("rows", "share"),
    [([], 0.0), (texts("a:1", "b:2"), 0.9999999)],
    ids=["no rows", "all held out"],
)
def test_a_corpus_without_training_documents_is_an_error(place, rows, share):
    place.write(*rows)
    with pytest.raises(DataError, match="the corpus has no usable train document"):
        place.read(held_out_share=share)


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


def test_a_build_that_fails_leaves_nothing_and_a_mended_corpus_is_read(place):
    place.write({"text": None})
    with pytest.raises(DataError):
        place.read()
    assert list((place.cache / "tokens").iterdir()) == []
    place.write({"text": "a:1"})
    assert len(place.read().train) == 1


def test_a_build_that_breaks_off_leaves_nothing_in_the_cache(tmp_path, encoder):
    def break_off():
        yield Document("a:1", "", "a.q")
        yield Refusal("b.q", "empty", "nothing but white space")
        raise DataError("c.parquet: not readable as Parquet")

    with pytest.raises(DataError, match=r"c\.parquet"):
        load_corpus(Source(break_off, "x"), None, encoder, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


# Damage


SLOW_BUILD = """
import sys, time
from pathlib import Path
from qloop.data.documents import Document, Source
from qloop.data.corpus import build_corpus
from qloop.data.encoder import Encoder

def read():
    yield Document("a:1", "", "a.q")
    print("reading", flush=True)
    time.sleep(600)

encoder = Encoder(None, None, [], 0, 9, "slow")
build_corpus(
    Source(read, "slow"), None, encoder, Path(sys.argv[1]),
    held_out_share=0.0, train_on_prompt=False, deduplicate=True,
)
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
        f"{tmp_path / 'abc'}: the tokenised corpus does not exist on {socket.gethostname()}; "
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
