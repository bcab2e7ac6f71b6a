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
    """A cell for each length, whose windows end where those of all other lengths do.

    Raises:
        UserError: a length leaves no context, or is longer than the text.
    """
    if short := [length for length in lengths if length < LAST + 2]:
        raise UserError(
            f"a window of {short[0]} tokens is too short: the last {LAST} are predicted from those before, so give "
            f"lengths of {LAST + 2} or more."
        )
    if max(lengths) > text.count:
        raise UserError(
            f"a window of {max(lengths)} tokens is too long: of a text of {text.count} it would show what is to be "
            "predicted. Give shorter --lengths, or a longer --text."
        )
    return [
        Cell(
            key={"length": length},
            length=length,
            tokens=length * windows,
            measure=functools.partial(_measure, text, length, windows, seed),
        )
        for length in lengths
    ]


def window(text: Text, index: int, *, length: int, seed: int) -> Int32[np.ndarray, " length"]:
    """Tokens of the text behind a separator; seed and index alone decide where they end, whatever the length."""
    end = np.random.default_rng([seed, index]).integers(text.size)
    return np.concatenate([[np.int32(text.tokenizer.separator_id)], text.read_before(int(end), length - 1)])


def _measure(text: Text, length: int, windows: int, seed: int, model: LanguageModel, reading: Reading) -> Result:
    chosen = [window(text, index, length=length, seed=seed) for index in range(windows)]
    return {"values": losses_of_last(model, chosen, reading, last=LAST)}
