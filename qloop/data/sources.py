"""Finds the sources that the config names: files, a data folder, or a dataset of the hub."""

from pathlib import Path
from typing import Any

from qloop.config.keys import DataConfig
from qloop.data.documents import Source, iterate_documents, iterate_rows, list_source_files
from qloop.errors import DataError, join_names
from qloop.storage.folders import hash_files


def find_sources(data: DataConfig) -> tuple[Source, Source | None]:
    """Finds the training documents, and the held-out ones if they have a source of their own.

    Raises:
        DataError: A file, folder, dataset or split that the config names does not exist, or its
            format is unknown.
    """
    if data.dataset_name:
        train, held_out = _find_hub_sources(data.dataset_name, data)
    elif data.train_file:
        train, held_out = _file_source(data.train_file, data.text_field), None
    else:
        train, held_out = _find_data_dir_sources(data)
    if data.eval_file:
        held_out = _file_source(data.eval_file, data.text_field)
    return train, held_out


def _find_data_dir_sources(data: DataConfig) -> tuple[Source, Source | None]:
    train = data.data_dir / f"{data.data_type}_train.jsonl"
    test = data.data_dir / f"{data.data_type}_test.jsonl"
    if not train.exists():
        found = sorted(
            file.name[: -len("_train.jsonl")] for file in data.data_dir.glob("*_train.jsonl")
        )
        has = f"it has {join_names(found, 'and')}" if found else "it has no *_train.jsonl at all"
        raise DataError(
            f"data_type: {train} does not exist; {has}. Put the corpus there, or give --train_file"
        )
    held_out = _file_source(test, data.text_field) if test.exists() else None
    return _file_source(train, data.text_field), held_out


def _file_source(path: Path, text_field: str) -> Source:
    files = list_source_files(path)
    return Source(lambda: iterate_documents(files, text_field), f"{text_field} {hash_files(files)}")


def _find_hub_sources(name: str, data: DataConfig) -> tuple[Source, Source | None]:
    import datasets

    try:
        splits: Any = datasets.load_dataset(name, data.dataset_config_name)
    except Exception as error:  # its errors have no common base class
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise DataError(f"dataset_name: {name} could not be loaded: {error}{cause}") from error
    if "train" not in splits:
        raise DataError(f"dataset_name: {name} has no split train, only {', '.join(splits)}")

    def source(split: str) -> Source:
        rows = splits[split]
        return Source(
            lambda: iterate_rows(iter(rows), f"{name}/{split}", data.text_field),
            f"{data.text_field} {rows._fingerprint}",
        )

    held_out = next((split for split in ("test", "validation") if split in splits), None)
    return source("train"), source(held_out) if held_out else None
