"""From which length on one operator is faster than another."""

from __future__ import annotations

import math
from collections.abc import Mapping


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
