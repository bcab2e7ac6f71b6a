"""The arguments every implementation of the gated norm receives, validated."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Inputs(NamedTuple):
    """Arrays of one call.

    An implementation is a function ``gated_rms_norm(inputs, *, groups, epsilon) -> (y,)``, ``y`` like ``x``. Arrays
    keep the dtypes of the caller.
    """

    x: Float[Array, "batch length heads head_dim"]
    z: Float[Array, "batch length heads head_dim"]
    weight: Float[Array, "heads head_dim"]

    @property
    def real_dtype(self) -> jnp.dtype:
        """Of everything between input and output: float32, and float64 for float64 ``x``."""
        return jnp.promote_types(self.x.dtype, jnp.float32)
