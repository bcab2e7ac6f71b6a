"""Rows of a task's examples to train on, where ``train.data.pipeline`` otherwise takes the text as it is.

A row may hold several examples, which do not see each other: as many as there are of the drawn length, which is that of
the row or of a half, a quarter, … of it. Short ones come along because a model learns what to do on them first: in a
curriculum the shortest come alone, and longer ones join them step by step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from train.config import DataConfig, TaskConfig
from train.data.tokens import Tokens
from train.tasks.document_retrieval import DocumentRetrieval, PassagesOfText
from train.tasks.example import Example, TrainingTask
from train.tasks.passkey import Passkey
from train.tasks.text import Text

_TASKS: dict[str, Callable[[Text, int], TrainingTask]] = {
    "passkey": Passkey,
    "document_retrieval": lambda text, seed: DocumentRetrieval(PassagesOfText(text), seed),
}

_ROWS = 1 << 52
"""Rows of an endless run."""


class TaskRows:
    """Rows in the form of ``train.data.pipeline``; a row depends on the seed and its index alone."""

    def __init__(
        self, config: TaskConfig, data: DataConfig, tokens: Tokens, *, seed: int, is_training: bool, count: int = _ROWS
    ):
        """Takes a split of a corpus to make rows of.

        Args:
            config: the task.
            data: its sequence length is that of a row.
            tokens: split that the examples are made of.
            seed: decides the rows.
            is_training: weigh the context as ``config`` says, and shorten examples; otherwise answers alone count.
            count: rows there are.

        Raises:
            UserError: the task has no example as short as is asked for.
        """
        self._task = _TASKS[config.name](Text(tokens), seed)
        self._separator_id = tokens.tokenizer.separator_id
        self._seed = seed
        self._length = data.sequence_length
        self._count = count
        self._is_training = is_training
        self._context_weight = config.context_weight if is_training else 0.0
        self._curriculum_rows = config.curriculum_steps * data.global_batch_size if is_training else 0
        shortest = (config.shortest_length if is_training else None) or self._length
        self._most_examples = self._length // shortest
        self._task.training_example(0, self._length >> (self._most_examples.bit_length() - 1))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The row; an ``index`` past the last gives one of nothing but padding."""
        if index >= self._count:
            return self._padding(self._length, 0)
        random = np.random.default_rng([self._seed, index, 0])
        examples = 1 << int(random.integers(self._fewest_doublings(index), self._most_examples.bit_length()))
        parts = [
            self._part(self._task.training_example(index * self._most_examples + i, self._length // examples), i)
            for i in range(examples)
        ]
        row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        left = self._length - len(row["tokens"])
        padding = self._padding(left, examples)
        return {name: np.concatenate([values, padding[name]]) for name, values in row.items()}

    def _fewest_doublings(self, index: int) -> int:
        """How short the examples of a row are at least, in halvings of the row: in a curriculum fewer and fewer."""
        lengths = self._most_examples.bit_length()
        grown = lengths if index >= self._curriculum_rows else index * lengths // self._curriculum_rows + 1
        return lengths - grown

    def _part(self, example: Example, segment: int) -> dict[str, np.ndarray]:
        tokens = np.concatenate([example.prompt, example.answer])
        weights = np.full(len(tokens), self._context_weight, np.float32)
        # Each token is predicted from the one before it.
        weights[len(example.prompt) - 1 :] = 1.0
        if self._is_training and (foretold := example.foretold).stop:
            weights[foretold.start - 1 : foretold.stop - 1] = 1.0
        return {
            "tokens": tokens,
            "targets": np.append(tokens[1:], np.int32(self._separator_id)),
            "segment_ids": np.full(len(tokens), segment, np.int32),
            "loss_weights": weights,
        }

    def _padding(self, length: int, segment: int) -> dict[str, np.ndarray]:
        separators = np.full(length, self._separator_id, np.int32)
        return {
            "tokens": separators,
            "targets": separators,
            "segment_ids": np.full(length, segment, np.int32),
            "loss_weights": np.zeros(length, np.float32),
        }
