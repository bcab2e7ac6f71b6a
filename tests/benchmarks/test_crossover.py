"""Where one curve of times passes below another."""

from __future__ import annotations

import pytest

from benchmarks.crossover import crossover


def test_power_laws_cross_where_they_are_equal():
    # 3 n and n² / 100 are equal at n = 300, between two of the lengths.
    lengths = [64, 128, 256, 512, 1024]
    linear, quadratic = {n: 3.0 * n for n in lengths}, {n: n * n / 100 for n in lengths}
    assert crossover(linear, quadratic) == pytest.approx(300)


def test_the_last_crossing_counts():
    assert crossover({1: 1.0, 2: 4.0, 4: 1.0}, {1: 2.0, 2: 2.0, 4: 2.0}) == pytest.approx(8**0.5)


def test_always_faster_is_from_the_first_common_length_on():
    assert crossover({1: 9.0, 2: 1.0, 4: 1.0}, {2: 2.0, 4: 2.0, 8: 0.1}) == 2


def test_slower_at_the_end_is_never():
    assert crossover({1: 1.0, 2: 3.0}, {1: 2.0, 2: 2.0}) is None
    assert crossover({1: 1.0}, {2: 2.0}) is None
