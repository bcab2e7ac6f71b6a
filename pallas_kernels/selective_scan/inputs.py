"""The arguments every implementation of the selective scan receives, validated and in one canonical form."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact, Int


class Inputs(NamedTuple):
    """Arrays of one selective scan; optional ones are None when absent.

    An implementation is a function ``selective_scan(inputs, *, delta_softplus) -> (y, final_state)``: ``y`` like
    ``x``, ``final_state`` like ``initial_state`` and always returned. Arrays keep the dtypes of the caller.
    """

    x: Float[Array, "batch length channels"]
    delta: Float[Array, "batch length channels"]
    A: Inexact[Array, "channels state"]
    """Real, or complex for a complex state."""
    B: Inexact[Array, "batch length groups state"]
    """Channel c belongs to group c // (channels // groups). Complex only where A is; the same for C."""
    C: Inexact[Array, "batch length groups state"]
    D: Float[Array, " channels"] | None = None
    z: Float[Array, "batch length channels"] | None = None
    delta_bias: Float[Array, " channels"] | None = None
    segment_ids: Int[Array, "batch length"] | None = None
    initial_state: Float[Array, "batch channels state"] | Complex[Array, "batch channels state"] | None = None
    """In ``state_dtype``. The first token continues it, whatever its segment id."""

    @property
    def real_dtype(self) -> jnp.dtype:
        """Of real intermediate values: float32, and float64 for float64 inputs."""
        return jnp.promote_types(self.x.dtype, jnp.float32)

    @property
    def state_dtype(self) -> jnp.dtype:
        """Of the state: ``real_dtype``, or the complex one of the same precision for complex A."""
        if jnp.iscomplexobj(self.A):
            return jnp.promote_types(self.real_dtype, jnp.complex64)
        return self.real_dtype

    def step_sizes(self, *, delta_softplus: bool) -> Float[Array, "batch length channels"]:
        """Returns delta after bias and softplus, in ``real_dtype``."""
        delta = self.delta.astype(self.real_dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias
        return jax.nn.softplus(delta) if delta_softplus else delta
