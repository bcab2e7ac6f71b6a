"""Confidence intervals of proportions and means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
"""Share of the intervals that hold the truth."""

_RESAMPLES = 2000


def wilson(successes: int, tries: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927), which stays within 0 and 1 and has a width even for all or none.

    Raises:
        ValueError: there was no try, or more successes than tries.
    """
    if not 0 <= successes <= tries or tries < 1:
        raise ValueError(f"{successes} successes of {tries} tries are no proportion.")
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = successes / tries
    center = (share + z**2 / (2 * tries)) / (1 + z**2 / tries)
    reach = z / (1 + z**2 / tries) * math.sqrt(share * (1 - share) / tries + z**2 / (4 * tries**2))
    return max(0.0, center - reach), min(1.0, center + reach)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of independent values: percentiles of the means of resamples (Efron 1979).

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no values have no mean.")
    drawn = np.random.default_rng(seed).choice(np.asarray(values, np.float64), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
