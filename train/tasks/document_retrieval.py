"""Document retrieval: many documents with numbers, a query, and the number of the one document that answers it.

The prompt is DeciMamba's (Ben-Kish et al. 2024, arXiv:2406.14528): before each document stands the query, so that a
model knows what to look for while it reads. The golden document may be at any place, drawn evenly. Of pieces of running
text it alone holds the query; of a file's documents it is the one that the file has the question for.
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
VISIBLE_BYTES = 8
"""A query cut from running text has this much that is no white space: an indent asks for nothing."""

_MOST_QUERIES = 1000
"""Queries that are tried for an example; more than enough where one in ten does."""


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    query: Int32[np.ndarray, " query"]
    """What the golden document answers."""
    documents: Sequence[Int32[np.ndarray, " document"]]


@runtime_checkable
class Passages(Protocol):
    """Where documents come from."""

    tokenizer: Tokenizer
    fingerprint: str
    """Names the content."""

    def draw(self, random: np.random.Generator, count: int, golden: int) -> Drawn:
        """``count`` documents, with a query that the one at place ``golden`` answers."""
        ...


class PassagesOfText:
    """Pieces of running text; the query is a verbatim piece of one alone of them (the inverse cloze task)."""

    def __init__(self, text: Text):
        self.tokenizer = text.tokenizer
        self.fingerprint = text.fingerprint
        self._text = text

    def draw(self, random: np.random.Generator, count: int, golden: int) -> Drawn:
        others = [self._passage(random) for _ in range(count - 1)]
        # Compared as bytes, which is fast. A match across tokens' borders is none, but costs no more than a try.
        searched = [other.tobytes() for other in others]
        for _ in range(_MOST_QUERIES):
            passage = self._passage(random)
            place = random.integers(PASSAGE_TOKENS - QUERY_TOKENS + 1)
            query = passage[place : place + QUERY_TOKENS]
            sought = query.tobytes()
            if self._is_visible(query) and not any(sought in other for other in searched):
                return Drawn(query, [*others[:golden], passage, *others[golden:]])
        raise UserError(
            f"of {_MOST_QUERIES} pieces of the text as a query, each is white space or stands in several of {count} "
            "documents: the text is too small or repeats itself too much. Take a larger one, or fewer documents."
        )

    def _passage(self, random: np.random.Generator) -> Int32[np.ndarray, " document"]:
        return self._text.read(int(random.integers(self._text.size)), PASSAGE_TOKENS)

    def _is_visible(self, query: Int32[np.ndarray, " query"]) -> bool:
        return len("".join(self.tokenizer.decode(query).split()).encode()) >= VISIBLE_BYTES


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

    def draw(self, random: np.random.Generator, count: int, golden: int) -> Drawn:
        if count > len(self._contexts):
            raise UserError(
                f"{self._path} has {len(self._contexts)} different documents: ask for no more, not {count}."
            )
        chosen = [self._contexts[i] for i in random.choice(len(self._contexts), size=count, replace=False)]
        question = str(random.choice(self._questions[chosen[golden]]))
        return Drawn(self._encode(question), [self._encode(context) for context in chosen])

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
        drawn = self.passages.draw(random, documents, golden)
        parts = [np.array([self.passages.tokenizer.separator_id], np.int32)]
        for number, document in zip(numbers, drawn.documents, strict=True):
            parts += [self._encode(" <|Query|> "), drawn.query, self._encode(f" <|Document {number}|> "), document]
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
