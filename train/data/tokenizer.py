"""Tokenizers: text to token ids and back, with one id set apart that separates documents.

The separator is both the first input of a document and the target after its last token, so a model trained on it can
begin a text from nothing and knows when to stop. No text ever encodes to it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Integer

from train.errors import UsageError, UserError

_SEPARATOR_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")

Ids = Integer[np.ndarray, " tokens"] | Iterable[int]


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back; ``decode(encode(text))`` gives the text back as far as the tokenizer is lossless."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this; the separator is one of them."""
        ...

    @property
    def separator_id(self) -> int:
        """The id between documents: begin-of-text as an input, end-of-text as a target."""
        ...

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """Ids of a text, without separators. Raises UserError for text that has no UTF-8 form (lone surrogates)."""
        ...

    def decode(self, ids: Ids) -> str:
        """Text of the ids; separators stand for nothing, and bytes that are not UTF-8 for U+FFFD.

        Raises ValueError for an id beyond the vocabulary.
        """
        ...

    def decode_stream(self, ids: Ids) -> Iterator[str]:
        """Pieces of ``decode(ids)``, each as soon as the ids read so far settle it: characters are never cut."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything ``tokenizer_from_description`` needs to build it again, in terms of JSON."""
        ...


class ByteTokenizer:
    """The UTF-8 bytes of a text, with 0xFF as the separator.

    0xFF never occurs in UTF-8, so the vocabulary is 256 ids, a token file has one byte a token, and any text survives.
    """

    vocab_size = 256
    separator_id = 0xFF

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        return np.frombuffer(_utf8(text), np.uint8)

    def decode(self, ids: Ids) -> str:
        return bytes(_without_separators(ids, self)).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Ids) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in _without_separators(ids, self):
            if piece := decoder.decode(bytes((token,))):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def describe(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face ``tokenizers`` library, read from its ``tokenizer.json``.

    The separator is the first of its special tokens with a usual end-of-text name (``<|endoftext|>``, ``</s>``, …);
    a tokenizer without one gets a new id after its last. Special tokens written out in a text stay text.
    """

    def __init__(self, definition: str):
        """Takes the content of a ``tokenizer.json``. Raises ValueError when it is not one."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(str(error)) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        next_id = max(vocabulary.values(), default=-1) + 1
        self.separator_id = next((vocabulary[name] for name in _SEPARATOR_NAMES if name in special), next_id)
        self.vocab_size = max(next_id, self.separator_id + 1)

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(list(_without_separators(ids, self)), skip_special_tokens=False)

    def decode_stream(self, ids: Ids) -> Iterator[str]:
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        seen: list[int] = []
        length = 0
        for token in _without_separators(ids, self):
            seen.append(token)
            if piece := stream.step(self._tokenizer, token):
                length += len(piece)
                yield piece
        if rest := self.decode(seen)[length:]:
            yield rest

    def describe(self) -> dict[str, Any]:
        return {"kind": "huggingface", "definition": json.loads(self._tokenizer.to_str())}


def load_tokenizer(name: str) -> Tokenizer:
    """Tokenizer of a command-line option: 'bytes', or the path of a Hugging Face ``tokenizer.json``.

    Raises:
        UsageError: the file is missing or is no tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    accepted = "give 'bytes', or the path of a tokenizer.json of the Hugging Face tokenizers library"
    if not path.is_file():
        raise UsageError(f"--tokenizer {name}: there is no such file; {accepted}.")
    try:
        return HuggingFaceTokenizer(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"--tokenizer {name}: the file is not a tokenizer ({error}); {accepted}.") from None


def tokenizer_from_description(description: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that ``describe`` described. Raises ValueError for a description of none."""
    match description:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "huggingface", "definition": definition}:
            return HuggingFaceTokenizer(json.dumps(definition))
        case _:
            raise ValueError(
                f"no tokenizer is described by {str(description)[:80]!r}; kinds are 'bytes', 'huggingface'"
            )


def _without_separators(ids: Ids, tokenizer: Tokenizer) -> Iterator[int]:
    for token in ids.tolist() if isinstance(ids, np.ndarray) else map(int, ids):
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"token id {token} is beyond the tokenizer's vocabulary of {tokenizer.vocab_size}")
        if token != tokenizer.separator_id:
            yield token


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"the text has a lone surrogate (U+{code:04X}), which is no character; remove it.") from None
