"""What the other kernels need of every head and token besides matrices, and the kernel that puts it together."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.elementwise import LOG2_E
from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, plgpu, register_tile, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK, TOKEN_ROWS

LOWEST = -160.0
"""Least logarithm to base 2 of a decay: two to this power is zero in float32."""
_LEAST_STEP_SIZE = 1e-30
"""Stands for step sizes of zero, which have no logarithm; what it lets through is nothing in float32."""

HEADS = LANES
"""Heads of a block, a lane each; its warps take a quarter of the chunk each."""
STEPS = CHUNK // WARPS
PITCH = HEADS + 4
"""Of rows in shared memory: eight pieces of 16 bytes below each other, which `ldmatrix` and `stmatrix` move at once,
lie in all banks, and each begins at a multiple of 16 bytes."""

BY_HEAD = register_tile([(WARPS, HEADS), (1, HEADS), (1, 1)], warp_dims=(-6,), lane_dims=(-3,), vector_dim=-1)
BY_TOKEN = register_tile(
    [(HEADS, WARPS, STEPS), (HEADS // WARPS, WARPS, STEPS), (4, 1, 8), (1, 1, 1)],
    warp_dims=(-12,),
    lane_dims=(-4, -6),
    vector_dim=-1,
)
"""A warp has a quarter of the heads; its lanes four heads and eight tokens at once, as these instructions have them."""

_Sum = tuple[jax.Array, jax.Array]
"""A number and what its rounding took."""


def padded_heads(heads: int) -> int:
    """At least these heads, in whole blocks."""
    return -(-heads // HEADS) * HEADS


def pack(
    delta: Float[Array, "batch length heads"],
    log_decay: Float[Array, "batch length heads"],
    own_weight: Float[Array, "batch length heads"] | None = None,
) -> Float[Array, "batch padded_heads chunks rows 64"]:
    """Puts together what the kernels load of every token.

    Args:
        delta: step sizes.
        log_decay: natural logarithms of what each token leaves of the state before it.
        own_weight: what stands for the step size where a token's input enters the token's own output; None for the
            step size.

    Returns:
        For whole chunks, and at least these heads: "total", the sum of the logarithms to base 2 of the decays from the
        first token of the chunk to this one; "offset", such that 2^(total[t] - offset[s]) is what is left at token t
        of what token s added, its step size included; the step size; and the own weight, if given. Tokens after the end
        change nothing.
    """
    batch, length, heads = delta.shape
    length, heads = -(-length // CHUNK) * CHUNK, padded_heads(heads)

    def cut(array: jax.Array) -> jax.Array:
        padding = [(0, wanted - size) for wanted, size in zip((batch, length, heads), array.shape, strict=True)]
        return jnp.pad(array, padding).reshape(batch, length // CHUNK, WARPS, STEPS, heads)

    inputs = {
        "delta": jnp.maximum(cut(delta), _LEAST_STEP_SIZE),
        "log_decay": jnp.maximum(cut(log_decay) * LOG2_E, LOWEST),
    }
    if own_weight is not None:
        inputs["own_weight"] = jnp.maximum(cut(own_weight), _LEAST_STEP_SIZE)
    token_rows = TOKEN_ROWS + (own_weight is not None)
    outputs = {"tokens": jax.ShapeDtypeStruct((batch, heads, length // CHUNK, token_rows, WARPS, STEPS), jnp.float32)}
    scratch = {
        "rows": plgpu.SMEM((len(inputs), WARPS, STEPS, PITCH), jnp.float32),
        "ends": plgpu.SMEM((2, WARPS, PITCH), jnp.float32),
    }

    def pack_tokens(gmem: Refs, smem: Refs) -> None:
        batch, chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        heads = pl.ds(lax.axis_index("heads") * HEADS, HEADS)

        def step(name: str, i: Any) -> jax.Array:
            return plgpu.load(gmem[name].at[batch, chunk, :, i, heads], layout=BY_HEAD, optimized=False)

        # All loads before anything that waits for one.
        log_decays, deltas = ([step(name, i) for i in range(STEPS)] for name in ("log_decay", "delta"))
        own_weights = [] if own_weight is None else [step("own_weight", i) for i in range(STEPS)]

        # First the sum of each warp's tokens, then cumulative sums that start with those of the warps before.
        zeros = plgpu.layout_cast(jnp.zeros((WARPS, HEADS), jnp.float32), BY_HEAD)
        end = functools.reduce(_add, log_decays, (zeros, zeros))
        for ref, part in zip((smem["ends"].at[0], smem["ends"].at[1]), end, strict=True):
            store(ref.at[:, :HEADS], part)
        synchronize()
        total = (zeros, zeros)
        warp = plgpu.broadcasted_iota(jnp.int32, (WARPS, HEADS), 0, layout=BY_HEAD)
        for before in range(WARPS - 1):
            parts = []
            for i in range(2):
                row = plgpu.load(smem["ends"].at[i, before, :HEADS], layout=BY_HEAD.reduce(0), optimized=False)
                row = plgpu.layout_cast(lax.broadcast_in_dim(row, (WARPS, HEADS), (1,)), BY_HEAD)
                parts.append(jnp.where(warp > before, row, 0.0))
            high, low = _add(total, parts[0])
            total = high, low + parts[1]

        for i, (log_decay, delta) in enumerate(zip(log_decays, deltas, strict=True)):
            total = _add(total, log_decay)
            store(smem["rows"].at[0, :, i, :HEADS], total[0] + total[1])
            store(smem["rows"].at[1, :, i, :HEADS], delta)
            if own_weight is not None:
                store(smem["rows"].at[2, :, i, :HEADS], own_weights[i])
        synchronize()
        totals, deltas, *own_weights = (
            plgpu.load(smem["rows"].at[i, :, :, :HEADS].transpose((2, 0, 1)), layout=BY_TOKEN, optimized=False)
            for i in range(len(inputs))
        )
        target = gmem["tokens"].at[batch, heads, chunk]
        for row, value in enumerate((totals, totals - jnp.log2(deltas), deltas, *own_weights)):
            store(target.at[:, row], value)

    grid = {"batch": batch, "chunk": length // CHUNK, "heads": heads // HEADS}
    tokens = launch("ssd", pack_tokens, inputs, outputs, scratch, grid)["tokens"]
    return tokens.reshape(batch, heads, length // CHUNK, token_rows, CHUNK)


def _add(total: _Sum, number: jax.Array) -> _Sum:
    """Adds a number, and keeps what the rounding takes (Knuth): behind tokens that forget everything sums are large."""
    high, low = total
    new = high + number
    taken = new - high
    return new, low + ((high - (new - taken)) + (number - taken))
