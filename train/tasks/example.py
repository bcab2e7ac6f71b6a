"""What a task asks: a prompt and its answer, as tokens."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One question. A model is given the prompt and goes on; in training, a separator closes the answer."""

    prompt: Int32[np.ndarray, " prompt"]
    """Begins with the separator, as every document does."""
    answer: Int32[np.ndarray, " answer"]
    """What should follow, without the separator behind it."""
    expected: str
    """What the answer has to say, for the task's metric."""
    foretold: slice = slice(0, 0)
    """Part of the prompt that the prompt before it decides, as an answer is decided: training counts it as one."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


@runtime_checkable
class TrainingTask(Protocol):
    """A task that a model can be trained on: examples that a seed and an index decide, and nothing else."""

    def training_example(self, index: int, length: int) -> Example:
        """The example with this index, of at most ``length`` tokens.

        Raises:
            UserError: no example is that short.
        """
        ...
