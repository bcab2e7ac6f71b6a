"""Kernel that adds up each head's angles over the tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int16

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, plgpu, register_tile, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu.turning import FULL_TURN
from pallas_kernels.trapezoidal_ssd.rotation import cumulative_angle, total_angle

PAIRS_UNIT = LANES
"""Angles of a token and head are a multiple of this, the rest zero."""

_TILE = register_tile([(WARPS, LANES), (1, LANES), (1, 1)], warp_dims=(-6,), lane_dims=(-3,), vector_dim=-1)
"""A head a warp, a pair a lane."""

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
    batch, length, heads = step_size.shape
    chunks = -(-length // tokens)
    padded_heads, pairs = -(-heads // WARPS) * WARPS, -(-theta.shape[2] // PAIRS_UNIT) * PAIRS_UNIT

    def cut(array: jax.Array, size: int) -> jax.Array:
        padding = ((0, 0), (0, chunks * tokens - length), (0, size - array.shape[2]))
        return jnp.pad(array, padding).reshape(batch, chunks, tokens, size)

    inputs = {"step_size": cut(step_size, padded_heads), "theta": cut(theta, pairs)}
    increments = inputs["step_size"][..., None] * inputs["theta"][:, :, :, None]
    # A matrix product would be faster, and lose the digits that whole turns push out.
    of_chunks = total_angle(jnp.moveaxis(increments, 2, 1))
    inputs["start"] = jnp.pad(cumulative_angle(of_chunks)[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    outputs = {"angles": jax.ShapeDtypeStruct((batch, padded_heads, chunks, tokens, pairs), jnp.int16)}
    blocks_of_pairs, together = pairs // LANES, min(tokens, _TOGETHER)

    def angles(gmem: Refs, smem: Refs) -> None:
        del smem
        batch, chunk, place = (lax.axis_index(name) for name in ("batch", "chunk", "place"))
        heads = pl.ds(place // blocks_of_pairs * WARPS, WARPS)
        pairs = pl.ds(lax.rem(place, blocks_of_pairs) * LANES, LANES)

        def spread(ref: Any, dim: int) -> jax.Array:
            numbers = plgpu.load(ref, layout=_TILE.reduce(1 - dim), optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (WARPS, LANES), (dim,)), _TILE)

        def step(i: Any, angle: jax.Array) -> jax.Array:
            times = [i * together + j for j in range(together)]
            increments = [
                spread(gmem["step_size"].at[batch, chunk, t, heads], 0)
                * spread(gmem["theta"].at[batch, chunk, t, pairs], 1)
                for t in times
            ]
            for t, increment in zip(times, increments, strict=True):
                # Whole turns do not matter, and without them the sum is as precise as its terms.
                angle = angle + (increment - 2.0 * (0.5 * increment).astype(jnp.int32).astype(jnp.float32))
                fixed = ((start + angle) * (FULL_TURN / 2)).astype(jnp.int32).astype(jnp.int16)
                store(gmem["angles"].at[batch, heads, chunk, t, pairs], fixed)
            return angle

        start = plgpu.load(gmem["start"].at[batch, chunk, heads, pairs], layout=_TILE, optimized=False)
        zeros = plgpu.layout_cast(jnp.zeros((WARPS, LANES), jnp.float32), _TILE)
        lax.fori_loop(0, tokens // together, step, zeros)

    grid = {"batch": batch, "chunk": chunks, "place": padded_heads // WARPS * blocks_of_pairs}
    return launch("trapezoidal_ssd", angles, inputs, outputs, {}, grid)["angles"]
