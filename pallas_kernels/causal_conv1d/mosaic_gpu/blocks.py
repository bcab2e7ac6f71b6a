"""What the kernels share: the stream of chunks, and moves between memories and registers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.causal_conv1d.mosaic_gpu.geometry import Geometry
from pallas_kernels.mosaic_gpu_compat import WARPS, load_float32, plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs

Rows = tuple[jax.Array, ...]
"""Arrays in registers, each with one number for every channel of every stretch of the block."""

REACH_LANES = 8
"""Numbers a step in "reach": at least one a warp, and enough bytes in a chunk for a bulk copy."""


class Block(NamedTuple):
    """Which piece of the problem this block works on."""

    batch: Any
    index: Any
    """Number of its tokens' block."""
    channels: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and options of one convolution.

    The kernels' inputs by name: "x" and, backward, "dy", (batch, length, channels), with channels a multiple of 16
    bytes; "weight", float32, (width, channels), and "bias", float32, (channels,), both padded to whole blocks of
    channels; "initial_state", (batch, width - 1, channels), like x; "reach", what ``reaches`` returns.
    """

    geometry: Geometry
    batch: int
    length: int
    channels: int
    width: int
    silu: bool

    @property
    def history(self) -> int:
        return self.width - 1

    @property
    def token_blocks(self) -> int:
        return -(-self.length // self.geometry.tokens)

    @property
    def channel_blocks(self) -> int:
        return -(-self.channels // self.geometry.channels)

    @property
    def padded_channels(self) -> int:
        return self.channel_blocks * self.geometry.channels

    def block(self) -> Block:
        """The block that is running."""
        column = lax.axis_index("columns")
        first_channel = lax.rem(column, self.channel_blocks) * self.geometry.channels
        channels = pl.ds(first_channel, self.geometry.channels)
        return Block(lax.div(column, self.channel_blocks), lax.axis_index("tokens"), channels)

    def first_token(self, block: Block, warp: Any) -> Any:
        """Where a warp's stretch begins."""
        return block.index * self.geometry.tokens + warp * self.geometry.stretch

    @property
    def grid(self) -> dict[str, int]:
        """Blocks along each axis."""
        return {"tokens": self.token_blocks, "columns": self.batch * self.channel_blocks}


def reaches(p: Problem, starts: jax.Array) -> jax.Array:
    """Counts the earlier tokens, up to width - 1, that each token shares its segment with.

    Args:
        p: shapes.
        starts: (batch, length), marks the first tokens of segments.

    Returns:
        (batch, token blocks, width - 1 + stretch, REACH_LANES) int32, as the warps of a block meet their tokens, one
        in each of the first lanes. The backward walk's chunks begin after width - 1 tokens, the forward walk's at once.
    """
    g = p.geometry
    same_segment = jnp.ones(starts.shape, bool)
    reach = jnp.zeros(starts.shape, jnp.int32)
    for back in range(p.history):
        same_segment &= ~jnp.pad(starts, ((0, 0), (back, 0)))[:, : p.length]
        reach += same_segment
    first = g.stretch * jnp.arange(p.token_blocks * WARPS).reshape(p.token_blocks, 1, WARPS)
    tokens = first + jnp.arange(p.history + g.stretch)[:, None]
    by_warp = jnp.take(reach, tokens, axis=1, mode="fill", fill_value=0)
    return jnp.pad(by_warp, ((0, 0), (0, 0), (0, 0), (0, REACH_LANES - WARPS)))


def buffers(p: Problem, streamed: Sequence[str], dtype: Any) -> dict[str, Any]:
    """Shared memory for what is streamed: for each name, one slot a stage."""
    g = p.geometry
    copies = sum(1 if name == "reach" else WARPS for name in streamed)
    buffers: dict[str, Any] = {
        name: plgpu.SMEM((g.stages, g.steps, REACH_LANES), jnp.int32)
        if name == "reach"
        else plgpu.SMEM((g.stages, WARPS, g.steps, g.channels), dtype)
        for name in streamed
    }
    return buffers | {"barrier": plgpu.Barrier(num_arrivals=copies, num_barriers=g.stages)}


def start_chunk(
    p: Problem, gmem: Refs, smem: Refs, streamed: Sequence[str], block: Block, index: Any, slot: Any, lead: int
) -> None:
    """Starts loading a chunk of every stretch, ``lead`` tokens ahead. After the end of the sequence there are zeros."""
    barrier = smem["barrier"].at[slot]
    offset = index * p.geometry.steps + lead
    if "reach" in streamed:
        source = gmem["reach"].at[block.batch, block.index, pl.ds(offset, p.geometry.steps)]
        plgpu.copy_gmem_to_smem(source, smem["reach"].at[slot], barrier)

    def load(warp: Any) -> None:
        tokens = pl.ds(p.first_token(block, warp) + offset, p.geometry.steps)
        for name in streamed:
            if name != "reach":
                source = gmem[name].at[block.batch, tokens, block.channels]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot, warp], barrier)

    # Each warp starts the copies of its own stretch: the instructions for four would be as many as for the tokens.
    plgpu.warp_map(load)


