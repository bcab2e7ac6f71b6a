"""What the kernels need of every head and token besides matrices: decays, and after the backward kernels their slopes.

It is a number a token where the kernels move 64 or more, and it is left to XLA.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.elementwise import LOG2_E
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK

LOWEST = -160.0
"""Least logarithm to base 2 of a decay: two to this power is zero in float32."""
_LEAST_STEP_SIZE = 1e-30
"""Stands for step sizes of zero, which have no logarithm; what it lets through is nothing in float32."""

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


def pack(delta: _Tokens, log_decay: _Tokens) -> Float[Array, "batch heads chunks 3 64"]:
    """Puts together what the kernels load of every token.

    Args:
        delta: step sizes.
        log_decay: natural logarithms of what each token leaves of the state before it.

    Returns:
        "total", the sum of the logarithms to base 2 of the decays from the first token of the chunk to this one;
        "offset", such that 2^(total[t] - offset[s]) is what is left at token t of what token s added, its step size
        included; and the step size.
    """
    delta = jnp.maximum(delta, _LEAST_STEP_SIZE)
    total = _cumulative(jnp.maximum(log_decay * LOG2_E, LOWEST))
    return jnp.stack([total, total - jnp.log2(delta), delta], axis=3)


def _cumulative(log_decay: _Tokens) -> _Tokens:
    """Sums over the tokens of a chunk, rounded once.

    Behind tokens that forget everything a sum is large, and the rounding of its terms would add up. So each number is
    cut in two, one of them such that its sums are exact, the other small.
    """
    unit = 2.0 ** (math.ceil(math.log2(-LOWEST * CHUNK)) - jnp.finfo(jnp.float32).nmant)
    coarse = jnp.round(log_decay / unit) * unit
    return _sum_up_to(coarse) + _sum_up_to(log_decay - coarse)


def _sum_up_to(numbers: _Tokens) -> _Tokens:
    # A product with a triangle of ones: XLA's cumulative sums take several kernels.
    ones = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    return jnp.einsum("bhcs,st->bhct", numbers, ones, precision=jax.lax.Precision.HIGHEST)


def gradients(slopes: Slopes, packed: Float[Array, "batch heads chunks 3 64"]) -> tuple[_Tokens, _Tokens]:
    """Gradients of ``delta`` and ``log_decay``.

    A decay multiplies what passes through it: from tokens of its chunk before it, or from the state before the chunk,
    to outputs of its chunk from it on, or to the state after the chunk. Each of the four is added up by itself. (The
    whole is also a cumulative sum of what outputs owe to states less what these owe to inputs, but that one loses its
    digits wherever little passes.)
    """
    total, delta = packed[:, :, :, 0], packed[:, :, :, 2]
    to_end = delta * slopes.to_end
    across = jnp.exp2(total[..., -1]) * jnp.sum(slopes.across, axis=-1)
    from_start = jnp.flip(_sum_up_to(jnp.flip(slopes.from_start, -1)), -1)
    dlog_decay = slopes.within + from_start + (_sum_up_to(to_end) - to_end) + across[..., None]
    ddelta = slopes.to_end + slopes.to_outputs / delta
    return ddelta, dlog_decay
