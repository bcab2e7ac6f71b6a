"""One result of an evaluation: what names it, and how it comes about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mamba_jax.models.language_model import LanguageModel
from train.data.tokenizer import Tokenizer
from train.tasks.example import Example
from train.tasks.reading import Reading, answers

Result = Mapping[str, Any]
"""Terms of JSON: ``correct`` of ``tries``, or ``values`` to take the mean of."""


@dataclasses.dataclass(frozen=True)
class Cell:
    key: Mapping[str, Any]
    """Names the cell within its task, in terms of JSON."""
    length: int
    """Tokens of its longest sequence, answer included: what a method that must know the length is told."""
    tokens: int
    """Tokens read for it, to tell the time left by."""
    measure: Callable[[LanguageModel, Reading], Result]
    """Asks a model, which the method has extended."""


def count_right(
    examples: Callable[[], Sequence[Example]],
    is_right: Callable[[str, str], bool],
    tokenizer: Tokenizer,
    *,
    slack: int = 3,
) -> Callable[[LanguageModel, Reading], Result]:
    """A ``Cell.measure``: how many examples are answered right.

    Args:
        examples: makes them, when they are needed.
        is_right: compares an answer with what is expected.
        tokenizer: of the model.
        slack: tokens an answer may be longer than the right one, so that one that goes on is not taken for right.
    """

    def measure(model: LanguageModel, reading: Reading) -> Result:
        asked = examples()
        longest = max(len(example.answer) for example in asked) + slack
        said = answers(model, asked, tokenizer, reading, max_new_tokens=longest)
        right = [is_right(answer, example.expected) for answer, example in zip(said, asked, strict=True)]
        return {"correct": sum(right), "tries": len(right)}

    return measure
