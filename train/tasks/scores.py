"""Scores of free text, equal to those of LongBench (Bai et al. 2023, arXiv:2308.14508), all from 0 to 1.

Its Rouge-L is that of the Python package ``rouge`` 1.0: over whole summaries, each word counted once.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(prediction: str, reference: str) -> float:
    """F1 of the words two texts share, as SQuAD counts them: lower case, without punctuation and articles."""
    said, expected = _words(prediction), _words(reference)
    shared = sum((Counter(said) & Counter(expected)).values())
    return 2 * shared / (len(said) + len(expected)) if shared else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of Rouge-L (Lin 2004) over summaries, sentences ending at full stops, words at white space.

    A sentence of the reference counts the words of its longest common subsequences with the sentences of the
    prediction, and no word counts twice in the summary: precision and recall are shares of different words. Upstream
    scores 0 where two sentences have a thousand words together, which is as deep as it can go; here nothing is.
    """
    said, expected = _sentences(prediction), _sentences(reference)
    if not said or not expected:
        return 0.0
    common = {word for sentence in expected for other in said for word in _common_subsequence(sentence, other)}
    precision = len(common) / len({word for sentence in said for word in sentence})
    recall = len(common) / len({word for sentence in expected for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_chinese(prediction: str, reference: str) -> float:
    """``rouge_l`` of Chinese, cut into words by jieba.

    Raises:
        UserError: jieba is not installed.
    """
    return rouge_l(_cut(prediction), _cut(reference))


def load_jieba() -> Any:
    """The module that cuts Chinese into words. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("jieba")
    except ImportError:
        raise UserError(
            "the data set vcsum is scored by words, and Chinese is cut into words by jieba: pip install "
            "'mamba-jax[longbench]', or name the other data sets with --datasets."
        ) from None


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; a sentence of white space alone is one empty word, as it is upstream."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(reference: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one upstream finds, which decides what other sentences add."""
    lengths = np.zeros((len(reference) + 1, len(other) + 1), np.int32)
    number = {word: i for i, word in enumerate(dict.fromkeys([*reference, *other]))}
    others = np.array([number[word] for word in other])
    for i, word in enumerate(reference, start=1):
        reached = np.maximum(lengths[i - 1, 1:], np.where(others == number[word], lengths[i - 1, :-1] + 1, 0))
        np.maximum.accumulate(reached, out=lengths[i, 1:])
    common, i, j = [], len(reference), len(other)
    while i and j:
        if reference[i - 1] == other[j - 1]:
            common.append(reference[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1, j] > lengths[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def _cut(text: str) -> str:
    return " ".join(load_jieba().cut(text, cut_all=False))
