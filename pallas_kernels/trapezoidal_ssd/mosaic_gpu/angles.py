"""Kernels that add up each head's angles over the tokens: those of every chunk first, then those up to each token.

Sums are integers that overflow on purpose: whole turns do not matter, and a sum of any number of angles is as precise
as its terms.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int16

from pallas_kernels.batching import Arrays
from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, plgpu, register_tile, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu.turning import FULL_TURN

PAIRS_UNIT = LANES
"""Angles of a token and head are a multiple of this, the rest zero."""

_HALF_TURN = 2**23
"""Of the sums, as integers. A token turns by less than 256 half-turns, the most that a float32 knows the angle of."""
_SHIFT = (2 * _HALF_TURN // FULL_TURN).bit_length() - 1
"""Bits that results have less."""

_HEADS = 2 * WARPS
_TILE = register_tile([(_HEADS, LANES), (2, LANES), (1, 2)], warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1)
"""Two heads a warp and two pairs a lane, whose angles are stored together."""

_TOGETHER = 16
"""Tokens that are loaded before the first of their sums is stored: no load is waited for more often than that."""


def sums(
    step_size: Float[Array, "batch length heads"], theta: Float[Array, "batch length pairs"], tokens: int
) -> Int16[Array, "batch padded_heads chunks tokens padded_pairs"]:
    """Returns the angles from the start of the sequence to each token and with it, as numbers that wrap.

    Args:
        step_size: of each head.
        theta: half-turns for a step of size 1.
        tokens: of a chunk, a power of two.
    """
    length, heads = step_size.shape[1:]
    chunks = -(-length // tokens)
    padded_heads, pairs = -(-heads // _HEADS) * _HEADS, -(-theta.shape[2] // PAIRS_UNIT) * PAIRS_UNIT

    def cut(array: jax.Array, size: int) -> jax.Array:
        padding = ((0, 0), (0, chunks * tokens - length), (0, size - array.shape[2]))
        return jnp.pad(array, padding).reshape(-1, chunks, tokens, size)

    inputs = {"step_size": cut(step_size, padded_heads), "theta": cut(theta * _HALF_TURN, pairs)}
    totals = _walk(inputs)["totals"]
    return _walk(inputs | {"start": jnp.cumsum(totals, axis=1) - totals})["angles"]


def _walk(inputs: Arrays) -> Arrays:
    """Adds up the angles of each chunk: returns "totals", or where "start" is given "angles", which begin there."""
    batch, chunks, tokens, heads = inputs["step_size"].shape
    pairs = inputs["theta"].shape[3]
    blocks_of_pairs, together = pairs // LANES, min(tokens, _TOGETHER)
    if "start" in inputs:
        outputs = {"angles": jax.ShapeDtypeStruct((batch, heads, chunks, tokens, pairs), jnp.int16)}
    else:
        outputs = {"totals": jax.ShapeDtypeStruct((batch, chunks, heads, pairs), jnp.int32)}

    def angles(gmem: Refs, smem: Refs) -> None:
        del smem
        batch, chunk, place = (lax.axis_index(name) for name in ("batch", "chunk", "place"))
        heads = pl.ds(place // blocks_of_pairs * _HEADS, _HEADS)
        pairs = pl.ds(lax.rem(place, blocks_of_pairs) * LANES, LANES)

        def spread(ref: Any, dim: int) -> jax.Array:
            numbers = plgpu.load(ref, layout=_TILE.reduce(1 - dim), optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (_HEADS, LANES), (dim,)), _TILE)

        def step(i: Any, angle: jax.Array) -> jax.Array:
            times = [i * together + j for j in range(together)]
            terms = [
                spread(gmem["step_size"].at[batch, chunk, t, heads], 0)
                * spread(gmem["theta"].at[batch, chunk, t, pairs], 1)
                for t in times
            ]
            for t, term in zip(times, terms, strict=True):
                angle = angle + term.astype(jnp.int32)
                if "angles" in gmem:
                    rounded = lax.shift_right_arithmetic(angle + (1 << _SHIFT >> 1), _SHIFT)
                    store(gmem["angles"].at[batch, heads, chunk, t, pairs], rounded.astype(jnp.int16))
            return angle

        if "start" in gmem:
            start = plgpu.load(gmem["start"].at[batch, chunk, heads, pairs], layout=_TILE, optimized=False)
        else:
            start = plgpu.layout_cast(jnp.zeros((_HEADS, LANES), jnp.int32), _TILE)
        total = lax.fori_loop(0, tokens // together, step, start)
        if "totals" in gmem:
            store(gmem["totals"].at[batch, chunk, heads, pairs], total)

    grid = {"batch": batch, "chunk": chunks, "place": heads // _HEADS * blocks_of_pairs}
    return launch("trapezoidal_ssd", angles, inputs, outputs, {}, grid)