def start_stream(p: Problem, gmem: Refs, smem: Refs, streamed: Sequence[str], block: Block, *, lead: int) -> None:
    """Starts loading the first chunks."""
    for i in range(p.geometry.stages):
        start_chunk(p, gmem, smem, streamed, block, i, i, lead)


def stream[C](
    p: Problem,
    gmem: Refs,
    smem: Refs,
    streamed: Sequence[str],
    block: Block,
    chunk: Callable[[Any, Refs, C], C],
    carry: C,
    *,
    lead: int,
) -> C:
    """Calls ``chunk(index, refs, carry) -> carry`` for one chunk after the other, while the next ones are loaded."""
    g = p.geometry

    def step(i: Any, carry: C) -> C:
        if g.chunks > g.stages:
            # The copy out of the last but one chunk's slot has had a chunk's time to end.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            @pl.when((i > 1) & (i - 2 + g.stages < g.chunks))
            def _() -> None:
                start_chunk(p, gmem, smem, streamed, block, i - 2 + g.stages, lax.rem(i - 2, g.stages), lead)

        slot = lax.rem(i, g.stages)
        plgpu.barrier_wait(smem["barrier"].at[slot])
        return chunk(i, {name: smem[name].at[slot] for name in streamed}, carry)

    carry = lax.fori_loop(0, g.chunks, step, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def store_chunk(p: Problem, ref: Any, target: Any, block: Block, index: Any) -> None:
    """Starts storing a chunk of every stretch."""
    plgpu.commit_smem()

    def store(warp: Any) -> None:
        tokens = pl.ds(p.first_token(block, warp) + index * p.geometry.steps, p.geometry.steps)
        plgpu.copy_smem_to_gmem(ref.at[warp], target.at[block.batch, tokens, block.channels])

    plgpu.warp_map(store)


def load_history(p: Problem, gmem: Refs, smem: Refs, block: Block, warp: Any) -> None:
    """Starts loading the width - 1 inputs before the stretch of the warp that calls it."""
    destination, barrier = smem["head_x"].at[warp, : p.history], smem["head_barrier"]
    before = p.first_token(block, warp) - p.history
    is_first = (block.index == 0) & (warp == 0)

    def load(first: Any) -> None:
        source = gmem["x"].at[block.batch, pl.ds(first, p.history), block.channels]
        plgpu.copy_gmem_to_smem(source, destination, barrier)

    if "initial_state" not in gmem:
        # There are zeros after the end.
        load(jnp.where(is_first, p.length, before))
    else:

        @pl.when(jnp.logical_not(is_first))
        def _() -> None:
            load(before)

        @pl.when(is_first)
        def _() -> None:
            source = gmem["initial_state"].at[block.batch, :, block.channels]
            plgpu.copy_gmem_to_smem(source, destination, barrier)


def parameters(p: Problem, gmem: Refs, block: Block) -> tuple[Rows, jax.Array | None]:
    """Loads the taps, the oldest token's first, and the bias."""
    load = lambda ref: spread(p.geometry, plgpu.load(ref, layout=p.geometry.channel_layout, optimized=False), 1)  # noqa: E731
    weight = tuple(load(gmem["weight"].at[i, block.channels]) for i in range(p.width))
    return weight, load(gmem["bias"].at[block.channels]) if "bias" in gmem else None


def sum_over_warps(g: Geometry, buffer: Any, row: jax.Array) -> jax.Array:
    """Sums a row over the stretches; the result is in every warp."""
    store(buffer, row)
    plgpu.commit_smem()
    rows = [plgpu.load(buffer.at[warp], layout=g.channel_layout, optimized=False) for warp in range(WARPS)]
    plgpu.commit_smem()  # All have read the buffer before it is written again.
    return functools.reduce(jnp.add, rows)


def load_row(g: Geometry, ref: Any) -> jax.Array:
    """Loads a row as float32."""
    return load_float32(ref, g.row_layout)


def load_reach(p: Problem, refs: Refs, step: tuple[Any, ...]) -> jax.Array | None:
    """Loads how far back a step's tokens see, for every channel; None where all see as far as the filter is wide."""
    if "reach" not in refs or not p.history:
        return None
    reach = plgpu.load(refs["reach"].at[(*step, slice(WARPS))], layout=p.geometry.stretch_layout, optimized=False)
    return spread(p.geometry, reach, 0)


def spread(g: Geometry, array: jax.Array, dim: int) -> jax.Array:
    """Broadcasts to a row; costs nothing, since every lane that needs a copy has one."""
    return plgpu.layout_cast(lax.broadcast_in_dim(array, g.row_shape, (dim,)), g.row_layout)


def zeros(g: Geometry) -> jax.Array:
    """Row of zeros."""
    return plgpu.layout_cast(jnp.zeros(g.row_shape, jnp.float32), g.row_layout)
