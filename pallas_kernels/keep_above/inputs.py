"""The arguments every implementation receives, validated."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Inputs(NamedTuple):
    """Arrays of one call; an implementation is a function ``keep_above(inputs, *, fill) -> (y,)``, ``y`` like ``x``."""

    x: Float[Array, "batch length channels"]
    thresholds: Float[Array, "rows channels"]
    """In the dtype of ``x``."""
    row: Int[Array, "batch length"] | None = None
    """Which of the thresholds' rows holds for each token; None where there is one row."""
