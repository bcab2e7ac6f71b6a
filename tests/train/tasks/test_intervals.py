"""Intervals against SciPy's and against repeated experiments."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from train.tasks.intervals import bootstrap, wilson


@pytest.mark.parametrize(("successes", "tries"), [(0, 20), (1, 20), (10, 20), (20, 20), (3, 7), (731, 1000)])
def test_wilson_intervals_are_scipy_s(successes, tries):
    expected = scipy.stats.binomtest(successes, tries).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(successes, tries), (expected.low, expected.high), atol=1e-12)


def test_bootstrap_intervals_hold_the_mean_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    held = 0
    for i in range(200):
        low, high = bootstrap(random.exponential(2.0, size=50).tolist(), seed=i)
        held += low <= 2.0 <= high
    assert 0.88 < held / 200 < 0.98


def test_bootstrap_intervals_of_many_values_are_the_normal_ones():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    reach = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    np.testing.assert_allclose(bootstrap(values.tolist()), (values.mean() - reach, values.mean() + reach), atol=0.01)


def test_what_has_no_interval_is_refused():
    for successes, tries in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(successes, tries)
    with pytest.raises(ValueError, match="no mean"):
        bootstrap([])
