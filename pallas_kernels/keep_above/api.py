"""Signature of the operator: what it accepts, and which implementation gets it."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.keep_above.inputs import Inputs
from pallas_kernels.validation import INTEGER, Checker

_TOKEN = ("batch", "length", "channels")
_INPUT_DIMS = {
    "x": _TOKEN,
    "thresholds": ("rows", "channels"),
    "row": ("batch", "length"),
}


def keep_above(
    x: Float[Array, "batch length channels"],
    thresholds: Float[Array, "rows channels"],
    row: Int[Array, "batch length"] | None = None,
    *,
    fill: float,
    implementation: str | None = None,
) -> Float[Array, "batch length channels"]:
    """Keeps every number above its threshold, to the last bit, and puts ``fill`` in place of the others.

    ``y[t] = fill if x[t] <= thresholds[row[t]] else x[t]``, for each channel: NaN is kept. So LongMamba leaves
    out small steps (equation 17). Differentiable in ``x``, in reverse mode; thresholds have no gradient.

    Args:
        x: input.
        thresholds: one or more rows of them, in ``x``'s dtype.
        row: number of the row that holds for a token, from 0 and below ``rows``, unchecked; None where there is one.
        fill: takes the place of what is left out.
        implementation: "mosaic_gpu" or "xla"; None takes the best that supports the call.

    Returns:
        y, in ``x``'s dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or there are several rows and no ``row``.
        UnsupportedError: the named implementation cannot run this call.
    """
    check = Checker("keep_above")
    inputs = Inputs(x, thresholds, row)
    check.arrays(inputs._asdict(), _INPUT_DIMS, {"row": INTEGER})
    if thresholds.dtype != x.dtype:
        raise check.error(f"thresholds must be {x.dtype} as x is, got {thresholds.dtype}")
    if row is None and len(thresholds) > 1:
        raise check.error(f"row must be given, since thresholds has {len(thresholds)} rows")
    (y,) = dispatch("keep_above", implementation, inputs, _INPUT_DIMS, (_TOKEN,), fill=fill)
    return y
