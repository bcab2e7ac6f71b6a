"""Whether a text holds a good part of some sequence, wherever in it: by hashes, without keeping the sequence."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Integer, UInt64

LONGEST_RUN = 1024
"""Tokens in common that are found however long the sequences are; more than the header of a licence, even as bytes."""

_WINDOWS_A_RUN = 8
"""A window begins this many times a run, so that each run holds a whole one."""

_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


def run_length(sequence_length: int) -> int:
    """Consecutive tokens that are a good part of a sequence: half of it, at most LONGEST_RUN."""
    return max(1, min(sequence_length // 2, LONGEST_RUN))


def excerpts(sequences: Iterable[Integer[np.ndarray, " _"]], sequence_length: int) -> list[UInt64[np.ndarray, " _"]]:
    """Hashes by which parts of each sequence are found again.

    Args:
        sequences: tokens, of documents one after the other, without separators between them.
        sequence_length: tokens that a sequence has with separators.
    """
    window, stride = _window(sequence_length)
    return [window_hashes(sequence, window)[::stride] for sequence in sequences]


def found(
    hashes: UInt64[np.ndarray, " windows"], pieces: Iterable[Integer[np.ndarray, " _"]], sequence_length: int
) -> Bool[np.ndarray, " windows"]:
    """Marks the hashes of ``excerpts`` whose windows a text holds.

    At least one, where it holds ``run_length`` consecutive tokens of a sequence; none, where it holds fewer than 7/8 of
    them. Linear in the text, in memory that its length does not decide: 20 million tokens a second on one core.

    Args:
        hashes: of any sequences.
        pieces: the text in its order, cut anywhere, best into some ten thousand tokens each; without separators.
        sequence_length: as given to ``excerpts``.
    """
    window, _ = _window(sequence_length)
    sought, places = np.unique(hashes, return_inverse=True)
    marks = np.zeros(len(sought), np.bool_)
    before = np.zeros(0, np.int64)
    for piece in pieces:
        tokens = np.concatenate([before, piece])
        if len(sought):
            of_text = window_hashes(tokens, window)
            nearest = np.searchsorted(sought[:-1], of_text)
            marks[nearest[sought[nearest] == of_text]] = True
        before = tokens[max(0, len(tokens) - window + 1) :]
    return marks[places]


def window_hashes(tokens: Integer[np.ndarray, " tokens"], window: int) -> UInt64[np.ndarray, " windows"]:
    """A hash of each ``window`` consecutive tokens, by where they begin: 64 bits that depend on all of them.

    Hashes of twice as many tokens are made from two of neighbours, so it takes log2(window) passes.
    """
    if len(tokens) < window:
        return np.zeros(0, np.uint64)
    hashes, reach = _scrambled(tokens.astype(np.uint64) + np.uint64(1)), 1
    while reach < window:
        shift = min(reach, window - reach)  # the last two may overlap
        hashes = _scrambled(hashes[:-shift] * _ODD + hashes[shift:])
        reach += shift
    return hashes


def _window(sequence_length: int) -> tuple[int, int]:
    """Tokens of a window, and from one to the next of a sequence: any run of ``run_length`` has a whole one."""
    run = run_length(sequence_length)
    stride = max(1, run // _WINDOWS_A_RUN)
    return run - stride + 1, stride


def _scrambled(x: UInt64[np.ndarray, " numbers"]) -> UInt64[np.ndarray, " numbers"]:
    """A bijection of 64 bits in which the high bits move the low ones and the other way round."""
    x = (x ^ (x >> _HALF)) * _ODD
    return x ^ (x >> _HALF)
