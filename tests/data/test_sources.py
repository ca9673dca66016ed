"""Sources: the corpus that the config names is the corpus that is read."""

import json
import os
from pathlib import Path

import datasets
import pytest

from qloop.config.keys import DataConfig
from qloop.data.documents import Document, Refusal, Source
from qloop.data.sources import find_sources
from qloop.errors import DataError


def write_jsonl(file: Path, *contents: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": content}) + "\n" for content in contents))
    return file


def texts_of(source: Source | None) -> list[str]:
    assert source is not None
    return [item.text for item in source.documents()]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "data"
    for name in ("raw", "filtered", "described_filtered", "trades-2024.v2"):
        write_jsonl(folder / f"{name}_train.jsonl", f"{name} train")
        write_jsonl(folder / f"{name}_test.jsonl", f"{name} test")
    return folder


# A data folder


@pytest.mark.parametrize("data_type", ["raw", "filtered", "described_filtered", "trades-2024.v2"])
def test_the_data_type_names_the_files(data_dir, data_type):
    train, held_out = find_sources(DataConfig(data_dir=data_dir, data_type=data_type))
    assert texts_of(train) == [f"{data_type} train"]
    assert texts_of(held_out) == [f"{data_type} test"]


def test_the_data_type_is_filtered_if_not_given(data_dir):
    train, _ = find_sources(DataConfig(data_dir=data_dir))
    assert texts_of(train) == ["filtered train"]


def test_a_missing_data_type_lists_those_that_are_there(data_dir):
    with pytest.raises(DataError) as error:
        find_sources(DataConfig(data_dir=data_dir, data_type="cleaned"))
    assert str(error.value) == (
        f"data_type: {data_dir / 'cleaned_train.jsonl'} does not exist; it has "
        "described_filtered, filtered, raw and trades-2024.v2. Put the corpus there, or give "
        "--train_file"
    )


def test_a_missing_data_type_names_the_only_one_that_is_there(tmp_path):
    write_jsonl(tmp_path / "raw_train.jsonl", "a:1")
    with pytest.raises(DataError, match=r"does not exist; it has raw\. Put the corpus there"):
        find_sources(DataConfig(data_dir=tmp_path))


@pytest.mark.parametrize("folder", ["empty", "not_there"])
def test_a_data_folder_without_a_corpus_says_so(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        find_sources(DataConfig(data_dir=tmp_path / folder))
    assert str(error.value) == (
        f"data_type: {tmp_path / folder / 'filtered_train.jsonl'} does not exist; it has no "
        "*_train.jsonl at all. Put the corpus there, or give --train_file"
    )


def test_a_test_file_alone_is_no_corpus(tmp_path):
    write_jsonl(tmp_path / "filtered_test.jsonl", "a:1")
    with pytest.raises(DataError, match=r"it has no \*_train\.jsonl at all"):
        find_sources(DataConfig(data_dir=tmp_path))


def test_without_a_test_file_the_share_decides(tmp_path):
    write_jsonl(tmp_path / "filtered_train.jsonl", "a:1")
    train, held_out = find_sources(DataConfig(data_dir=tmp_path))
    assert texts_of(train) == ["a:1"]
    assert held_out is None


def test_the_test_file_of_another_type_is_not_taken(tmp_path):
    write_jsonl(tmp_path / "filtered_train.jsonl", "a:1")
    write_jsonl(tmp_path / "raw_test.jsonl", "b:1")
    _, held_out = find_sources(DataConfig(data_dir=tmp_path))
    assert held_out is None


# A file


def test_a_train_file_stands_for_the_data_folder(data_dir, tmp_path):
    file = write_jsonl(tmp_path / "own.jsonl", "own")
    train, held_out = find_sources(DataConfig(data_dir=data_dir, train_file=file))
    assert texts_of(train) == ["own"]
    assert held_out is None


def test_a_train_file_may_be_a_folder_of_q_files(corpus_dir):
    train, _ = find_sources(DataConfig(train_file=corpus_dir))
    assert len(texts_of(train)) == 12


def test_documents_can_be_asked_for_more_than_once(corpus_dir):
    train, _ = find_sources(DataConfig(train_file=corpus_dir))
    assert texts_of(train) == texts_of(train)


def test_the_text_field_holds_for_the_train_and_the_eval_file(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"content": name, "text": "x"}))
    train, held_out = find_sources(
        DataConfig(
            train_file=tmp_path / "train.jsonl",
            eval_file=tmp_path / "eval.jsonl",
            text_field="content",
        )
    )
    assert (texts_of(train), texts_of(held_out)) == (["train"], ["eval"])


def test_a_missing_train_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file or folder"):
        find_sources(DataConfig(train_file=tmp_path / "nothing.jsonl"))


def test_a_missing_eval_file_is_named(tmp_path):
    file = write_jsonl(tmp_path / "own.jsonl", "own")
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file or folder"):
        find_sources(DataConfig(train_file=file, eval_file=tmp_path / "nothing.jsonl"))


