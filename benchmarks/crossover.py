"""From which length on one operator is faster than another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.measure import Measurement
from benchmarks.operators import ATTENTION, OPERATORS
from benchmarks.plot import Series
from benchmarks.suites import DIRECTIONS


def crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Length from which on the first is faster.

    Args:
        ours: seconds by length.
        theirs: the same; only lengths that both have count.

    Returns:
        Between two lengths, where straight lines through the points cross on logarithmic axes. The shortest length
        where the first is faster everywhere; None where it is slower at the longest.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    leads = [math.log(theirs[length] / ours[length]) for length in lengths]
    if not lengths or leads[-1] <= 0:
        return None
    behind = [i for i, lead in enumerate(leads) if lead <= 0]
    if not behind:
        return float(lengths[0])
    last = behind[-1]
    share = leads[last] / (leads[last] - leads[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def crossovers(measurements: Sequence[Measurement]) -> dict[str, dict[str, float | None]]:
    """Lengths from which on operators are faster than attention: by "operator implementation", then by direction."""
    found: dict[str, dict[str, float | None]] = {}
    for direction in DIRECTIONS:
        series = times(measurements, "length", "length", direction, None)
        attention = [name for name in series if name.startswith(ATTENTION.name)]
        for name, points in series.items():
            operator = name.split()[0]
            if attention and operator in OPERATORS and OPERATORS[operator].has_state:
                found.setdefault(name, {})[direction] = crossover(points, series[attention[0]])
    return found


def times(measurements: Sequence[Measurement], suite: str, dim: str, direction: str, operator: str | None) -> Series:
    """Seconds by a dimension, for each "operator implementation" of a suite; of one operator, or of all."""
    series: dict[str, dict[int, float]] = {}
    for m in measurements:
        if m.suite == suite and m.direction == direction and operator in (None, m.operator):
            series.setdefault(f"{m.operator} {m.implementation}", {})[m.shape[dim]] = m.seconds
    return series
