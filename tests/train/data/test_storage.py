"""What was written is read back, and damage of any file is named instead of read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.storage import CorpusWriter, read_corpus
from train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from train.data.tokens import CHECKSUM_BLOCK, Corpus, Split, join_documents, tokens_in_memory
from train.errors import UserError


def _append(writer: CorpusWriter, split: Split, texts: list[str], tokenizer: Tokenizer) -> None:
    ids = join_documents([tokenizer.encode(text) for text in texts], tokenizer)
    writer.append(split, ids, documents=len(texts), text_bytes=len("".join(texts).encode()))


def _write(folder: Path, train: list[str], held_out: list[str], tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    with CorpusWriter(folder, tokenizer) as writer:
        _append(writer, "train", train, tokenizer)
        _append(writer, "held_out", held_out, tokenizer)
        writer.finish()
    return folder


def _texts(corpus: Corpus) -> tuple[list[str], list[str]]:
    train, held_out = (
        [corpus.tokenizer.decode(ids) for ids in split.iter_documents()] for split in (corpus.train, corpus.held_out)
    )
    return train, held_out


@pytest.mark.parametrize("kind", ["bytes", "bpe", "plain_bpe"])
def test_a_stored_corpus_equals_the_same_in_memory(tmp_path: Path, kind: str, request: pytest.FixtureRequest):
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(str(request.getfixturevalue(f"{kind}_file")))
    train, held_out = ["the naïve fox", "x" * 100], ["a dog"]
    corpus = read_corpus(_write(tmp_path, train, held_out, tokenizer))
    assert _texts(corpus) == (train, held_out)
    for stored, texts in [(corpus.train, train), (corpus.held_out, held_out)]:
        expected = tokens_in_memory(texts, tokenizer)
        np.testing.assert_array_equal(stored.read(0, len(stored.ids)), expected.ids)
        assert stored.ids.dtype == expected.ids.dtype
        assert stored.fingerprint == expected.fingerprint
        assert (stored.documents, stored.text_bytes) == (expected.documents, expected.text_bytes)


def test_a_byte_corpus_takes_one_byte_a_token(tmp_path: Path):
    _write(tmp_path, ["hello"], ["x"], ByteTokenizer())
    assert (tmp_path / "train.tokens").read_bytes() == b"\xffhello\xff"


def _read_both(folder: Path) -> None:
    corpus = read_corpus(folder)
    corpus.train.read(0, 10)
    corpus.held_out.read(0, 10)


def test_every_truncated_or_changed_file_is_named(tmp_path: Path):
    _write(tmp_path, ["x" * 3 * CHECKSUM_BLOCK], ["y"], ByteTokenizer())
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        changed = content[:20] + bytes([content[20 % len(content)] ^ 1]) + content[21:]
        for damaged in (content[:-1], b"", changed) if path.suffix != ".json" else (content[:-1], b"", b"[]"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{path.name} is damaged.*'mamba-jax prepare'"):
                _read_both(tmp_path)
        path.unlink()
        with pytest.raises(UserError, match=path.name if path.name != "header.json" else "not a folder made by"):
            read_corpus(tmp_path)
        path.write_bytes(content)
    _read_both(tmp_path)


def test_damage_is_found_in_the_block_that_is_read(tmp_path: Path):
    _write(tmp_path, ["x" * 3 * CHECKSUM_BLOCK], ["y"], ByteTokenizer())
    with open(tmp_path / "train.tokens", "r+b") as file:
        file.seek(CHECKSUM_BLOCK)
        file.write(b"?")
    tokens = read_corpus(tmp_path).train
    tokens.read(0, CHECKSUM_BLOCK)
    tokens.read(2 * CHECKSUM_BLOCK, 3 * CHECKSUM_BLOCK)
    for begin, end in [(CHECKSUM_BLOCK - 1, CHECKSUM_BLOCK + 1), (2 * CHECKSUM_BLOCK - 1, 2 * CHECKSUM_BLOCK)]:
        with pytest.raises(UserError, match="block 1, at byte 65,536"):
            tokens.read(begin, end)


def test_another_version_or_place_is_told_apart(tmp_path: Path):
    folder = _write(tmp_path / "corpus", ["x"], ["y"], ByteTokenizer())
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"version": 7}))
    with pytest.raises(UserError, match="version 7 of the corpus format"):
        read_corpus(folder)
    with pytest.raises(UserError, match=r"missing' does not exist; give 'stdlib'"):
        read_corpus(tmp_path / "missing")
    (tmp_path / "text.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "text.txt"):
        with pytest.raises(UserError, match="not a folder made by 'mamba-jax prepare'"):
            read_corpus(path)


@given(
    texts=st.lists(st.text("aé😀 ", min_size=1, max_size=30), min_size=1, max_size=8),
    share=st.floats(0.01, 0.5),
)
def test_a_held_out_tail_is_the_end_of_the_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], share: float
):
    texts = ["first " * 8, *texts]
    folder = tmp_path_factory.mktemp("corpus")
    with CorpusWriter(folder, ByteTokenizer()) as writer:
        _append(writer, "train", texts, ByteTokenizer())
        writer.hold_out_tail(share)
        writer.finish()
    corpus = read_corpus(folder)
    train, held_out = _texts(corpus)
    # Whole again once joined, with at most one document cut in two, and that between characters.
    assert "".join(train + held_out) == "".join(texts)
    assert [*train, *held_out] == texts or [*train[:-1], train[-1] + held_out[0], *held_out[1:]] == texts
    assert train
    assert held_out
    assert all(train + held_out)
    for tokens, side in [(corpus.train, train), (corpus.held_out, held_out)]:
        assert tokens.documents == len(side)
        assert tokens.text_bytes == len("".join(side).encode())
    total = len(corpus.train.ids) + len(corpus.held_out.ids)
    assert len(corpus.held_out.ids) == pytest.approx(max(share * total, 8), abs=8)


def test_too_little_text_to_hold_any_out_is_an_error(tmp_path: Path):
    with CorpusWriter(tmp_path, ByteTokenizer()) as writer:
        _append(writer, "train", ["hello"], ByteTokenizer())
        with pytest.raises(UserError, match="too small: 6 tokens, of 5 bytes of text"):
            writer.hold_out_tail(0.1)
