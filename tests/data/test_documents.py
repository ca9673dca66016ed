"""Documents: what is read, what is refused and why, and that nothing is lost or corrected."""

import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qloop.data.documents import (
    Document,
    Refusal,
    iterate_documents,
    iterate_rows,
    list_source_files,
)
from qloop.errors import DataError

GOOD = b'{"text": "select from trade"}'


def read_jsonl(folder: Path, content: bytes, text_field: str = "text"):
    file = folder / "trades.jsonl"
    file.write_bytes(content)
    return list(iterate_documents([file], text_field))


def read_parquet(folder: Path, table: pa.Table, text_field: str = "text"):
    file = folder / "trades.parquet"
    pyarrow.parquet.write_table(table, file)
    return list(iterate_documents([file], text_field))


def read_folder(folder: Path):
    return list(iterate_documents(list_source_files(folder), "text"))


def write_files(folder: Path, names: list[str]) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"file:`{name}\n")


# JSONL


def test_each_line_with_a_text_is_a_document_with_its_line_as_place(tmp_path):
    read = read_jsonl(tmp_path, b'{"text": "a:1"}\n{"text": "b:2", "licence": "MIT"}\n')
    file = tmp_path / "trades.jsonl"
    assert read == [
        Document(text="a:1", prompt="", place=f"{file}:1"),
        Document(text="b:2", prompt="", place=f"{file}:2"),
    ]


def test_the_last_line_needs_no_newline(tmp_path):
    read = read_jsonl(tmp_path, b'{"text": "a:1"}\n{"text": "b:2"}')
    assert [document.text for document in read] == ["a:1", "b:2"]


def test_lines_may_end_in_carriage_return_and_newline(tmp_path):
    read = read_jsonl(tmp_path, b'{"text": "a:1"}\r\n{"text": "b:2"}\r\n')
    assert [document.text for document in read] == ["a:1", "b:2"]


def test_prompt_and_completion_become_prompt_and_text(tmp_path):
    (document,) = read_jsonl(tmp_path, b'{"prompt": "/ a sum\\n", "completion": "sum x"}\n')
    assert (document.prompt, document.text) == ("/ a sum\n", "sum x")


def test_a_prompt_may_be_empty(tmp_path):
    (document,) = read_jsonl(tmp_path, b'{"prompt": "", "completion": "sum x"}\n')
    assert (document.prompt, document.text) == ("", "sum x")


def test_a_text_wins_over_prompt_and_completion(tmp_path):
    line = b'{"prompt": "p", "completion": "c", "text": "t"}\n'
    (document,) = read_jsonl(tmp_path, line)
    assert (document.prompt, document.text) == ("", "t")


def test_text_field_names_the_field_that_holds_the_text(tmp_path):
    line = b'{"content": "sum x", "text": "another"}\n'
    (document,) = read_jsonl(tmp_path, line, text_field="content")
    assert document.text == "sum x"


