"""Gradients of the step sizes and decays, a number a token, out of what the backward kernel found; left to XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK, OWN_WEIGHT

_Tokens = Float[Array, "batch heads chunks 64"]


class Slopes(NamedTuple):
    """What the backward kernel finds out about each token of a head, to make the gradients of its decay out of."""

    within: _Tokens
    """What passes through the token's decay from tokens of the chunk before it to outputs from it on."""
    from_start: _Tokens
    """What the token's output owes to the state before the chunk."""
    to_end: _Tokens
    """What the state after the chunk owes to the token, for each unit of its step size."""
    to_outputs: _Tokens
    """What outputs of the chunk owe to the token."""
    across: _Tokens
    """Its sum over the chunk is what the state after the chunk owes to the one before, but for the decay between."""
    own: _Tokens | None = None
    """What the token's own outputs owe to it, where it has an own weight."""


def names(*, own_weights: bool) -> tuple[str, ...]:
    """The fields of ``Slopes`` that are there."""
    return Slopes._fields if own_weights else Slopes._fields[:-1]


def gradients(slopes: Slopes, tokens: Float[Array, "batch heads chunks rows 64"]) -> dict[str, _Tokens]:
    """Gradients of the arguments of ``tokens.pack``.

    A decay multiplies what passes through it: from tokens of its chunk before it, or from the state before the chunk,
    to outputs of its chunk from it on, or to the state after the chunk. Each of the four is added up by itself. (The
    whole is also a cumulative sum of what outputs owe to states less what these owe to inputs, but that one loses its
    digits wherever little passes.)
    """
    total, delta = tokens[:, :, :, 0], tokens[:, :, :, 2]
    to_end = delta * slopes.to_end
    across = jnp.exp2(total[..., -1]) * jnp.sum(slopes.across, axis=-1)
    up_to = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    # The sum from each token on, and that before it. As a product XLA has one kernel for both.
    both = jnp.concatenate([slopes.from_start, to_end], axis=-1)
    sums = jnp.concatenate([up_to.T, up_to - jnp.eye(CHUNK, dtype=jnp.float32)])
    from_here_and_before = jnp.einsum("bhcs,st->bhct", both, sums, precision=jax.lax.Precision.HIGHEST)
    dlog_decay = slopes.within + from_here_and_before + across[..., None]
    if slopes.own is None:
        return {"delta": slopes.to_end + slopes.to_outputs / delta, "log_decay": dlog_decay}
    return {
        "delta": slopes.to_end + (slopes.to_outputs - slopes.own) / delta,
        "log_decay": dlog_decay,
        "own_weight": slopes.own / tokens[:, :, :, OWN_WEIGHT],
    }
