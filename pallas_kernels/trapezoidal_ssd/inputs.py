"""The arguments every implementation of the trapezoidal SSD operator receives, validated and in one canonical form."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sharding import vary_like


class State(NamedTuple):
    """What is known of the tokens before, in float32 (float64 for float64 inputs).

    The state itself rotates, so there is no angle that would have to be remembered.
    """

    ssm: Float[Array, "batch heads head_dim state"]
    """State h after the last token."""
    B: Float[Array, "batch heads rank state"]
    """Input matrices of the last token, after the bias."""
    x: Float[Array, "batch heads head_dim"]
    """Input of the last token."""


class Inputs(NamedTuple):
    """Arrays of one call; optional ones are None when absent.

    An implementation is a function ``trapezoidal_ssd(inputs, *, delta_softplus, norm_epsilon, chunk_size) -> (y, ssm,
    B, x)``: ``y`` like ``x``, then the parts of the final ``State``. What changes with every token keeps the
    dtype of the caller.
    """

    x: Float[Array, "batch length heads head_dim"]
    delta: Float[Array, "batch length heads"]
    A: Float[Array, "batch length heads"]
    B: Float[Array, "batch length groups rank state"]
    """Head h belongs to group h // (heads // groups)."""
    C: Float[Array, "batch length groups rank state"]
    lambda_: Float[Array, "batch length heads"]
    theta: Float[Array, "batch length pairs"]
    z: Float[Array, "batch length heads head_dim"] | None
    D: Float[Array, "heads head_dim"] | None
    """One a channel, repeated where the caller gave one a head. This and what follows is in ``real_dtype``."""
    delta_bias: Float[Array, " heads"] | None
    B_bias: Float[Array, "heads rank state"] | None
    C_bias: Float[Array, "heads rank state"] | None
    mimo_x: Float[Array, "heads rank head_dim"] | None
    mimo_z: Float[Array, "heads rank head_dim"] | None
    mimo_o: Float[Array, "heads rank head_dim"] | None
    norm_weight: Float[Array, "heads head_dim"] | None
    segment_ids: Int[Array, "batch length"] | None
    initial_ssm: Float[Array, "batch heads head_dim state"] | None
    """The parts of the state before the first token, which continues them whatever its segment id: all or none."""
    initial_B: Float[Array, "batch heads rank state"] | None
    initial_x: Float[Array, "batch heads head_dim"] | None

    @property
    def real_dtype(self) -> jnp.dtype:
        """Of the state and of sums: float32, and float64 for float64 inputs."""
        return jnp.promote_types(self.x.dtype, jnp.float32)

    def initial_state(self) -> State:
        """Returns the state before the first token: zero where none is given."""
        if self.initial_ssm is not None and self.initial_B is not None and self.initial_x is not None:
            return State(self.initial_ssm, self.initial_B, self.initial_x)
        (batch, _, heads, head_dim), (rank, state) = self.x.shape, self.B.shape[3:]
        shapes = ((batch, heads, head_dim, state), (batch, heads, rank, state), (batch, heads, head_dim))
        return State(*(vary_like(jnp.zeros(shape, self.real_dtype), self.x) for shape in shapes))

    def step_sizes(self, *, delta_softplus: bool) -> Float[Array, "batch length heads"]:
        """Returns delta after bias and softplus, in ``real_dtype``."""
        delta = self.delta.astype(self.real_dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias
        return jax.nn.softplus(delta) if delta_softplus else delta
