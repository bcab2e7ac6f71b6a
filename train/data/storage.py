"""Prepared corpora on disk: what ``mamba-jax prepare`` writes and a run maps into memory.

A folder of six files:
    header.json                          format, version, counts of each split, checksums of the small files
    tokenizer.json                       the tokenizer's whole description: the folder needs nothing beside it
    train.tokens, held_out.tokens        token streams (see ``tokens``), raw little-endian ids, uint8 to uint32
    train.checksums, held_out.checksums  CRC-32 of every CHECKSUM_BLOCK bytes of the stream, little-endian uint32

The folder appears under its name at once and complete, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from jaxtyping import UInt

from train.data.tokenizer import Tokenizer, tokenizer_from_description
from train.data.tokens import CHECKSUM_BLOCK, Corpus, Split, Tokens, id_dtype
from train.errors import UserError

_FORMAT = "mamba-jax corpus"
_VERSION = 1
_SMALLEST_CORPUS = 32
_LONGEST_TAIL = 1 << 22
_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one stream holds."""

    tokens: int = 0
    """Ids, separators included."""
    documents: int = 0
    """Documents."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents' text."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.documents + other.documents, self.text_bytes + other.text_bytes)

    def __sub__(self, other: Counts) -> Counts:
        return self + Counts(-other.tokens, -other.documents, -other.text_bytes)


class CorpusWriter:
    """Writes the streams of a corpus into a folder piece by piece; memory does not grow with them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.counts: dict[Split, Counts] = dict.fromkeys(_SPLITS, Counts())
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._files: dict[Split, BinaryIO] = {
            split: open(folder / f"{split}.tokens", "wb")  # noqa: SIM115, __exit__ closes it
            for split in _SPLITS
        }

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, split: Split, ids: UInt[np.ndarray, " length"], *, documents: int, text_bytes: int) -> None:
        """Adds ids to a split's stream.

        Args:
            split: stream to add to.
            ids: documents as ``join_documents`` returns them, or more of the stream's last document.
            documents: documents (that is, separators) that begin in ``ids``.
            text_bytes: UTF-8 bytes of the text the ids stand for.
        """
        self._files[split].write(np.ascontiguousarray(ids, self._dtype).tobytes())
        self.counts[split] += Counts(len(ids), documents, text_bytes)

    def hold_out_tail(self, share: float) -> None:
        """Moves the end of the training stream, about ``share`` of it, to the empty held-out stream.

        For a corpus of so few documents that none is held out whole. The document the cut falls in becomes two. No more
        than 4 Mi tokens move, which measure a model well enough and fit in memory.

        Raises:
            UserError: there is too little text to divide.
        """
        counts = self.counts["train"]
        if counts.tokens < _SMALLEST_CORPUS:
            raise UserError(
                f"the corpus is too small: {counts.tokens} tokens, of {counts.text_bytes} bytes of text; "
                f"give at least {_SMALLEST_CORPUS} tokens."
            )
        file = self._files["train"]
        file.flush()
        stream = np.memmap(self._folder / "train.tokens", self._dtype, "r")
        cut = self._cut_of_tail(stream, min(round(share * counts.tokens), _LONGEST_TAIL))
        tail = np.array(stream[cut:])
        separator = np.array([self._tokenizer.separator_id], self._dtype)
        documents = int(np.count_nonzero(tail == separator))
        text_bytes = len(self._tokenizer.decode(tail).encode("utf-8"))
        file.truncate(cut * self._dtype.itemsize)
        file.seek(0, os.SEEK_END)
        self.counts["train"] -= Counts(len(tail), documents, text_bytes)
        if tail[0] != separator:
            tail, documents = np.concatenate([separator, tail]), documents + 1
        self.append("held_out", tail, documents=documents, text_bytes=text_bytes)

    def _cut_of_tail(self, stream: UInt[np.ndarray, " length"], length: int) -> int:
        """Where a tail of about this length begins: never inside a character, nor right after a separator."""
        separator_id = self._tokenizer.separator_id
        near = len(stream) - max(length, _SMALLEST_CORPUS // 4)
        if stream[near - 1] == separator_id:
            return near - 1
        for cut in range(near, near + 4):  # no character has more than four tokens
            if stream[cut] == separator_id or not self._tokenizer.decode(stream[cut : cut + 4]).startswith("\ufffd"):
                return cut
        return near

    def finish(self) -> None:
        """Closes each stream with its last separator and writes the other files."""
        splits = {}
        for split, file in self._files.items():
            self.append(split, np.array([self._tokenizer.separator_id], self._dtype), documents=0, text_bytes=0)
            _sync(file)
            checksums = _file_checksums(self._folder / f"{split}.tokens")
            _write(self._folder / f"{split}.checksums", checksums)
            splits[split] = {**dataclasses.asdict(self.counts[split]), "checksums_crc32": zlib.crc32(checksums)}
        description = json.dumps(self._tokenizer.describe(), ensure_ascii=False).encode()
        _write(self._folder / "tokenizer.json", description)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "dtype": self._dtype.name,
            "tokenizer_crc32": zlib.crc32(description),
            "splits": splits,
        }
        _write(self._folder / "header.json", json.dumps(header, indent=2).encode())