REFUSED_LINES = {
    "a broken byte": (b'{"text": "caf\xff"}', "not_utf8", "byte 0xff at offset 13"),
    "a cut character": (b'{"text": "\xc3"}', "not_utf8", "byte 0xc3 at offset 10"),
    "a lone surrogate": (
        b'{"text": "ab\\ud800"}',
        "not_utf8",
        "a lone surrogate at character 2",
    ),
    "an escaped NUL": (
        b'{"text": "a\\u0000b"}',
        "nul",
        "holds a NUL character; is it a binary file?",
    ),
    "a NUL in the prompt": (
        b'{"prompt": "\\u0000", "completion": "a"}',
        "nul",
        "holds a NUL character; is it a binary file?",
    ),
    "a text of nothing": (b'{"text": ""}', "empty", "nothing but white space"),
    "a text of white space": (b'{"text": " \\t\\n"}', "empty", "nothing but white space"),
    "a completion of nothing": (
        b'{"prompt": "a", "completion": ""}',
        "empty",
        "nothing but white space",
    ),
    "a blank line": (b"", "empty", "a blank line"),
    "a line of white space": (b" \t\r", "empty", "a blank line"),
    "a line cut in half": (
        b'{"text": "sel',
        "malformed_json",
        "Unterminated string starting at: line 1 column 10 (char 9)",
    ),
    "two objects": (
        b'{"text": "a"} {"text": "b"}',
        "malformed_json",
        "Extra data: line 1 column 15 (char 14)",
    ),
    "a list": (b'["text"]', "not_an_object", "a line must be an object, got list"),
    "a bare text": (b'"text"', "not_an_object", "a line must be an object, got str"),
    "a bare null": (b"null", "not_an_object", "a line must be an object, got null"),
    "no text": (
        b'{"body": "a"}',
        "missing_field",
        'has neither "text" nor "prompt" and "completion"; fields: [\'body\']',
    ),
    "a prompt alone": (
        b'{"prompt": "a"}',
        "missing_field",
        'has neither "text" nor "prompt" and "completion"; fields: [\'prompt\']',
    ),
    "an empty object": (
        b"{}",
        "missing_field",
        'has neither "text" nor "prompt" and "completion"; fields: []',
    ),
    "a number": (b'{"text": 5}', "wrong_type", '"text" is int, not text'),
    "a null": (b'{"text": null}', "wrong_type", '"text" is null, not text'),
    "a list of texts": (b'{"text": ["a"]}', "wrong_type", '"text" is list, not text'),
    "a prompt of null": (
        b'{"prompt": null, "completion": "a"}',
        "wrong_type",
        '"prompt" is null, not text',
    ),
    "a completion of null": (
        b'{"prompt": "a", "completion": null}',
        "wrong_type",
        '"completion" is null, not text',
    ),
}


@pytest.mark.parametrize("name", REFUSED_LINES)
def test_an_unusable_line_is_refused_with_its_place_and_the_rest_goes_on(tmp_path, name):
    line, reason, detail = REFUSED_LINES[name]
    before, refusal, after = read_jsonl(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    assert refusal == Refusal(f"{tmp_path / 'trades.jsonl'}:2", reason, detail)
    assert before.text == after.text == "select from trade"


def test_a_last_line_cut_in_half_is_refused(tmp_path):
    _, refusal = read_jsonl(tmp_path, GOOD + b"\n" + GOOD[:14])
    assert refusal == Refusal(
        f"{tmp_path / 'trades.jsonl'}:2",
        "malformed_json",
        "Unterminated string starting at: line 1 column 10 (char 9)",
    )


def test_a_last_line_cut_within_a_character_is_refused(tmp_path):
    _, refusal = read_jsonl(tmp_path, GOOD + b'\n{"text": "caf\xc3')
    assert (refusal.reason, refusal.detail) == ("not_utf8", "byte 0xc3 at offset 13")


def test_a_lone_surrogate_in_a_prompt_is_found_at_its_place_in_the_prompt(tmp_path):
    line = b'{"prompt": "a\\ud800", "completion": "sum"}'
    (refusal,) = read_jsonl(tmp_path, line)
    assert refusal.reason == "not_utf8"
    assert "at character 1" in refusal.detail


def test_nesting_deeper_than_the_parser_goes_is_refused(tmp_path):
    before, refusal, after = read_jsonl(tmp_path, GOOD + b"\n" + b"[" * 100_000 + b"\n" + GOOD)
    assert refusal.reason == "malformed_json"
    assert before.text == after.text == "select from trade"


def test_a_number_longer_than_python_converts_ends_nothing(tmp_path):
    line = b'{"text": "a:1", "hash": ' + b"7" * 5000 + b"}"
    read = read_jsonl(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    assert len(read) == 3
    assert read[0].text == read[2].text == "select from trade"


def test_an_empty_file_holds_nothing(tmp_path):
    assert read_jsonl(tmp_path, b"") == []


def test_a_file_named_json_is_read_line_by_line_too(tmp_path):
    file = tmp_path / "trades.json"
    file.write_bytes(GOOD + b"\n" + GOOD + b"\n")
    assert len(list(iterate_documents([file], "text"))) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "prompt", "completion", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)
byte_lines = st.one_of(
    st.binary(max_size=40).map(lambda line: line.replace(b"\n", b" ")),
    json_values.map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps({"text": value}, ensure_ascii=False)).map(
        lambda line: line.encode(errors="surrogatepass")
    ),
    st.sampled_from([GOOD, GOOD[:14], b'{"text": "\\ud800"}', b"\xef\xbb\xbf" + GOOD, b""]),
)


