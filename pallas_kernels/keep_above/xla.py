"""The operator as it is defined. XLA makes one loop of it, and looks the rows up inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.keep_above.inputs import Inputs


def unsupported_reason(inputs: Inputs, *, fill: float) -> str | None:
    """Runs everywhere."""
    del inputs, fill


def keep_above(inputs: Inputs, *, fill: float) -> tuple[jax.Array]:
    """Computes y; see ``Inputs``."""
    x, thresholds, row = inputs
    if row is not None:
        thresholds = thresholds.at[row].get(mode="promise_in_bounds")
    return (jnp.where(x <= thresholds, jnp.asarray(fill, x.dtype), x),)