def test_a_file_has_the_same_fingerprint_until_its_content_changes(tmp_path):
    def fingerprint() -> str:
        return find_sources(DataConfig(train_file=tmp_path / "own.jsonl"))[0].fingerprint

    write_jsonl(tmp_path / "own.jsonl", "a:1")
    before = fingerprint()
    os.utime(tmp_path / "own.jsonl", (1, 1))
    touched = fingerprint()
    write_jsonl(tmp_path / "own.jsonl", "a:2")
    assert touched == before
    assert fingerprint() != before


# A dataset, by the library that knows the hub


@pytest.fixture
def dataset_dir(tmp_path, monkeypatch) -> Path:
    """A dataset as it lies on the hub, here in a folder; its cache goes beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    folder = tmp_path / "owner" / "q_code"
    write_jsonl(folder / "train.jsonl", "a:1", "b:2")
    write_jsonl(folder / "test.jsonl", "c:3")
    return folder


def test_a_dataset_gives_its_train_and_its_test_split(dataset_dir):
    train, held_out = find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert texts_of(train) == ["a:1", "b:2"]
    assert texts_of(held_out) == ["c:3"]


def test_the_rows_of_a_dataset_have_its_name_split_and_number_as_place(dataset_dir):
    (dataset_dir / "train.jsonl").write_text('{"text": "a:1"}\n{"text": null}\n')
    train, _ = find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert list(train.documents()) == [
        Document("a:1", "", f"{dataset_dir}/train row 0"),
        Refusal(f"{dataset_dir}/train row 1", "wrong_type", '"text" is null, not text'),
    ]


def test_a_dataset_may_call_its_held_out_split_validation(dataset_dir):
    (dataset_dir / "test.jsonl").rename(dataset_dir / "validation.jsonl")
    _, held_out = find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert texts_of(held_out) == ["c:3"]


def test_a_dataset_of_one_split_has_nothing_held_out_of_its_own(dataset_dir):
    (dataset_dir / "test.jsonl").unlink()
    train, held_out = find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert texts_of(train) == ["a:1", "b:2"]
    assert held_out is None


def test_a_dataset_without_a_train_split_names_those_it_has(dataset_dir):
    (dataset_dir / "train.jsonl").unlink()
    with pytest.raises(DataError) as error:
        find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert str(error.value) == f"dataset_name: {dataset_dir} has no split train, only test"


def test_a_dataset_may_have_configurations(dataset_dir):
    (dataset_dir / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: tick\n  data_files:\n  - {split: train, path: test.jsonl}\n"
        "- config_name: all\n  data_files:\n  - {split: train, path: '*.jsonl'}\n---\n"
    )
    name = str(dataset_dir)
    train, _ = find_sources(DataConfig(dataset_name=name, dataset_config_name="tick"))
    assert texts_of(train) == ["c:3"]


def test_a_dataset_that_cannot_be_found_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        find_sources(DataConfig(dataset_name="nobody/no_such_q_code"))
    assert str(error.value).startswith("dataset_name: nobody/no_such_q_code could not be loaded: ")


def test_a_dataset_that_cannot_be_read_is_named(dataset_dir):
    (dataset_dir / "train.jsonl").write_text('{"text": "a:1"}\n{"text": "b')
    with pytest.raises(DataError) as error:
        find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert str(error.value).startswith(f"dataset_name: {dataset_dir} could not be loaded: ")


def test_an_unchanged_dataset_has_the_same_fingerprint(dataset_dir):
    one, two = (find_sources(DataConfig(dataset_name=str(dataset_dir))) for _ in range(2))
    assert one[0].fingerprint == two[0].fingerprint
    assert one[0].fingerprint != one[1].fingerprint


def test_a_changed_dataset_has_another_fingerprint(dataset_dir):
    before, _ = find_sources(DataConfig(dataset_name=str(dataset_dir)))
    write_jsonl(dataset_dir / "train.jsonl", "a:1", "b:3")
    os.utime(dataset_dir / "train.jsonl", (2_000_000_000, 2_000_000_000))
    after, _ = find_sources(DataConfig(dataset_name=str(dataset_dir)))
    assert texts_of(after) == ["a:1", "b:3"]
    assert after.fingerprint != before.fingerprint


# An evaluation file beside each


def test_an_eval_file_stands_for_the_test_file_of_the_data_folder(data_dir, tmp_path):
    file = write_jsonl(tmp_path / "eval.jsonl", "own")
    train, held_out = find_sources(DataConfig(data_dir=data_dir, eval_file=file))
    assert (texts_of(train), texts_of(held_out)) == (["filtered train"], ["own"])


def test_an_eval_file_stands_beside_a_train_file(tmp_path, corpus_dir):
    file = write_jsonl(tmp_path / "eval.jsonl", "own")
    train, held_out = find_sources(DataConfig(train_file=corpus_dir, eval_file=file))
    assert len(texts_of(train)) == 12
    assert texts_of(held_out) == ["own"]


def test_an_eval_file_stands_for_the_test_split_of_a_dataset(dataset_dir, tmp_path):
    file = write_jsonl(tmp_path / "eval.jsonl", "own")
    train, held_out = find_sources(DataConfig(dataset_name=str(dataset_dir), eval_file=file))
    assert (texts_of(train), texts_of(held_out)) == (["a:1", "b:2"], ["own"])
