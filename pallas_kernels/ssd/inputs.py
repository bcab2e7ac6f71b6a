"""The arguments every implementation of the SSD operator receives, validated and in one canonical form."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Inputs(NamedTuple):
    """Arrays of one call; optional ones are None when absent.

    An implementation is a function ``ssd(inputs, *, delta_softplus, delta_limit, chunk_size) -> (y, final_state)``:
    ``y`` like ``x``, ``final_state`` like ``initial_state`` and always returned. Arrays keep the dtypes of the caller.
    """

    x: Float[Array, "batch length heads head_dim"]
    delta: Float[Array, "batch length heads"]
    A: Float[Array, " heads"]
    B: Float[Array, "batch length groups state"]
    """Head h belongs to group h // (heads // groups)."""
    C: Float[Array, "batch length groups state"]
    D: Float[Array, "heads head_dim"] | None = None
    """One a channel, repeated where the caller gave one a head."""
    z: Float[Array, "batch length heads head_dim"] | None = None
    delta_bias: Float[Array, " heads"] | None = None
    segment_ids: Int[Array, "batch length"] | None = None
    initial_state: Float[Array, "batch heads head_dim state"] | None = None
    """In ``real_dtype``. The first token continues it, whatever its segment id."""

    @property
    def real_dtype(self) -> jnp.dtype:
        """Of the state and of sums: float32, and float64 for float64 inputs."""
        return jnp.promote_types(self.x.dtype, jnp.float32)

    def step_sizes(
        self, *, delta_softplus: bool, delta_limit: tuple[float, float]
    ) -> Float[Array, "batch length heads"]:
        """Returns delta after bias, softplus and limits, in ``real_dtype``."""
        delta = self.delta.astype(self.real_dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias.astype(self.real_dtype)
        if delta_softplus:
            delta = jax.nn.softplus(delta)
        return jnp.clip(delta, *delta_limit)
