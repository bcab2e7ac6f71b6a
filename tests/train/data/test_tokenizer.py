"""Tokenizers are lossless, keep their separator out of texts, and never cut a character when streaming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from train.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_description,
)
from train.errors import UsageError, UserError


@pytest.fixture(scope="module", params=["bytes", "bpe", "plain_bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(str(request.getfixturevalue(f"{request.param}_file")))


@given(text=st.text())
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.separator_id for token in ids.tolist())


@given(text=st.text(max_size=20), cut=st.integers(0, 40))
def test_a_stream_of_pieces_joins_to_the_decoded_text(tokenizer: Tokenizer, text: str, cut: int):
    ids = tokenizer.encode(text)[:cut].tolist()  # may end inside a character
    assert "".join(tokenizer.decode_stream(iter(ids))) == tokenizer.decode(ids)


def test_a_streamed_piece_never_ends_inside_a_character(tokenizer: Tokenizer):
    text = "naïve 😀 €"
    pieces = list(tokenizer.decode_stream(tokenizer.encode(text).tolist()))
    assert len(pieces) > 4
    assert "".join(pieces) == text


def test_a_piece_is_streamed_before_the_next_id_is_asked_for(tokenizer: Tokenizer):
    asked = []

    def ids():
        for token in tokenizer.encode("x y z").tolist():
            asked.append(token)
            yield token

    next(tokenizer.decode_stream(ids()))
    assert len(asked) == 1


def test_separators_decode_to_nothing(tokenizer: Tokenizer):
    ids = [tokenizer.separator_id, *tokenizer.encode("ab").tolist(), tokenizer.separator_id]
    assert tokenizer.decode(ids) == "ab"
    assert "".join(tokenizer.decode_stream(ids)) == "ab"


def test_an_id_beyond_the_vocabulary_is_refused(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match=f"beyond the tokenizer's vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate \(U\+D800\)"):
        tokenizer.encode("a\ud800")


@given(text=st.text(max_size=30))
def test_a_description_survives_json_and_builds_the_same_tokenizer(tokenizer: Tokenizer, text: str):
    copy = tokenizer_from_description(json.loads(json.dumps(tokenizer.describe())))
    np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))
    assert (copy.vocab_size, copy.separator_id) == (tokenizer.vocab_size, tokenizer.separator_id)


def test_bytes_are_the_utf8_encoding():
    assert ByteTokenizer().encode("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().decode([0xC3, 0x21]) == "\ufffd!"


def test_ids_of_a_hugging_face_tokenizer_are_its_library_s(bpe_file: Path):
    text = "the lazy café"
    expected = tokenizers.Tokenizer.from_file(str(bpe_file)).encode(text).ids
    assert load_tokenizer(str(bpe_file)).encode(text).tolist() == expected


def test_the_separator_is_the_end_of_text_token_or_a_new_id(bpe_file: Path, plain_bpe_file: Path):
    with_token, without = load_tokenizer(str(bpe_file)), load_tokenizer(str(plain_bpe_file))
    assert (with_token.separator_id, with_token.vocab_size) == (0, 300)
    assert (without.separator_id, without.vocab_size) == (300, 301)


def test_a_special_token_written_out_in_a_text_stays_text(bpe_file: Path):
    tokenizer = load_tokenizer(str(bpe_file))
    text = "a<|endoftext|>b"
    assert tokenizer.separator_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_missing_or_foreign_file_is_a_usage_error(tmp_path: Path):
    foreign = tmp_path / "tokenizer.json"
    foreign.write_text('{"not": "a tokenizer"}')
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in [
        (tmp_path / "missing.json", "there is no such file"),
        (foreign, "not a tokenizer"),
        (binary, "not a tokenizer"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_tokenizer(str(path))


def test_an_unknown_description_is_refused():
    with pytest.raises(ValueError, match="kinds are 'bytes', 'huggingface'"):
        tokenizer_from_description({"kind": "words"})
    with pytest.raises(ValueError, match="Model"):
        HuggingFaceTokenizer("{}")
