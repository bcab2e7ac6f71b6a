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

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, plgpu, register_tile, store, synchronize
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
_STAGES = 4
"""Heads in shared memory at once."""


def sums(
    by_head: BFloat16[Array, "batch chunks heads tiles 64 64"], groups: int
) -> tuple[BFloat16[Array, "batch length columns_of_groups"], Float[Array, "batch chunks columns_of_heads"]]:
    """Returns the sums over the heads of each group, rounded once, and over the tokens of each chunk.

    Args:
        by_head: of all heads, one after the other, those of a group in a row; tiles of 64 columns.
        groups: groups of heads.
    """
    batch, chunks, all_heads, tiles, _, _ = by_head.shape
    members, state = all_heads // groups, tiles * STATE_UNIT
    stages = min(_STAGES, members)
    outputs = {
        "of_groups": jax.ShapeDtypeStruct((batch, chunks * CHUNK, groups * state), by_head.dtype),
        "of_chunks": jax.ShapeDtypeStruct((batch, chunks, all_heads * state), jnp.float32),
    }
    scratch = {
        "tiles": plgpu.SMEM((stages, CHUNK, STATE_UNIT), by_head.dtype),
        "full": plgpu.Barrier(num_barriers=stages),
    }

    def sum_heads(gmem: Refs, smem: Refs) -> None:
        batch, chunk, place = (lax.axis_index(name) for name in ("batch", "chunk", "place"))
        group, tile = place // tiles, lax.rem(place, tiles)

        def columns(head: Any) -> Any:
            return pl.ds(head * state + tile * STATE_UNIT, STATE_UNIT)

        def load(member: Any, slot: Any) -> None:
            source = gmem["by_head"].at[batch, chunk, group * members + member, tile]
            plgpu.copy_gmem_to_smem(source, smem["tiles"].at[slot], smem["full"].at[slot])

        def step(member: Any, total: jax.Array) -> jax.Array:
            slot = lax.rem(member, stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            gradient = blocks.load(smem["tiles"].at[slot], _TILE)
            synchronize()
            pl.when(member + stages < members)(lambda: load(member + stages, slot))
            # The cast makes it as invariant over a mesh's axes as zeros are.
            gradient = plgpu.layout_cast(gradient, _TILE)
            store(gmem["of_chunks"].at[batch, chunk, columns(group * members + member)], jnp.sum(gradient, axis=0))
            return total + gradient

        for i in range(stages):
            load(i, i)
        zeros = plgpu.layout_cast(jnp.zeros((CHUNK, STATE_UNIT), jnp.float32), _TILE)
        total = lax.fori_loop(0, members, step, zeros)
        store(gmem["of_groups"].at[batch, blocks.chunk_rows(chunk), columns(group)], total.astype(by_head.dtype))

    grid = {"batch": batch, "chunk": chunks, "place": groups * tiles}
    results = launch("trapezoidal_ssd", sum_heads, {"by_head": by_head}, outputs, scratch, grid)
    return results["of_groups"], results["of_chunks"]
