"""Token streams: the documents of a split, one after the other, in one array.

A stream of two documents is ``[S a a a S b b S]``, S the separator. Every document begins with a separator and the last
one is closed by one. Taking neighbours as (input, target), every token of every document is predicted once, its first
token from a separator; and the end of every document is predicted once, the separator being the target.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt, UInt32

from train.data.tokenizer import Tokenizer
from train.errors import UserError

Split = Literal["train", "held_out"]

CHECKSUM_BLOCK = 1 << 16
"""Bytes of a stream that one checksum covers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One split as a token stream."""

    ids: UInt[np.ndarray, " length"]
    """The stream; often memory-mapped, so read it through ``read``."""
    tokenizer: Tokenizer
    """What made the ids, and turns them back into text."""
    documents: int
    """Documents in the stream."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    checksums: UInt32[np.ndarray, " blocks"]
    """CRC-32 of each CHECKSUM_BLOCK bytes of ``ids``."""
    path: Path | None = None
    """File the ids are mapped from, each block of which is checked when it is first read; None for ids in memory."""

    @property
    def targets(self) -> int:
        """Predictions one pass over the stream makes: every id but the first."""
        return len(self.ids) - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the content: equal for equal ids and tokenizers, whatever the machine."""
        description = json.dumps(self.tokenizer.describe(), sort_keys=True)
        header = f"{len(self.ids)} {self.ids.dtype.str} {description}"
        return hashlib.sha256(header.encode() + self.checksums.tobytes()).hexdigest()[:32]

    def read(self, begin: int, end: int) -> UInt[np.ndarray, " read"]:
        """Ids from ``begin`` to before ``end``, fewer where the stream ends. Raises UserError for a damaged file."""
        if self.path is not None:
            self._check_blocks(begin, end)
        return self.ids[begin:end]

    def bits_per_byte(self, nats: float, targets: float) -> float:
        """Turns a summed negative log-likelihood into bits per byte of text.

        ``nats / (ln 2 · bytes)``. Over the whole split ``bytes`` is the text's own count, whatever the tokenizer, so
        models of different vocabularies compare; the cost of the separators is in ``nats``, they add no bytes. Over a
        part of the split, ``bytes`` is its share by the number of targets.

        Args:
            nats: sum of -ln p(target) over the scored targets.
            targets: number of scored targets (the sum of their ``loss_weights``).
        """
        return nats / (math.log(2) * targets * self.text_bytes / self.targets)

    @functools.cached_property
    def _checked(self) -> np.ndarray:
        """Which blocks of the file have been checked."""
        return np.zeros(len(self.checksums), np.bool_)

    def _check_blocks(self, begin: int, end: int) -> None:
        per_block = CHECKSUM_BLOCK // self.ids.itemsize
        for block in range(begin // per_block, min(-(-end // per_block), len(self.checksums))):
            if not self._checked[block]:
                ids = self.ids[block * per_block : (block + 1) * per_block]
                if block_checksums(ids)[0] != self.checksums[block]:
                    raise UserError(
                        f"{self.path} is damaged: block {block}, at byte {block * CHECKSUM_BLOCK:,}, is not what was "
                        "written. Make the corpus again with 'mamba-jax prepare'."
                    )
                self._checked[block] = True

    def iter_documents(self) -> Iterator[UInt[np.ndarray, " tokens"]]:
        """The ids of each document, without separators, in order; holds one document at a time."""
        parts: list[np.ndarray] = []
        for begin in range(1, len(self.ids), CHECKSUM_BLOCK):
            block = self.read(begin, begin + CHECKSUM_BLOCK)
            first = 0
            for end in np.flatnonzero(block == self.tokenizer.separator_id):
                yield np.concatenate([*parts, block[first:end]])
                parts, first = [], int(end) + 1
            parts.append(block[first:])

    def iter_text(self) -> Iterator[UInt[np.ndarray, " tokens"]]:
        """The ids of all documents, without separators, in order; cut anywhere."""
        for begin in range(0, len(self.ids), CHECKSUM_BLOCK):
            block = self.read(begin, begin + CHECKSUM_BLOCK)
            yield block[block != self.tokenizer.separator_id]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run learns from and is evaluated on."""

    train: Tokens
    held_out: Tokens
    tokenizer: Tokenizer

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when a model's vocabulary is too small for the corpus' ids."""
        if self.tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"LanguageModel.vocab_size = {vocab_size} is too small: the corpus has token ids up to "
                f"{self.tokenizer.vocab_size - 1}; set LanguageModel.vocab_size to {self.tokenizer.vocab_size} or more."
            )


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id of a vocabulary, little-endian."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def join_documents(documents: Sequence[Integer[np.ndarray, " _"]], tokenizer: Tokenizer) -> UInt[np.ndarray, " length"]:
    """The ids of the documents, each behind a separator; the stream still lacks its closing separator.

    Raises:
        UserError: an id is beyond the vocabulary, or is the separator.
    """
    dtype = id_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator_id], dtype)
    parts = [separator[:0]]
    for ids in documents:
        parts += [separator, check_ids(ids, tokenizer).astype(dtype, copy=False)]
    return np.concatenate(parts)


def check_ids(ids: Integer[np.ndarray, " tokens"], tokenizer: Tokenizer) -> Integer[np.ndarray, " tokens"]:
    """Returns the ids of a text, or raises UserError when one of them cannot stand in a document."""
    largest = int(ids.max(initial=0))
    if largest >= tokenizer.vocab_size:
        raise UserError(f"the tokenizer made id {largest}, beyond its own vocabulary of {tokenizer.vocab_size}.")
    if np.any(ids == tokenizer.separator_id):
        raise UserError(f"the tokenizer made its separator, id {tokenizer.separator_id}, out of plain text.")
    return ids


def tokens_in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """A split held in memory, of these documents in this order."""
    separator = np.array([tokenizer.separator_id], id_dtype(tokenizer.vocab_size))
    ids = np.concatenate([join_documents([tokenizer.encode(text) for text in texts], tokenizer), separator])
    return Tokens(
        ids=ids,
        tokenizer=tokenizer,
        documents=len(texts),
        text_bytes=sum(len(text.encode("utf-8")) for text in texts),
        checksums=block_checksums(ids),
    )


def block_checksums(ids: UInt[np.ndarray, " length"]) -> UInt32[np.ndarray, " blocks"]:
    """CRC-32 of each CHECKSUM_BLOCK bytes of a stream."""
    data = memoryview(ids).cast("B")
    return np.array([zlib.crc32(data[i : i + CHECKSUM_BLOCK]) for i in range(0, len(data), CHECKSUM_BLOCK)], "<u4")