@given(lines=st.lists(byte_lines, max_size=12), ends_in_newline=st.booleans())
@settings(deadline=None, max_examples=200)
@example(lines=[GOOD, b"\r", b"\x0c\x1c", GOOD + b"\x85"], ends_in_newline=True)
def test_every_line_is_a_document_or_a_refusal_in_order(lines, ends_in_newline):
    content = b"".join(line + b"\n" for line in lines)
    if not ends_in_newline:
        content = content.removesuffix(b"\n")
    num_lines = content.count(b"\n") + (content != b"" and not content.endswith(b"\n"))
    with tempfile.TemporaryDirectory() as folder:
        read = read_jsonl(Path(folder), content)
        file = Path(folder, "trades.jsonl")
    assert [item.place for item in read] == [f"{file}:{n}" for n in range(1, num_lines + 1)]
    assert all(isinstance(item, Document | Refusal) for item in read)


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@settings(deadline=None, max_examples=100)
def test_a_text_comes_out_of_jsonl_as_it_went_in(text):
    with tempfile.TemporaryDirectory() as folder:
        (item,) = read_jsonl(Path(folder), json.dumps({"text": text}).encode())
    assert isinstance(item, Refusal) if not text.strip() else item.text == text


# Q files


@pytest.mark.parametrize(
    "content",
    [
        b"a:1\r\nb:2\r\n",
        b"\xef\xbb\xbfa:1\n",
        b"a:1\nb:2",
        b"\n\n  a:1 \t\n\n\n",
        b"a:1\rb:2\x0c\n",
        b"/ caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x90\x8d\n",
        b"/ e\xcc\x81 is not composed\n",
    ],
)
def test_a_q_file_keeps_every_byte(tmp_path, content):
    file = tmp_path / "module.q"
    file.write_bytes(content)
    (document,) = iterate_documents([file], "text")
    assert document.text.encode() == content


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"a:1\nb:\xe9\n", "not_utf8", "byte 0xe9 at offset 6"),
        (b"a:1\0", "nul", "holds a NUL character; is it a binary file?"),
        (b"", "empty", "nothing but white space"),
        (b" \r\n\t\n", "empty", "nothing but white space"),
    ],
)
def test_an_unusable_q_file_is_refused_with_its_path(tmp_path, content, reason, detail):
    file = tmp_path / "module.q"
    file.write_bytes(content)
    assert list(iterate_documents([file], "text")) == [Refusal(str(file), reason, detail)]


