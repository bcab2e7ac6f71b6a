"""Scores worked out by hand, and Rouge-L against its plain definition on random texts."""

from __future__ import annotations

import functools
import random
import sys
import types

import pytest

from train.errors import UserError
from train.tasks.scores import f1, rouge_l, rouge_l_chinese


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("it is in Paris, France", "Paris", 2 * (1 / 5) * 1 / (1 / 5 + 1)),
        ("a an the", "the", 0.0),  # nothing is left
        ("yes yes yes", "yes", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a word counts as often as both have it
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("don't know", "dont know", 1.0),
        ("theatre", "atre", 0.0),  # articles are words, not parts of words
    ],
)
def test_f1_is_that_of_words(prediction, reference, expected):
    assert f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # Lin (2004), section 3.2: of w1 … w5, the two sentences share w1 w2 and w1 w3 w5: four words of five, of the
        # eight different ones that they have.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * (4 / 5) * (4 / 8) / (4 / 5 + 4 / 8)),
        ("a a a a", "a", 1.0),  # words are counted once
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("a b", "c d", 0.0),
    ],
)
def test_rouge_l_is_that_of_summaries(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-7)


def _common(x: tuple, y: tuple) -> tuple:
    """A longest common subsequence, by its definition; of two as long, the one that upstream's walk comes to."""

    @functools.cache
    def length(i: int, j: int) -> int:
        if not i or not j:
            return 0
        return length(i - 1, j - 1) + 1 if x[i - 1] == y[j - 1] else max(length(i - 1, j), length(i, j - 1))

    def walk(i: int, j: int) -> tuple:
        if not i or not j:
            return ()
        if x[i - 1] == y[j - 1]:
            return (*walk(i - 1, j - 1), x[i - 1])
        return walk(i - 1, j) if length(i - 1, j) > length(i, j - 1) else walk(i, j - 1)

    return walk(len(x), len(y))


def test_rouge_l_of_random_texts_is_that_of_the_definition():
    source = random.Random(0)
    draw = lambda: "".join(source.choices(["a ", "b ", "c ", "d ", ". ", ".", "e ", " "], k=source.randint(0, 14)))  # noqa: E731
    for _ in range(500):
        said, expected = draw(), draw()
        said_sentences, sentences = (
            [tuple(" ".join(part.split()).split(" ")) for part in text.split(".") if part] for text in (said, expected)
        )
        score = 0.0
        if said_sentences and sentences:
            shared = set().union(*(_common(r, s) for r in sentences for s in said_sentences))
            precision = len(shared) / len(set().union(*said_sentences))
            recall = len(shared) / len(set().union(*sentences))
            score = 2 * precision * recall / (precision + recall + 1e-8)
        assert rouge_l(said, expected) == pytest.approx(score, abs=1e-12), (said, expected)


def test_chinese_is_cut_into_words_first(monkeypatch):
    cutter = types.ModuleType("jieba")
    cutter.cut = lambda text, cut_all: iter([text[i : i + 2] for i in range(0, len(text), 2)])
    monkeypatch.setitem(sys.modules, "jieba", cutter)
    # Of 会议 总结 内容 and 会议 内容, both shared words are in order.
    assert rouge_l_chinese("会议总结内容", "会议内容") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1), abs=1e-7)


def test_chinese_needs_its_own_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match=r"mamba-jax\[longbench\]"):
        rouge_l_chinese("会议", "会议")
