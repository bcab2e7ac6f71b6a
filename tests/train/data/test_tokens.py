"""A stream holds every document once, between separators, and knows its size, text and name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.tokenizer import ByteTokenizer, load_tokenizer
from train.data.tokens import (
    CHECKSUM_BLOCK,
    Corpus,
    check_ids,
    id_dtype,
    join_documents,
    tokens_in_memory,
)
from train.errors import UserError


def test_a_stream_is_documents_between_separators():
    tokens = tokens_in_memory(["ab", "c"], ByteTokenizer())
    assert tokens.ids.tolist() == [255, *b"ab", 255, *b"c", 255]
    assert (tokens.documents, tokens.text_bytes, tokens.targets) == (2, 3, 5)


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=6))
def test_documents_come_back_in_order(texts: list[str]):
    tokens = tokens_in_memory(texts, ByteTokenizer())
    assert [ByteTokenizer().decode(ids) for ids in tokens.iter_documents()] == texts
    assert tokens.text_bytes == len("".join(texts).encode())


@pytest.mark.parametrize("length", [CHECKSUM_BLOCK - 2, CHECKSUM_BLOCK - 1, CHECKSUM_BLOCK, 3 * CHECKSUM_BLOCK + 5])
def test_documents_longer_than_a_block_come_back(length: int):
    texts = ["x" * length, "y", "z" * length]
    assert [ByteTokenizer().decode(ids) for ids in tokens_in_memory(texts, ByteTokenizer()).iter_documents()] == texts


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_take_the_smallest_dtype_that_holds_the_vocabulary(vocab_size: int, dtype: str):
    assert id_dtype(vocab_size) == np.dtype(dtype)


def test_the_fingerprint_names_ids_and_tokenizer(bpe_file: Path):
    tokenizer = load_tokenizer(str(bpe_file))
    fingerprint = tokens_in_memory(["ab", "c"], tokenizer).fingerprint
    assert fingerprint == tokens_in_memory(["ab", "c"], load_tokenizer(str(bpe_file))).fingerprint
    assert fingerprint not in [tokens_in_memory(texts, tokenizer).fingerprint for texts in (["ab", "d"], ["a", "bc"])]
    assert (
        fingerprint
        != dataclasses.replace(tokens_in_memory(["ab", "c"], tokenizer), tokenizer=ByteTokenizer()).fingerprint
    )


def test_bits_per_byte_counts_the_bytes_of_the_text_not_the_tokens(bpe_file: Path):
    tokens = tokens_in_memory(["the quick brown fox", "naïve café"], load_tokenizer(str(bpe_file)))
    text_bytes = len(b"the quick brown fox" + "naïve café".encode())
    assert tokens.targets != text_bytes
    nats = tokens.targets * math.log(4)  # two bits a target
    assert tokens.bits_per_byte(nats, float(tokens.targets)) == pytest.approx(2 * tokens.targets / text_bytes)
    assert tokens.bits_per_byte(nats / 2, tokens.targets / 2) == pytest.approx(2 * tokens.targets / text_bytes)


def test_ids_that_cannot_stand_in_a_document_are_refused():
    with pytest.raises(UserError, match="id 256, beyond its own vocabulary of 256"):
        check_ids(np.array([3, 256]), ByteTokenizer())
    with pytest.raises(UserError, match="separator, id 255"):
        join_documents([np.array([3, 255])], ByteTokenizer())


def test_a_model_s_vocabulary_must_hold_the_corpus():
    tokens = tokens_in_memory(["ab"], ByteTokenizer())
    corpus = Corpus(tokens, tokens, ByteTokenizer())
    corpus.require_vocabulary(256)
    with pytest.raises(UserError, match=r"LanguageModel\.vocab_size = 255 .* set LanguageModel\.vocab_size to 256"):
        corpus.require_vocabulary(255)


def test_text_is_all_documents_in_order_without_separators(monkeypatch):
    tokens = tokens_in_memory(["ab", "", "cdefg", "h"], ByteTokenizer())
    monkeypatch.setattr("train.data.tokens.CHECKSUM_BLOCK", 3)
    pieces = list(tokens.iter_text())
    assert len(pieces) > 1
    assert b"".join(piece.tobytes() for piece in pieces) == b"abcdefgh"
