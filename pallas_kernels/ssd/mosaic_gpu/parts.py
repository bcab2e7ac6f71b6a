"""Joining parts of the sequence that were walked at the same time, each from a state of zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def starts(
    ends: Float[Array, "batch parts heads head_dim state"],
    outside: Float[Array, "batch heads head_dim state"],
    log_decay: Float[Array, "batch parts heads"],
    *,
    reverse: bool,
) -> Float[Array, "batch parts heads head_dim state"]:
    """Returns the state before each part, or its gradient after each part.

    Args:
        ends: what each part makes of a state of zero.
        outside: the state before the first part; in reverse, its gradient after the last one.
        log_decay: logarithm to base 2 of what a part leaves of the state before it.
        reverse: whether parts hand over to those before them.
    """
    if reverse:
        flipped = starts(jnp.flip(ends, 1), outside, jnp.flip(log_decay, 1), reverse=False)
        return jnp.flip(flipped, 1)
    num_parts = ends.shape[1]
    # Source 0 is from outside, source s is part s - 1, and part r receives it through all parts from s to r - 1. What
    # is between is added up for every pair, since differences of cumulative sums are not precise.
    part, source, through = (jnp.arange(num_parts).reshape(dims) for dims in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    between = jnp.where((source <= through) & (through < part), 1.0, 0.0)
    weights = jnp.exp2(jnp.einsum("rst,bth->brsh", between, log_decay, precision=jax.lax.Precision.HIGHEST))
    weights = jnp.where((source <= part)[None], weights, 0.0)
    sources = jnp.concatenate([outside[:, None], ends[:, :-1]], axis=1)
    return jnp.einsum("brsh,bshpn->brhpn", weights, sources, precision=jax.lax.Precision.HIGHEST)
