"""The first lines of a run: the ledger, and how a step is divided on other processes."""

import json
from pathlib import Path

import pytest
from workspace import load_corpus, reset_accelerate

from qloop.config.keys import DataConfig, ModelConfig
from qloop.data.corpus import Corpus
from qloop.data.encoder import build_encoder
from qloop.data.packing import pack_best_fit, pack_wrapped
from qloop.data.sources import find_sources
from qloop.model.pretrained import load_tokenizer
from qloop.opening import describe_ledger
from qloop.report.files import describe_corpus
from qloop.train import train


def read_corpus(folder: Path, tokenizer_dir: Path, data: DataConfig) -> Corpus:
    encoder = build_encoder(load_tokenizer(ModelConfig(tokenizer_name=str(tokenizer_dir))))
    sources = find_sources(data)
    return load_corpus(*sources, encoder, folder, held_out_share=data.held_out_share)


@pytest.fixture
def corpus(tmp_path, corpus_dir, tokenizer_dir) -> Corpus:
    """Twelve Q files, of which some are held out."""
    return read_corpus(
        tmp_path, tokenizer_dir, DataConfig(train_file=corpus_dir, held_out_share=0.3)
    )


@pytest.fixture(params=[pack_best_fit, pack_wrapped])
def report(request, corpus) -> dict:
    index = request.param(corpus.train.positions, 64)
    return describe_corpus(corpus, index, pack_best_fit(corpus.held_out.positions, 64))


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_blocks_hold_every_position_and_padding(report, side):
    ledger = report[side]
    positions = ledger["tokens"] - ledger["documents"]
    assert ledger["block_length"] == 64
    assert ledger["blocks"] * 64 == positions + ledger["padding"]


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_the_padding_share_is_that_of_all_positions(report, side):
    ledger = report[side]
    assert 0 < ledger["padding_share"] < 1
    assert ledger["padding_share"] == ledger["padding"] / (ledger["blocks"] * 64)


def test_two_documents_of_known_length(tmp_path, tokenizer_dir):
    """One token for each digit: 10 and 3 positions, in blocks of 8."""
    (tmp_path / "train.jsonl").write_text('{"text": "0123456789"}\n{"text": "012"}\n')
    data = DataConfig(train_file=tmp_path / "train.jsonl", held_out_share=0.0)
    corpus = read_corpus(tmp_path, tokenizer_dir, data)
    report = describe_corpus(corpus, pack_best_fit(corpus.train.positions, 8), None)
    added = ("blocks", "block_length", "padding", "padding_share")
    assert {name: report["train"][name] for name in added} == {
        "blocks": 2,
        "block_length": 8,
        "padding": 3,
        "padding_share": 3 / 16,
    }


def test_what_was_counted_before_packing_stays(corpus, report):
    for side in ("train", "held_out"):
        assert corpus.report[side].items() <= report[side].items()


def test_the_corpus_keeps_its_own_report(corpus, report):
    assert "blocks" not in corpus.report["train"]


def test_the_report_names_the_corpus_and_its_refusals(corpus, report):
    assert report["fingerprint"] == corpus.fingerprint
    assert report["refusals"] == []


def test_the_report_can_be_written_as_json(report):
    assert json.loads(json.dumps(report)) == report


def test_without_held_out_documents_there_is_no_such_side(tmp_path, corpus_dir, tokenizer_dir):
    data = DataConfig(train_file=corpus_dir, held_out_share=0.0)
    corpus = read_corpus(tmp_path, tokenizer_dir, data)
    report = describe_corpus(corpus, pack_best_fit(corpus.train.positions, 64), None)
    assert report["held_out"] is None
    assert [line[:10] for line in describe_ledger(report, was_cached=False)] == [
        "train     ",
        "          ",
    ]


# The opening lines

TRAIN = {
    "read": 1240,
    "documents": 1234,
    "bytes": 1_234_567,
    "tokens": 400_000,
    "targets": 398_766,
    "refused": 0,
    "duplicates": 0,
    "also_held_out": 0,
    "blocks": 196,
    "padding_share": 0.00657,
}
HELD_OUT = {**TRAIN, "documents": 7, "bytes": 900, "tokens": 300, "targets": 293, "blocks": 1}


def describe(was_cached: bool = False, held_out: dict | None = None, **train) -> list[str]:
    report = {
        "fingerprint": "0123456789abcdef0123456789abcdef",
        "train": {**TRAIN, **train},
        "held_out": held_out,
    }
    return describe_ledger(report, was_cached)


def test_the_lines_of_a_corpus_that_was_used_whole():
    assert describe() == [
        "train      1,234 documents, 1,234,567 bytes, 400,000 tokens, 398,766 targets, 196 blocks, "
        "0.66% padding",
        "           tokenised now; fingerprint 0123456789ab",
    ]


def test_the_held_out_side_has_a_line_of_its_own():
    assert describe(held_out=HELD_OUT)[1] == (
        "held out   7 documents, 900 bytes, 300 tokens, 293 targets, 1 blocks, 0.66% padding"
    )


def test_what_was_left_out_has_a_line_that_names_only_what_occurred():
    assert describe(refused=1200, also_held_out=3)[1] == (
        "           left out: 1,200 refused, 3 also held out; see data_report.json"
    )


def test_copies_are_named_among_what_was_left_out():
    assert describe(duplicates=2)[1] == "           left out: 2 duplicates; see data_report.json"


def test_a_corpus_from_the_cache_says_so():
    assert describe(was_cached=True)[-1] == (
        "           opened from the cache; fingerprint 0123456789ab"
    )


def test_the_lines_of_a_real_corpus_hold_its_numbers(corpus, report):
    train, held_out, last = describe_ledger(report, corpus.was_cached)
    assert f"{report['train']['documents']} documents" in train
    assert f"{report['train']['targets']:,} targets" in train
    assert f"{report['held_out']['documents']} documents" in held_out
    assert last.endswith(f"tokenised now; fingerprint {corpus.fingerprint[:12]}")


def test_a_step_that_is_divided_otherwise_is_named(make_config, capsys):
    train(make_config(max_steps=3))
    reset_accelerate()
    capsys.readouterr()
    keys = {"gradient_accumulation_steps": 4, "allow_change": "gradient_accumulation_steps"}
    train(make_config(max_steps=6, **keys))
    assert (
        "step       reads 4 blocks, as from the start of this run: gradient_accumulation_steps is "
        "2 on every process, not 4"
    ) in capsys.readouterr().out
