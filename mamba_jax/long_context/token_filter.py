"""The extender that leaves out tokens with small steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba_jax import sharding
from mamba_jax.long_context.scaling import inverse_softplus, scaled_delta
from mamba_jax.mixers.selective import FROZEN
from pallas_kernels.keep_above import keep_above


class TokenFilter(nnx.Module):
    """delta -> 0 where delta <= g: the token neither decays the state nor enters it (eq. 17).

    What is kept passes to the last bit, or is multiplied by a scale.
    """

    A_scale = None

    def __init__(
        self,
        thresholds: Float[np.ndarray, "*repeats lengths channels"],
        *,
        scales: Float[np.ndarray, "*repeats lengths channels"] | None = None,
        last_positions: tuple[int, ...] = (),
    ):
        """Makes a filter.

        Args:
            thresholds: g of each of one or more spans of positions; 0 leaves none out.
            scales: factors of the step sizes that are kept; None and 1 leave them as they are.
            last_positions: last position of each span but the last, ascending.
        """
        # Compared before the softplus, where delta comes from, so that nothing that is kept is rounded.
        before_softplus = inverse_softplus(jnp.asarray(thresholds, jnp.float32))
        self.thresholds = nnx.data(jnp.where(thresholds > 0, before_softplus, -jnp.inf))
        self.scales = None if scales is None else nnx.data(jnp.asarray(scales, jnp.float32))
        self.last_positions = last_positions

    def __call__(
        self,
        delta: Float[Array, "batch length channels"],
        bias: Float[Array, " channels"],
        position: Int[Array, "batch length"],
    ) -> Float[Array, "batch length channels"]:
        span = self._spans(position)
        # The bias is taken from a table of few rows rather than added to each token. What is compared has no gradient,
        # and jax before 0.12 knows none of nextafter's.
        thresholds = _rounded_down(jax.lax.stop_gradient(self.thresholds - bias), delta.dtype)
        if self.scales is None:
            return keep_above(delta, thresholds, span, fill=FROZEN)
        # What XLA merges with the scaling.
        kept = keep_above(delta, thresholds, span, fill=FROZEN, implementation="xla")
        rows = sharding.out_sharding(*sharding.spec_of(delta))
        scale = self.scales if span is None else self.scales.at[span].get(mode="promise_in_bounds", out_sharding=rows)
        return jnp.where((kept == FROZEN) | (scale == 1), kept, scaled_delta(kept, bias, scale))

    def _spans(self, position: Int[Array, "batch length"]) -> Int[Array, "batch length"] | None:
        """Number of the span that each token's position is in; None where there is one."""
        if not self.last_positions:
            return None
        # Integers, made here: as an array of the module they would be parameters to whoever takes gradients.
        last_positions = np.array(self.last_positions, np.int32)
        # Behind a barrier, or XLA would merge the sum with what looks rows up, and count once a channel.
        return jax.lax.optimization_barrier(jnp.sum(position[..., None] > last_positions, axis=-1))


def _rounded_down(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The largest number of a dtype that is no larger: numbers of that dtype compare with it as they do with ``x``."""
    nearest = x.astype(dtype)
    return jnp.where(nearest > x, jnp.nextafter(nearest, jnp.asarray(-jnp.inf, dtype)), nearest)
