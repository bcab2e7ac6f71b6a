"""What parameters are drawn from, as far as the number of samples can tell."""

from __future__ import annotations

import numpy as np


def assert_uniform(samples, least: float, largest: float, *, rounding: float = 0.0) -> None:
    """Compares extremes with the bounds, and mean and standard deviation within four standard errors.

    Args:
        samples: numbers, hundreds or more.
        least: lower bound.
        largest: upper bound.
        rounding: absolute error of the samples, by which they may exceed the bounds.
    """
    samples = np.asarray(samples, np.float64).ravel()
    width = largest - least
    assert least - rounding <= samples.min() < least + 0.025 * width
    assert largest - 0.025 * width < samples.max() <= largest + rounding
    deviation = width / np.sqrt(12)
    # The fourth moment of a uniform distribution is 1.8 times the square of its variance.
    mean_error, deviation_error = deviation / np.sqrt(samples.size), deviation * np.sqrt(0.2 / samples.size)
    assert abs(samples.mean() - (least + largest) / 2) < 4 * mean_error
    assert abs(samples.std() - deviation) < 4 * deviation_error


def assert_log_uniform(samples, least: float, largest: float) -> None:
    """The same for the logarithms of float32 numbers that were computed with a relative error of 1e-4."""
    logarithms = np.log(np.asarray(samples, np.float64))
    assert_uniform(logarithms, np.log(least), np.log(largest), rounding=1e-4)