def read_corpus(source: str | Path) -> Corpus:
    """Opens a folder made by ``mamba-jax prepare``; streams are mapped, not read.

    Sizes and the small files are checked here, the streams block by block when a block is first read.

    Raises:
        UserError: there is no such folder, or it is truncated, damaged or of another format.
    """
    folder = Path(source)
    if not (folder / "header.json").is_file():
        there = "is not a folder made by 'mamba-jax prepare'" if folder.exists() else "does not exist"
        raise UserError(
            f"Data.source = {str(source)!r} {there}; give 'stdlib', or make it with "
            f"'mamba-jax prepare INPUT --out {folder if not folder.exists() else 'FOLDER'}'."
        )
    header = _read_header(folder)
    description = _read_checked(folder / "tokenizer.json", header["tokenizer_crc32"])
    tokenizer = tokenizer_from_description(json.loads(description))
    train, held_out = (_map_stream(folder, split, header, tokenizer) for split in _SPLITS)
    return Corpus(train, held_out, tokenizer)


def _file_checksums(path: Path) -> bytes:
    """The ``block_checksums`` of a stream's file, read and not mapped, as mapped pages would count as memory in use."""
    with open(path, "rb") as file:
        blocks = iter(functools.partial(file.read, CHECKSUM_BLOCK), b"")
        return b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


def _read_header(folder: Path) -> Mapping[str, Any]:
    try:
        header = json.loads((folder / "header.json").read_bytes())
        if header["format"] != _FORMAT:
            raise KeyError
    except (ValueError, TypeError, KeyError):
        raise _damaged(folder / "header.json", "it is not the header of a corpus") from None
    if header["version"] != _VERSION:
        raise UserError(
            f"{folder} has version {header['version']} of the corpus format, this is a program for version {_VERSION}; "
            "make the corpus again with 'mamba-jax prepare'."
        )
    return header


def _map_stream(folder: Path, split: Split, header: Mapping[str, Any], tokenizer: Tokenizer) -> Tokens:
    path = folder / f"{split}.tokens"
    dtype = id_dtype(tokenizer.vocab_size)
    entry = header["splits"][split]
    expected = entry["tokens"] * dtype.itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise _damaged(path, f"it has {size:,} bytes and should have {expected:,}")
    return Tokens(
        ids=np.memmap(path, dtype, "r"),
        tokenizer=tokenizer,
        documents=entry["documents"],
        text_bytes=entry["text_bytes"],
        checksums=np.frombuffer(_read_checked(folder / f"{split}.checksums", entry["checksums_crc32"]), "<u4"),
        path=path,
    )


def _read_checked(path: Path, crc32: int) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    if zlib.crc32(content) != crc32:
        raise _damaged(path, "its content is not what was written")
    return content


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} is damaged: {how}. Make the corpus again with 'mamba-jax prepare'.")


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
