"""Kernel that sums the gradients of every head's B or C: over heads for the group's, over a chunk for the bias's.

They are read once for both; XLA would read them twice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, plgpu, register_tile, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK, STATE_UNIT

_VECTOR = 8
_COLUMNS = STATE_UNIT // WARPS
_ROWS = LANES // (_COLUMNS // _VECTOR)
_TILE = register_tile(
    [(_ROWS, STATE_UNIT), (_ROWS, _COLUMNS), (1, _VECTOR)], warp_dims=(-5,), lane_dims=(-4, -3), vector_dim=-1
)
"""Sixteen bytes a lane, and a column within a warp, so that its sum stays there."""


def sums(
    by_head: BFloat16[Array, "batch length columns_of_heads"], groups: int, state: int
) -> tuple[Float[Array, "batch length columns_of_groups"], Float[Array, "batch chunks columns_of_heads"]]:
    """Returns the sums over the heads of each group, and over the tokens of each chunk.

    Args:
        by_head: of all heads, one after the other, those of a group in a row; whole chunks.
        groups: groups of heads.
        state: columns of a head.
    """
    batch, length, width = by_head.shape
    members, tiles = width // state // groups, state // STATE_UNIT
    outputs = {
        "of_groups": jax.ShapeDtypeStruct((batch, length, groups * state), jnp.float32),
        "of_chunks": jax.ShapeDtypeStruct((batch, length // CHUNK, width), jnp.float32),
    }

    def sum_heads(gmem: Refs, smem: Refs) -> None:
        del smem
        batch, chunk, place = (lax.axis_index(name) for name in ("batch", "chunk", "place"))
        group, tile = place // tiles, lax.rem(place, tiles)
        rows = blocks.chunk_rows(chunk)

        def columns(head: Any) -> Any:
            return pl.ds(head * state + tile * STATE_UNIT, STATE_UNIT)

        def load(member: Any) -> jax.Array:
            return blocks.load_operand(gmem["by_head"].at[batch, rows, columns(group * members + member)], _TILE)

        def step(member: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, loaded = carry
            # The next one is on its way while this one is added up.
            following = load(jnp.minimum(member + 1, members - 1))
            # The cast makes it as invariant over a mesh's axes as zeros are.
            gradient = plgpu.layout_cast(loaded.astype(jnp.float32), _TILE)
            store(gmem["of_chunks"].at[batch, chunk, columns(group * members + member)], jnp.sum(gradient, axis=0))
            return total + gradient, following

        zeros = plgpu.layout_cast(jnp.zeros((CHUNK, STATE_UNIT), jnp.float32), _TILE)
        total, _ = lax.fori_loop(0, members, step, (zeros, load(0)))
        store(gmem["of_groups"].at[batch, rows, columns(group)], total)

    grid = {"batch": batch, "chunk": length // CHUNK, "place": groups * tiles}
    results = launch("trapezoidal_ssd", sum_heads, {"by_head": by_head}, outputs, {}, grid)
    return results["of_groups"], results["of_chunks"]
