"""Document retrieval: many documents with numbers, a query, and the number of the one document that answers it.

The prompt is DeciMamba's (Ben-Kish et al. 2024, arXiv:2406.14528): before each document stands the query, so that a
model knows what to look for while it reads. The golden document may be at any place, drawn evenly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.tasks.cell import Cell, count_right
from train.tasks.example import Example
from train.tasks.text import Text

MOST_DOCUMENTS = 1000
"""Documents have different numbers below this."""

PASSAGE_TOKENS = 160
"""Length of a document cut from running text."""
QUERY_TOKENS = 24
"""Length of a query cut from such a document."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passage:
    query: Int32[np.ndarray, " query"]
    """What only this passage answers."""
    text: Int32[np.ndarray, " passage"]


@runtime_checkable
class Passages(Protocol):
    """Where documents come from."""

    tokenizer: Tokenizer
    fingerprint: str
    """Names the content."""

    def draw(self, random: np.random.Generator, count: int) -> Sequence[Passage]:
        """``count`` passages, each with a text of its own."""
        ...


class PassagesOfText:
    """Pieces of running text; the query is a verbatim piece of the passage (the inverse cloze task)."""

    def __init__(self, text: Text):
        self.tokenizer = text.tokenizer
        self.fingerprint = text.fingerprint
        self._text = text

    def draw(self, random: np.random.Generator, count: int) -> Sequence[Passage]:
        starts = random.integers(self._text.size, size=count)
        return [self._passage(random, int(start)) for start in starts]

    def _passage(self, random: np.random.Generator, start: int) -> Passage:
        text = self._text.read(start, PASSAGE_TOKENS)
        place = random.integers(PASSAGE_TOKENS - QUERY_TOKENS + 1)
        return Passage(text[place : place + QUERY_TOKENS], text)


class PassagesOfFile:
    """Lines of JSON with ``question`` and ``context``, as SQuAD's."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        """Raises UserError where the file is missing or has other fields."""
        try:
            content = path.read_bytes()
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
            questions = [(str(row["question"]), str(row["context"])) for row in rows]
        except OSError as error:
            raise UserError(f"cannot read the documents {path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} has no documents: each line must be a JSON object with the texts 'question' and 'context'."
            ) from None
        self.tokenizer = tokenizer
        self.fingerprint = hashlib.sha256(content).hexdigest()[:32]
        self._path = path
        self._questions: dict[str, list[str]] = {}
        for question, context in questions:
            self._questions.setdefault(context, []).append(question)
        self._contexts = list(self._questions)

    def draw(self, random: np.random.Generator, count: int) -> Sequence[Passage]:
        if count > len(self._contexts):
            raise UserError(
                f"{self._path} has {len(self._contexts)} different documents: ask for no more, not {count}."
            )
        chosen = [self._contexts[i] for i in random.choice(len(self._contexts), size=count, replace=False)]
        return [Passage(self._encode(str(random.choice(self._questions[c]))), self._encode(c)) for c in chosen]

    def _encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        return self.tokenizer.encode(text).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DocumentRetrieval:
    passages: Passages
    """The documents."""
    seed: int
    """With an index, decides an example."""

    def example(self, index: int, documents: int) -> Example:
        """The example with this index, of so many documents, the golden one among them."""
        if not 1 <= documents <= MOST_DOCUMENTS:
            raise UserError(f"{documents} documents cannot be told apart by number: from 1 to {MOST_DOCUMENTS}.")
        return self._example(np.random.default_rng([self.seed, index, documents]), documents)

    def training_example(self, index: int, length: int) -> Example:
        """An example of as many documents as fit into the length, at most."""
        shortest = 0
        for documents in range(max(1, length // PASSAGE_TOKENS), 0, -1):
            example = self._example(np.random.default_rng([self.seed, index]), min(documents, MOST_DOCUMENTS))
            if example.length <= length:
                return example
            shortest = example.length
        raise UserError(
            f"a document retrieval of {length} tokens is too short: one document takes {shortest}. Ask for more."
        )

    @staticmethod
    def is_right(answer: str, expected: str) -> bool:
        """Whether the first number of an answer is the golden document's."""
        found = re.search(r"\d+", answer)
        return found is not None and found.group() == expected

    def _example(self, random: np.random.Generator, documents: int) -> Example:
        golden = int(random.integers(documents))
        numbers = random.choice(MOST_DOCUMENTS, size=documents, replace=False)
        passages = self.passages.draw(random, documents)
        query = passages[golden].query
        parts = [np.array([self.passages.tokenizer.separator_id], np.int32)]
        for number, passage in zip(numbers, passages, strict=True):
            parts += [self._encode(" <|Query|> "), query, self._encode(f" <|Document {number}|> "), passage.text]
        prompt = np.concatenate([*parts, self._encode(" <|Answer|> <|Document ")])
        expected = str(numbers[golden])
        return Example(prompt, self._encode(f"{expected}|>"), expected)

    def _encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        return _encoded(self.passages.tokenizer, text)


def cells(task: DocumentRetrieval, *, documents: Sequence[int], tries: int) -> list[Cell]:
    """A cell for each number of documents."""

    def cell(count: int) -> Cell:
        examples = [task.example(index, count) for index in range(tries)]
        return Cell(
            key={"documents": count},
            length=max(example.length for example in examples),
            tokens=sum(example.length for example in examples),
            measure=count_right(lambda: examples, task.is_right, task.passages.tokenizer),
        )

    return [cell(count) for count in documents]


@functools.lru_cache(maxsize=4 * MOST_DOCUMENTS)
def _encoded(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    return tokenizer.encode(text).astype(np.int32)
