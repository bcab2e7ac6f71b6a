"""What the kernels need of every head and token besides matrices: decays, and after the backward kernels their slopes.

It is a number a token where the kernels move 64 or more, and it is left to XLA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def gradients(slopes: Mapping[str, _Tokens], packed: Float[Array, "batch heads chunks 3 64"]) -> tuple[_Tokens, _Tokens]:
    """Gradients of ``delta`` and ``log_decay`` out of what ``backward.scan`` returns.

    A decay at token t multiplies whatever passes from tokens s < t to tokens r >= t: within the chunk ("row" holds its
    sums over s for each r, "column" those over r for each s), from the state before the chunk (in "row" too), to the
    state after it ("to_end", by s), and from the former to the latter ("across"). Pairs within the chunk that lie on
    one side of t are in both sums, which are made of the same numbers, and cancel but for rounding in float32. The
    others are added up from the side where they belong, which no cancellation blurs.
    """
    total, _, delta = (packed[:, :, :, row] for row in range(3))
    to_end = delta * slopes["to_end"]
    across = jnp.exp2(total[..., -1]) * jnp.sum(slopes["across"], axis=-1)
    passing = slopes["row"] - slopes["column"]
    from_here = jnp.flip(_sum_up_to(jnp.flip(passing, -1)), -1)
    dlog_decay = from_here + (_sum_up_to(to_end) - to_end) + across[..., None]
    ddelta = slopes["to_end"] + slopes["column"] / delta
    return ddelta, dlog_decay
