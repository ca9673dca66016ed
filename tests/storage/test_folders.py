"""Folders and files that are whole or absent, and hashes of files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qloop.storage.folders import (
    delete_leftovers,
    hash_files,
    show_bytes,
    whole_folder,
    write_atomically,
    write_json,
)

# Folders


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "new/stores") as building:
        (building / "deep").mkdir()
        (building / "deep/tokens.bin").write_bytes(b"1234")
        assert not (tmp_path / "new/stores").exists()
        assert building.parent == tmp_path / "new"
    assert names_in(tmp_path / "new") == ["stores"]
    assert names_in(tmp_path / "new/stores") == ["deep"]
    assert (tmp_path / "new/stores/deep/tokens.bin").read_bytes() == b"1234"


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with whole_folder(tmp_path / "stores") as building:
            (building / "tokens.bin").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names_in(tmp_path) == []


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores/mine").touch()
    with pytest.raises(OSError, match="stores"), whole_folder(tmp_path / "stores"):
        pass
    assert names_in(tmp_path) == ["stores"]
    assert names_in(tmp_path / "stores") == ["mine"]


FILL = """
import pathlib, sys, time
from qloop.storage.folders import whole_folder
with whole_folder(pathlib.Path(sys.argv[1]), prefix=sys.argv[2]) as building:
    (building / "tokens.bin").write_bytes(b"half")
    print("filling", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("prefix", [".building-", ".exporting-"])
def test_leftovers_of_killed_processes_alone_are_deleted_and_only_of_their_prefix(tmp_path, prefix):
    command = [sys.executable, "-c", FILL, str(tmp_path / "stores"), prefix]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"filling\n"
            delete_leftovers(tmp_path, prefix)
            (building,) = tmp_path.iterdir()
        finally:
            other.kill()
    delete_leftovers(tmp_path, ".other-")
    assert building.exists()
    delete_leftovers(tmp_path, prefix)
    assert names_in(tmp_path) == []


def test_a_folder_that_was_made_this_moment_is_no_leftover(tmp_path):
    """Its process has not locked it yet."""
    (tmp_path / ".building-stores-0123abcd").mkdir()
    (tmp_path / ".building-stores-0123abcd/in-use.lock").touch()
    delete_leftovers(tmp_path)
    assert names_in(tmp_path) == [".building-stores-0123abcd"]


# Files


def test_a_file_is_written_whole(tmp_path):
    file = tmp_path / "notes.txt"
    write_atomically(file, "kdb+ \u00b5s\n")
    assert file.read_bytes() == b"kdb+ \xc2\xb5s\n"


def test_a_shorter_text_replaces_a_longer_one(tmp_path):
    file = tmp_path / "notes.txt"
    write_atomically(file, "a longer text\n")
    write_atomically(file, "short\n")
    assert file.read_text() == "short\n"


def test_writing_leaves_no_temporary(tmp_path):
    write_atomically(tmp_path / "notes.txt", "one\n")
    write_atomically(tmp_path / "notes.txt", "two\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_temporary_of_a_killed_process_is_no_hindrance(tmp_path):
    (tmp_path / ".notes.txt.tmp").write_text("half a te")
    write_atomically(tmp_path / "notes.txt", "whole\n")
    assert (tmp_path / "notes.txt").read_text() == "whole\n"


def test_a_write_that_fails_keeps_the_old_content(tmp_path):
    """A lone surrogate cannot be written as UTF-8."""
    file = tmp_path / "notes.txt"
    write_atomically(file, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new " * 10_000 + "\ud800")
    assert file.read_text() == "old\n"


def test_a_reader_that_has_the_file_open_sees_the_old_text(tmp_path):
    file = tmp_path / "notes.txt"
    write_atomically(file, "old\n")
    with file.open() as reader:
        write_atomically(file, "new\n")
        assert reader.read() == "old\n"


def test_json_is_written_with_a_line_per_entry(tmp_path):
    write_json(tmp_path / "report.json", {"read": 3, "refused": 1})
    assert (tmp_path / "report.json").read_text() == '{\n  "read": 3,\n  "refused": 1\n}\n'


# Hashes and sizes


@pytest.fixture
def hashed(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.q", "b.q", "deep/c.q"):
        (folder / name).write_text(f"file:`{name}\n")
    return folder


def hash_folder(folder: Path) -> str:
    return hash_files(sorted(path for path in folder.rglob("*") if not path.is_dir()))


def test_the_hash_of_files_is_the_same_when_nothing_changed(hashed):
    assert hash_folder(hashed) == hash_folder(hashed)


def test_the_hash_of_files_changes_with_one_byte(hashed):
    before = hash_folder(hashed)
    (hashed / "deep" / "c.q").write_text("file:`deep/d.q\n")
    assert hash_folder(hashed) != before


def test_the_hash_of_files_changes_with_a_name(hashed):
    before = hash_folder(hashed)
    (hashed / "a.q").rename(hashed / "aa.q")
    assert hash_folder(hashed) != before


def test_the_hash_of_files_changes_when_a_file_changes_folder(hashed):
    before = hash_folder(hashed)
    (hashed / "b.q").rename(hashed / "deep" / "b.q")
    assert hash_folder(hashed) != before


def test_the_hash_of_files_changes_when_two_files_swap_their_content(hashed):
    before = hash_folder(hashed)
    (hashed / "a.q").rename(hashed / "swap")
    (hashed / "b.q").rename(hashed / "a.q")
    (hashed / "swap").rename(hashed / "b.q")
    assert hash_folder(hashed) != before


def test_the_hash_of_files_changes_with_an_added_file(hashed):
    before = hash_folder(hashed)
    (hashed / "d.q").write_text("")
    assert hash_folder(hashed) != before


def test_the_hash_of_files_stays_when_the_whole_folder_moves(hashed, tmp_path):
    before = hash_folder(hashed)
    shutil.move(hashed, tmp_path / "else" / "where")
    assert hash_folder(tmp_path / "else" / "where") == before


def test_the_hash_of_files_is_the_same_by_a_relative_path(hashed, monkeypatch):
    before = hash_folder(hashed)
    monkeypatch.chdir(hashed.parent)
    assert hash_folder(Path("corpus")) == before
    monkeypatch.chdir(hashed)
    assert hash_folder(Path()) == before


def test_links_and_pipes_can_stand_among_hashed_files(hashed):
    before = hash_folder(hashed)
    (hashed / "link.q").symlink_to("a.q")
    os.mkfifo(hashed / "pipe.q")
    assert hash_folder(hashed) != before


def test_a_file_name_that_is_not_utf8_can_be_hashed(hashed):
    before = hash_folder(hashed)
    with open(os.fsencode(hashed) + b"/caf\xe9.q", "wb") as file:  # noqa: PTH123
        file.write(b"a:1\n")
    assert hash_folder(hashed) != before


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (57e6, "57 MB"), (1234, "1.23 kB"), (2e15, "2e+03 TB")],
)
def test_a_size_has_three_digits_and_a_unit(count, shown):
    assert show_bytes(count) == shown
