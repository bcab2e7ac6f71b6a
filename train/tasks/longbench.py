"""LongBench (Bai et al. 2023, arXiv:2308.14508): questions and summaries over long texts, from its own files.

Prompts, numbers of new tokens and scores are upstream's. Greedy decoding goes on to that number or the separator;
upstream has samsum end at the first line end, which cutting the answer there amounts to.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamba_jax.models.language_model import LanguageModel
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.tasks.cell import Cell, Result
from train.tasks.example import Example
from train.tasks.reading import Reading, answers
from train.tasks.scores import f1, load_jieba, rouge_l, rouge_l_chinese

EXAMPLES_A_CELL = 8
"""Questions that are asked, and kept, together; of about the same length."""

_OF_AN_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_OF_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How LongBench asks and scores."""

    prompt: str
    max_new_tokens: int
    score: Callable[[str, str], float]
    metric: str
    first_line_only: bool = False
    """Whether an answer ends with its line."""
    load_scorer: Callable[[], object] = lambda: None
    """Loads what scoring takes; raises UserError where that is not installed."""


DATASETS = {
    "hotpotqa": Dataset(
        prompt=_OF_PASSAGES
        + "The following are given passages.\n{context}\n\n"
        + _OF_PASSAGES
        + "Question: {input}\nAnswer:",
        max_new_tokens=32,
        score=f1,
        metric="F1",
    ),
    "qasper": Dataset(
        prompt="You are given a scientific article and a question. Answer the question "
        + _OF_AN_ARTICLE
        + "Article: {context}\n\n Answer the question based on the above article "
        + _OF_AN_ARTICLE
        + "Question: {input}\n\nAnswer:",
        max_new_tokens=128,
        score=f1,
        metric="F1",
    ),
    "samsum": Dataset(
        prompt="Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
        max_new_tokens=128,
        score=rouge_l,
        metric="Rouge-L",
        first_line_only=True,
    ),
    "vcsum": Dataset(
        prompt="下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        max_new_tokens=512,
        score=rouge_l_chinese,
        metric="Rouge-L",
        load_scorer=load_jieba,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    example: Example
    """Its ``expected`` and ``answer`` are empty: there are several answers, and none is to be said literally."""
    answers: Sequence[str]
    """Any of these is right."""


def read_questions(
    folder: Path, name: str, tokenizer: Tokenizer, *, most_tokens: int | None, count: int | None
) -> list[Question]:
    """The questions of a data set, from the file ``NAME.jsonl``.

    Args:
        folder: where LongBench's files are.
        name: of the data set.
        tokenizer: of the model.
        most_tokens: cut longer prompts in their middle, as upstream does, to leave this many tokens.
        count: take the first ones only.

    Raises:
        UserError: the file is missing, or is not LongBench's.
    """
    path = folder / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()][:count]
        asked = [
            (DATASETS[name].prompt.format(context=row["context"], input=row["input"]), list(row["answers"]))
            for row in rows
        ]
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}. Put LongBench's {name}.jsonl there (data.zip of the dataset "
            "THUDM/LongBench has it), or name others with --datasets."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not in LongBench's form: each line must be a JSON object with 'context', 'input' and 'answers'."
        ) from None
    if not asked or not all(answers for _, answers in asked):
        raise UserError(f"{path} has {'a question without answers' if asked else 'no questions'}.")
    return [Question(_example(prompt, tokenizer, most_tokens), answers) for prompt, answers in asked]


def cells(questions: Sequence[Question], name: str, tokenizer: Tokenizer) -> list[Cell]:
    """Cells of a few questions each, the shortest first. Raises UserError where they could not be scored."""
    DATASETS[name].load_scorer()  # found out before hours are spent on other data sets
    by_length = sorted(range(len(questions)), key=lambda i: questions[i].example.length)
    parts = [by_length[i : i + EXAMPLES_A_CELL] for i in range(0, len(by_length), EXAMPLES_A_CELL)]
    return [
        Cell(
            key={"dataset": name, "questions": part},
            length=_rounded_up(questions[part[-1]].example.length + DATASETS[name].max_new_tokens),
            tokens=sum(questions[i].example.length for i in part),
            measure=functools.partial(_measure, [questions[i] for i in part], DATASETS[name], tokenizer),
        )
        for part in parts
    ]


def score(prediction: str, references: Sequence[str], dataset: Dataset) -> float:
    """Score of an answer against the reference nearest to it, in percent."""
    if dataset.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return 100 * max(dataset.score(prediction, reference) for reference in references)


def digest(folder: Path, name: str) -> str:
    """Names the content of a data set's file."""
    return hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()[:16]


def _example(prompt: str, tokenizer: Tokenizer, most_tokens: int | None) -> Example:
    ids = tokenizer.encode(prompt).astype(np.int32)
    if most_tokens is not None and len(ids) > most_tokens:
        half = most_tokens // 2
        ids = np.concatenate([ids[:half], ids[len(ids) - half :]])
    separator = np.array([tokenizer.separator_id], np.int32)
    return Example(np.concatenate([separator, ids]), np.zeros(0, np.int32), expected="")


def _rounded_up(length: int) -> int:
    """To a multiple of an eighth of the power of two above: few lengths, each of which a method may compile for."""
    step = max(1, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _measure(
    questions: Sequence[Question], dataset: Dataset, tokenizer: Tokenizer, model: LanguageModel, reading: Reading
) -> Result:
    examples = [question.example for question in questions]
    said = answers(model, examples, tokenizer, reading, max_new_tokens=dataset.max_new_tokens)
    scores: list[Any] = [score(text, q.answers, dataset) for text, q in zip(said, questions, strict=True)]
    return {"values": scores, "answers": said}
