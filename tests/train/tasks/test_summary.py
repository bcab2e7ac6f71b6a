"""Cells put together are the cells' cases put together, whatever they were grouped by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.tasks.intervals import wilson
from train.tasks.plot import short
from train.tasks.prefill_scaling import straightness
from train.tasks.summary import mapped, pooled

CELLS = [
    ({"method": "a", "length": 1, "depth": 0.0}, {"correct": 3, "tries": 4}),
    ({"method": "a", "length": 1, "depth": 1.0}, {"correct": 0, "tries": 6}),
    ({"method": "a", "length": 2, "depth": 0.0}, {"correct": 4, "tries": 4}),
    ({"method": "b", "length": 1, "depth": 0.0}, {"correct": 1, "tries": 4}),
]


def test_shares_are_pooled_over_what_is_left_out():
    rows = pooled(CELLS, ("method", "length"))
    assert [(row["method"], row["length"], row["correct"], row["cases"]) for row in rows] == [
        ("a", 1, 3, 10),
        ("a", 2, 4, 4),
        ("b", 1, 1, 4),
    ]
    assert rows[0]["value"] == 0.3
    assert (rows[0]["low"], rows[0]["high"]) == wilson(3, 10)
    assert len(pooled(CELLS, ("method", "length", "depth"))) == 4


def test_means_are_of_all_values():
    cells = [({"length": 1}, {"values": [1.0, 2.0]}), ({"length": 1}, {"values": [6.0]})]
    (row,) = pooled(cells, ("length",))
    assert (row["value"], row["cases"]) == (3.0, 3)
    assert row["low"] < 3.0 < row["high"]
    (perplexity,) = mapped([row], math.exp)
    assert perplexity["high"] == pytest.approx(math.exp(row["high"]))


def test_a_straight_line_is_straight_and_a_parabola_is_not():
    positions = list(range(1, 65))
    assert straightness(positions, [3.0 * x + 1 for x in positions]) == pytest.approx(1.0)
    assert straightness(positions, [float(x**2) for x in positions]) < 0.95
    noise = np.random.default_rng(0).normal(size=64)
    assert straightness(positions, noise.tolist()) < 0.2


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1"), (1000, "1000"), (1024, "1K"), (1536, "1.5K"), (131072, "128K"), (1 << 20, "1M")]
)
def test_numbers_of_tokens_are_short(count, text):
    assert short(count) == text
