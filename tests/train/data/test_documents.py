"""Blocks of any file add up to its documents, and files that are not what they claim are named."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from train.data import documents
from train.data.documents import find_files, read_blocks
from train.errors import UsageError, UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def _read(path: Path, text_field: str = "text") -> list[str]:
    texts: list[str] = []
    for block in read_blocks(path, text_field):
        pieces = block.documents()
        if block.continues:
            texts[-1] += pieces[0]
        else:
            texts += pieces
    return texts


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document_cut_between_lines_and_characters(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.txt{suffix}"
    for text in ["one line\nand another\n" * 5, "😀é" * 40, "a" * 100, "x", "\n\n\n", "no newline at the end\nof it"]:
        path.write_bytes(COMPRESS[suffix](text.encode()))
        assert _read(path) == [text]


@pytest.mark.usefixtures("small_blocks")
@given(text=st.text(min_size=1).filter(lambda text: "\0" not in text and text[0] != "\ufeff"))
def test_any_text_survives_being_cut(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    assert _read(path) == [text]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_line_of_json_is_a_document(tmp_path: Path, suffix: str):
    texts = ["first", "with\nnewline \u2028 and é", "", "y" * 100, "last"]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    for ending in ("\n", "", "\n\n"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(COMPRESS[suffix](("\n".join(lines) + ending).encode()))
        assert _read(path) == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_every_row_of_parquet_is_a_document(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 1000)
    texts = [random.choice("abcé") * random.randint(1, 100) for _ in range(500)]
    table = pa.table({"number": range(500), "body": pa.array(texts, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=150)
    assert len(list(read_blocks(tmp_path / "a.parquet", "body"))) > 3
    assert _read(tmp_path / "a.parquet", "body") == texts


def test_missing_texts_are_empty_documents(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    assert _read(tmp_path / "a.jsonl") == ["", "x"]
    pyarrow.parquet.write_table(pa.table({"text": [None, "x"]}), tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet") == ["", "x"]


def test_a_carriage_return_ends_no_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text":\r"a"}\r\n{"text": "b"}\r\n')
    assert _read(tmp_path / "a.jsonl") == ["a", "b"]


def test_byte_order_marks_are_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert _read(tmp_path / "a.txt") == _read(tmp_path / "a.jsonl") == ["hello"]


def test_lone_surrogates_in_json_become_replacement_characters(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "é \ud83d\ude00 \ud800 x \udc00"}')
    assert _read(tmp_path / "a.jsonl") == ["é 😀 \ufffd x \ufffd"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.zst", "a.parquet"])
def test_blocks_account_for_the_bytes_of_the_file(tmp_path: Path, name: str):
    texts = [random.randbytes(3000).hex() for _ in range(3000)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    else:
        lines = [json.dumps({"text": text}) for text in texts]
        path.write_bytes(COMPRESS["".join(path.suffixes[1:])]("\n".join(lines).encode()))
    blocks = list(read_blocks(path, "text"))
    assert len(blocks) > 2
    assert sum(block.file_bytes for block in blocks) == pytest.approx(path.stat().st_size, rel=1e-3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text and then\nsome \0 binary", r"a\.txt is not text: it has a zero byte at offset 19"),
        ("a.txt", b"plain line here\ncaf\xe9 ol\xe9\n", r"a\.txt is not UTF-8 text: byte 0xE9 at offset 19\. .*iconv"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2 is not a JSON object but \"\['b'\]\""),
        (
            "a.jsonl",
            b'{"id": 1, "body": "a"}\n',
            r"line 1 has no field 'text'; its fields: 'id', 'body'\. Set --text_fi",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' is no text but 3"),
        ("a.jsonl", b"\xff\xfe\x00\n", r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl.gz", b"not compressed", r"a\.jsonl\.gz cannot be read"),
        ("a.txt.zst", b"not compressed", r"a\.txt\.zst cannot be read"),
        ("a.txt.gz", gzip.compress(b"some text " * 99, mtime=0)[:-9], r"a\.txt\.gz cannot be read: .*runcated"),
        (
            "a.txt.zst",
            zstandard.compress(random.randbytes(999).hex().encode())[:-9],
            r"a\.txt\.zst cannot be read: .*runcated",
        ),
        ("a.parquet", b"not parquet at all", r"a\.parquet cannot be read"),
    ],
)
def test_a_file_that_is_not_what_it_claims_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _read(tmp_path / name)


def test_a_parquet_column_that_is_missing_or_no_text_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"body": ["x"], "number": [1]}), path)
    with pytest.raises(UserError, match=r"column 'text' not; its columns: body \(string\), number \(int64\)"):
        _read(path)
    with pytest.raises(UserError, match=r"column 'number' as int64, not text"):
        _read(path, "number")


def test_a_line_without_end_is_refused_instead_of_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(documents, "_LONGEST_LINE", 64)
    (tmp_path / "a.jsonl").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="a line of more than 64 bytes"):
        _read(tmp_path / "a.jsonl")


def test_a_folder_stands_for_its_readable_files_in_order(tmp_path: Path):
    for name in [
        "b.txt",
        "a/z.jsonl.gz",
        "a/b.parquet",
        "c.txt.zst",
        "picture.png",
        ".hidden.txt",
        ".git/a.txt",
        "a.gz",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = ["a/b.parquet", "a/z.jsonl.gz", "b.txt", "c.txt.zst"]
    assert find_files([tmp_path]) == [tmp_path / name for name in names]
    assert find_files([tmp_path / "b.txt", tmp_path]) == [tmp_path / name for name in ["b.txt", *names[:2], names[3]]]


def test_inputs_that_cannot_be_meant_are_usage_errors(tmp_path: Path):
    (tmp_path / "a.csv").write_text("")
    for path, message in [
        (tmp_path / "missing.txt", r"missing\.txt does not exist"),
        (tmp_path / "a.csv", r"a\.csv has a suffix .*accepted are \.txt and \.jsonl"),
        (tmp_path, "holds no file to read"),
    ]:
        with pytest.raises(UsageError, match=message):
            find_files([path])