@given(content=st.binary(max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_one_document_of_these_bytes_or_one_refusal(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "module.q")
        file.write_bytes(content)
        (item,) = iterate_documents([file], "text")
    assert isinstance(item, Refusal) or item.text.encode() == content


def test_a_link_is_refused_and_its_target_counts_once(tmp_path):
    (tmp_path / "a.q").write_text("a:1\n")
    (tmp_path / "b.q").symlink_to(tmp_path / "a.q")
    document, refusal = read_folder(tmp_path)
    assert document.place == str(tmp_path / "a.q")
    assert refusal == Refusal(
        str(tmp_path / "b.q"), "not_a_regular_file", "links, pipes and devices are not read"
    )


def test_a_link_to_itself_and_a_link_to_nothing_are_refused(tmp_path):
    (tmp_path / "loop.q").symlink_to("loop.q")
    (tmp_path / "nothing.q").symlink_to("not_there.q")
    read = read_folder(tmp_path)
    assert [item.reason for item in read] == ["not_a_regular_file", "not_a_regular_file"]


def test_a_pipe_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.q")
    (tmp_path / "z.q").write_text("z:1\n")
    refusal, document = read_folder(tmp_path)
    assert refusal.reason == "not_a_regular_file"
    assert refusal.place == str(tmp_path / "pipe.q")
    assert document.text == "z:1\n"


def test_a_folder_that_links_to_itself_is_walked_once_and_the_link_is_refused(tmp_path):
    (tmp_path / "a.q").write_text("a:1\n")
    (tmp_path / "again").symlink_to(tmp_path)
    document, refusal = iterate_documents(list_source_files(tmp_path), "text")
    assert document.place == str(tmp_path / "a.q")
    assert (refusal.place, refusal.reason) == (str(tmp_path / "again"), "not_a_regular_file")


def test_a_corpus_that_is_named_by_a_link_is_read(tmp_path):
    (tmp_path / "real.q").write_text("a:1\n")
    (tmp_path / "link.q").symlink_to(tmp_path / "real.q")
    (document,) = iterate_documents(list_source_files(tmp_path / "link.q"), "text")
    assert document.text == "a:1\n"


def test_a_byte_order_mark_before_json_lines_is_no_part_of_the_first(tmp_path):
    documents = read_jsonl(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD)
    assert [document.text for document in documents] == ["select from trade"] * 2


# Folders and paths


def test_the_files_of_a_folder_are_sorted_at_any_depth(tmp_path):
    write_files(tmp_path, ["z.q", "b/c/deep.q", "a.q", "b.q", "b/a.k", "B.q"])
    names = [str(file.relative_to(tmp_path)) for file in list_source_files(tmp_path)]
    assert names == ["B.q", "a.q", "b/a.k", "b/c/deep.q", "b.q", "z.q"]


def test_the_order_of_a_folder_does_not_depend_on_the_order_of_creation(tmp_path):
    names = [f"{folder}/module_{number}.q" for folder in "xay" for number in (10, 9, 1)]
    orders = []
    for folder, created in (("one", names), ("two", sorted(names)), ("three", names[::-1])):
        write_files(tmp_path / folder, created)
        found = list_source_files(tmp_path / folder)
        orders.append([str(file.relative_to(tmp_path / folder)) for file in found])
    assert orders[0] == orders[1] == orders[2]


def test_suffixes_may_be_upper_case(tmp_path):
    write_files(tmp_path, ["A.Q", "B.K", "c.q", "d.k"])
    assert [document.text for document in read_folder(tmp_path)] == [
        "file:`A.Q\n",
        "file:`B.K\n",
        "file:`c.q\n",
        "file:`d.k\n",
    ]


@pytest.mark.parametrize("name", ["A.JSONL", "A.Json"])
def test_the_suffix_of_jsonl_may_be_upper_case(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    (document,) = iterate_documents(list_source_files(tmp_path / name), "text")
    assert document.text == "select from trade"


def test_other_files_of_a_folder_are_no_part_of_the_corpus(tmp_path):
    write_files(tmp_path, ["a.q", "README.md", "a.q.bak", "data.jsonl", "q"])
    assert list_source_files(tmp_path) == [tmp_path / "a.q"]


def test_a_file_stands_for_itself(tmp_path):
    (tmp_path / "a.q").write_text("a:1\n")
    assert list_source_files(tmp_path / "a.q") == [tmp_path / "a.q"]


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        list_source_files(tmp_path / "nothing.jsonl")
    assert str(error.value) == f"{tmp_path / 'nothing.jsonl'}: no such file or folder"


def test_an_unknown_suffix_names_the_known_formats(tmp_path):
    (tmp_path / "trades.csv").write_text("a,b\n")
    with pytest.raises(DataError) as error:
        list_source_files(tmp_path / "trades.csv")
    assert str(error.value) == (
        f"{tmp_path / 'trades.csv'}: unknown format; give JSONL (.jsonl), Parquet (.parquet), "
        "a .q or .k file, or a folder of them"
    )


def test_a_folder_without_q_files_is_named(tmp_path):
    write_files(tmp_path, ["README.md", "deep/data.csv"])
    with pytest.raises(DataError) as error:
        list_source_files(tmp_path)
    assert str(error.value) == f"{tmp_path}: no .q or .k file in this folder or below it"


# Parquet


def test_each_row_of_parquet_is_a_document_with_its_row_as_place(tmp_path):
    read = read_parquet(tmp_path, pa.table({"text": ["a:1\r\n", "b:2"], "stars": [1, 2]}))
    file = tmp_path / "trades.parquet"
    assert read == [
        Document(text="a:1\r\n", prompt="", place=f"{file} row 0"),
        Document(text="b:2", prompt="", place=f"{file} row 1"),
    ]


def test_parquet_with_prompt_and_completion(tmp_path):
    table = pa.table({"prompt": ["/ a sum\n"], "completion": ["sum x"]})
    (document,) = read_parquet(tmp_path, table)
    assert (document.prompt, document.text) == ("/ a sum\n", "sum x")


def test_parquet_with_another_text_field(tmp_path):
    table = pa.table({"repo.content": ["sum x"], "text": ["another"]})
    (document,) = read_parquet(tmp_path, table, text_field="repo.content")
    assert document.text == "sum x"


def test_parquet_rows_are_numbered_over_all_row_groups(tmp_path):
    file = tmp_path / "trades.parquet"
    table = pa.table({"text": [f"a:{number}" for number in range(3000)]})
    pyarrow.parquet.write_table(table, file, row_group_size=700)
    read = list(iterate_documents([file], "text"))
    assert [item.text for item in read] == [f"a:{number}" for number in range(3000)]
    assert read[2999].place == f"{file} row 2999"


def test_a_parquet_row_without_a_text_is_refused_and_the_rest_goes_on(tmp_path):
    before, refusal, after = read_parquet(tmp_path, pa.table({"text": ["a:1", None, "c:3"]}))
    assert refusal == Refusal(
        f"{tmp_path / 'trades.parquet'} row 1", "wrong_type", '"text" is null, not text'
    )
    assert (before.text, after.text) == ("a:1", "c:3")


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int"), ([b"a", b"b"], "bytes"), ([["a"], ["b"]], "list"), ([{"a": "b"}], "dict")],
)
def test_a_parquet_column_of_another_type_is_refused_row_by_row(tmp_path, values, kind):
    read = read_parquet(tmp_path, pa.table({"text": values}))
    assert [(item.reason, item.detail) for item in read] == [
        ("wrong_type", f'"text" is {kind}, not text') for _ in values
    ]


def test_a_parquet_text_that_is_not_utf8_is_refused_and_the_rest_goes_on(tmp_path):
    unchecked = pyarrow.compute.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    column = pyarrow.compute.cast(pa.array([b"a:1", b"b:\xff", b"c:3"]), options=unchecked)
    read = read_parquet(tmp_path, pa.table({"text": column}))
    assert [type(item) for item in read] == [Document, Refusal, Document]
    assert read[1].reason == "not_utf8"


def test_a_parquet_file_without_the_columns_is_an_error_that_names_those_it_has(tmp_path):
    with pytest.raises(DataError) as error:
        read_parquet(tmp_path, pa.table({"body": ["a:1"], "licence": ["MIT"]}))
    assert str(tmp_path / "trades.parquet") in str(error.value)
    assert "body" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing of the kind"])
def test_a_broken_parquet_file_is_an_error_with_its_name(tmp_path, content):
    file = tmp_path / "trades.parquet"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(iterate_documents([file], "text"))
    assert str(error.value).startswith(f"{file}: not readable as Parquet: ")


def test_a_parquet_file_broken_within_a_column_is_an_error_with_its_name(tmp_path):
    file = tmp_path / "trades.parquet"
    table = pa.table({"text": [f"select from trade{number}" for number in range(500)]})
    pyarrow.parquet.write_table(table, file, compression="zstd")
    content = bytearray(file.read_bytes())
    content[200:300] = b"\xff" * 100
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(iterate_documents([file], "text"))
    assert str(error.value).startswith(f"{file}: not readable as Parquet: ")


# Rows of a dataset


def test_rows_of_a_dataset_are_read_like_lines(tmp_path):
    rows = [{"text": "a:1"}, {"text": None}, {"prompt": "p", "completion": "c"}]
    assert list(iterate_rows(iter(rows), "owner/data/train", "text")) == [
        Document(text="a:1", prompt="", place="owner/data/train row 0"),
        Refusal("owner/data/train row 1", "wrong_type", '"text" is null, not text'),
        Document(text="c", prompt="p", place="owner/data/train row 2"),
    ]


# Hashes


def test_the_content_hash_depends_on_the_content_alone():
    here = Document(text="sum x", prompt="/ a sum", place="a.jsonl:1")
    there = Document(text="sum x", prompt="/ a sum", place="b.jsonl:9")
    assert here.content_hash == there.content_hash


def test_the_content_hash_tells_prompt_from_text():
    contents = [("ab", "c"), ("b", "ca"), ("abc", ""), ("", "abc"), ("c", "ab")]
    hashes = {Document(text, prompt, "a.q").content_hash for text, prompt in contents}
    assert len(hashes) == 5
