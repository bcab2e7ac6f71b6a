"""Passkey retrieval: a five-digit number hidden in a long text, asked for at its end.

The prompt is that of Landmark attention (Mohtashami & Jaggi 2023, arXiv:2305.16300) in the form DeciMamba and LongMamba
use. Prompt, needle and answer together are exactly as long as asked for: the text around the needle fills the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from train.errors import UserError
from train.tasks.cell import Cell, count_right
from train.tasks.example import Example
from train.tasks.text import Text

INTRODUCTION = "There is an important pass key hidden inside a lot of irrelevant text. Find it and memorize it:\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
_FIRST_MENTION, _BOTH_MENTIONS = "The pass key is {key}. Remember it.", "The pass key is {key}. Remember it. {key}"
QUESTION = "\nAnswer: "


@dataclasses.dataclass(frozen=True)
class Passkey:
    text: Text
    """What the needle is hidden in."""
    seed: int
    """With an index, decides an example."""

    def example(self, index: int, length: int, depth: float) -> Example:
        """The example with this index.

        Args:
            index: number of the example, from 0.
            length: tokens of the prompt with its answer.
            depth: share of the text that comes before the needle, from 0 to 1.

        Raises:
            UserError: the needle alone is longer.
        """
        return self._example(np.random.default_rng([self.seed, index, length, round(1e6 * depth)]), length, depth)

    def training_example(self, index: int, length: int) -> Example:
        """An example of this length whose needle may be anywhere."""
        random = np.random.default_rng([self.seed, index])
        return self._example(random, length, random.random())

    @staticmethod
    def is_right(answer: str, expected: str) -> bool:
        """Whether the first number of an answer is the key."""
        found = re.search(r"\d+", answer)
        return found is not None and found.group() == expected

    def _example(self, random: np.random.Generator, length: int, depth: float) -> Example:
        key = str(random.integers(10_000, 100_000))
        encode = lambda text: self.text.tokenizer.encode(text).astype(np.int32)  # noqa: E731
        needle, question, answer = encode(NEEDLE.format(key=key)), encode(QUESTION), encode(key)
        opening = np.concatenate([[np.int32(self.text.tokenizer.separator_id)], encode(INTRODUCTION)])
        fill = length - sum(map(len, (opening, needle, question, answer)))
        if fill < 0:
            raise UserError(
                f"a passkey of {length} tokens is too short: the prompt without any text to hide it in takes "
                f"{length - fill}. Ask for a longer one."
            )
        text = self.text.read(int(random.integers(self.text.size)), fill)
        before = round(depth * fill)
        prompt = np.concatenate([opening, text[:before], needle, text[before:], question])
        second_mention = slice(
            *(len(opening) + before + len(encode(part.format(key=key))) for part in (_FIRST_MENTION, _BOTH_MENTIONS))
        )
        return Example(prompt, answer, expected=key, foretold=second_mention)


def cells(passkey: Passkey, *, lengths: Sequence[int], depths: Sequence[float], tries: int) -> list[Cell]:
    """A cell for each length and depth. Raises UserError where a length does not even hold the needle."""
    for length in lengths:
        passkey.example(0, length, 0.5)
    return [
        Cell(
            key={"length": length, "depth": depth},
            length=length,
            tokens=length * tries,
            measure=count_right(
                functools.partial(_examples, passkey, length, depth, tries), passkey.is_right, passkey.text.tokenizer
            ),
        )
        for length in lengths
        for depth in depths
    ]


def _examples(passkey: Passkey, length: int, depth: float, tries: int) -> list[Example]:
    return [passkey.example(index, length, depth) for index in range(tries)]
