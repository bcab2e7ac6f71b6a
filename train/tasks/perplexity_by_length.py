"""Perplexity against the length of the context: the same last tokens, predicted from more and more before them.

Figure 4(b) of LongMamba (arXiv:2504.16053) and section 5 of DeciMamba (arXiv:2406.14528) draw it on books, with the
loss of the last 100 tokens of each window.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from mamba_jax.models.language_model import LanguageModel
from train.errors import UserError
from train.tasks.cell import Cell, Result
from train.tasks.reading import Reading, losses_of_last
from train.tasks.text import Text

LAST = 100
"""Tokens at the end of each window that are predicted."""


def cells(text: Text, *, lengths: Sequence[int], windows: int, seed: int) -> list[Cell]:
    """A cell for each length, whose windows are the ends of those of the greatest length.

    Raises:
        UserError: a length leaves no context.
    """
    if short := [length for length in lengths if length < LAST + 2]:
        raise UserError(
            f"a window of {short[0]} tokens is too short: the last {LAST} are predicted from those before, so give "
            f"lengths of {LAST + 2} or more."
        )
    return [
        Cell(
            key={"length": length},
            length=length,
            tokens=length * windows,
            measure=functools.partial(_measure, text, length, max(lengths), windows, seed),
        )
        for length in lengths
    ]


def window(text: Text, index: int, *, length: int, longest: int, seed: int) -> Int32[np.ndarray, " length"]:
    """The last tokens of a window, behind a separator; seed, index and ``longest`` alone decide where it ends."""
    start = np.random.default_rng([seed, index]).integers(text.size)
    ending = text.read(int(start), longest)[longest - length + 1 :]
    return np.concatenate([[np.int32(text.tokenizer.separator_id)], ending])


def _measure(
    text: Text, length: int, longest: int, windows: int, seed: int, model: LanguageModel, reading: Reading
) -> Result:
    chosen = [window(text, index, length=length, longest=longest, seed=seed) for index in range(windows)]
    return {"values": losses_of_last(model, chosen, reading, last=LAST)}
