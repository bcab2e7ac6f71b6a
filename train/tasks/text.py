"""Real text without end, to hide things in: one split of a corpus, read in circles."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from train.data.tokenizer import Tokenizer
from train.data.tokens import Tokens, tokens_in_memory
from train.errors import UserError


class Text:
    """The documents of a split as one text, its end followed by its beginning; separators are left out."""

    def __init__(self, tokens: Tokens):
        """Raises UserError where the split has no text."""
        if tokens.targets <= tokens.documents:
            raise UserError("the text to hide things in is empty: give another file or corpus.")
        self.tokenizer = tokens.tokenizer
        self.fingerprint = tokens.fingerprint
        self._tokens = tokens

    @staticmethod
    def of_file(path: Path, tokenizer: Tokenizer) -> Text:
        """The text of a UTF-8 file. Raises UserError where it cannot be read."""
        try:
            return Text(tokens_in_memory([path.read_text(encoding="utf-8")], tokenizer))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the text {path}: {error}.") from None

    @functools.cached_property
    def size(self) -> int:
        """Positions a reading can start from."""
        return len(self._tokens.ids)

    @property
    def count(self) -> int:
        """Tokens of it, until it begins again."""
        return self._tokens.targets - self._tokens.documents

    def pieces(self) -> Iterator[Integer[np.ndarray, " tokens"]]:
        """All of it once, in order, cut anywhere."""
        return self._tokens.iter_text()

    def read(self, start: int, count: int) -> Int32[np.ndarray, " count"]:
        """``count`` tokens from position ``start`` on, from 0 to before ``size``."""
        parts, missing = [np.zeros(0, np.int32)], count
        while missing:
            ids = self._tokens.read(start, start + missing)
            text = ids[ids != self.tokenizer.separator_id].astype(np.int32)
            parts.append(text)
            missing -= len(text)
            start = (start + len(ids)) % self.size
        return np.concatenate(parts)

    def read_before(self, end: int, count: int) -> Int32[np.ndarray, " count"]:
        """``count`` tokens up to before position ``end``, from 0 to before ``size``."""
        parts, missing = [np.zeros(0, np.int32)], count
        while missing:
            end = end or self.size  # before the beginning comes the end
            ids = self._tokens.read(max(0, end - missing), end)
            text = ids[ids != self.tokenizer.separator_id].astype(np.int32)
            parts.append(text)
            missing -= len(text)
            end -= len(ids)
        return np.concatenate(parts[::-1])
