"""The arguments every implementation of the causal convolution receives, validated and in one canonical form."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Inputs(NamedTuple):
    """Arrays of one causal convolution; optional ones are None when absent.

    An implementation is a function ``causal_conv1d(inputs, *, activation) -> (y, final_state)``: ``y`` like ``x``,
    ``final_state`` like ``initial_state`` and always returned. Arrays keep the dtypes of the caller.
    """

    x: Float[Array, "batch length channels"]
    weight: Float[Array, "width channels"]
    bias: Float[Array, " channels"] | None = None
    segment_ids: Int[Array, "batch length"] | None = None
    initial_state: Float[Array, "batch taps_before channels"] | None = None
    """The inputs before ``x``, in its dtype. They are of the first token's segment, whatever its id."""

    @property
    def real_dtype(self) -> jnp.dtype:
        """Of the sum over the taps: float32, and float64 for float64 inputs."""
        return jnp.promote_types(self.x.dtype, jnp.float32)

    def extended(self) -> Float[Array, "batch extended_length channels"]:
        """Returns x behind the inputs before it: the initial state, or zeros."""
        width = self.weight.shape[0]
        if self.initial_state is None:
            return jnp.pad(self.x, ((0, 0), (width - 1, 0), (0, 0)))
        return jnp.concatenate([self.initial_state, self.x], axis=1)
