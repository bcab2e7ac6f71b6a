"""What the kernels of the selective scan share: shapes, launch, and moves between memories and registers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.elementwise import LOG2_E, softplus
from pallas_kernels.mosaic_gpu_compat import load_float32, plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.selective_scan.mosaic_gpu.geometry import KEEP_LANES, Geometry, Layout

State = tuple[jax.Array, ...]
"""The states of a block's channels in registers, one array a register tile."""

_PER_CHANNEL = ("D", "delta_bias")
SHARED = ("BC", "keep")
"""Inputs that are the same for all channels: the warpgroups of a block load them once."""
_COMMON = (*SHARED, "loaded", "shared_loaded", "shared_read")
"""Scratch memory that a block has once, where a warpgroup has a piece of its own of everything else."""

_PARTS_AT_ONCE = 4
"""Parts whose effect on a state is loaded together."""


class Block(NamedTuple):
    """Which piece of the problem this warpgroup works on."""

    batch: Any
    part: Any
    channels: Any
    group: Any
    index: Any
    """Number of its piece of the channels."""
    warpgroup: Any
    """Number within its block."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and options of one scan.

    The kernels' inputs are named as in ``Inputs``, in these shapes (channels and state padded to the geometry):
    "x", "delta", "z", (batch, length, channels); "A", (channels, state_lanes, states_per_lane); "BC", B and then C,
    float32, (batch, length, groups, 2 · state_lanes, states_per_lane); "D" and "delta_bias", float32, (channels,);
    "initial_state", (batch, state_lanes, channels, states_per_lane). "keep", (batch, chunks, KEEP_LANES) float32, is 0
    at the first token of a segment, else 1.
    """

    geometry: Geometry
    batch: int
    length: int
    channels: int
    groups: int
    delta_softplus: bool
    num_parts: int
    """Pieces that the length is cut into, which run at the same time."""

    @property
    def chunks_per_part(self) -> int:
        chunks = -(-self.length // self.geometry.steps)
        return -(-chunks // self.num_parts)

    @property
    def num_chunks(self) -> int:
        return self.num_parts * self.chunks_per_part

    @property
    def stored_length(self) -> int:
        """Length of outputs that leave a block as a contiguous piece, and so are not cut off at the sequence's end."""
        return self.num_chunks * self.geometry.steps

    def token_type(self, like: jax.Array) -> jax.ShapeDtypeStruct:
        """Type of an output of tokens; ``trim`` removes what it has too much."""
        contiguous = self.channels == self.geometry.channels
        length = self.stored_length if contiguous else self.length
        return jax.ShapeDtypeStruct((self.batch, length, self.channels), like.dtype)

    def trim(self, array: jax.Array) -> jax.Array:
        """Removes what an output, (batch, length, …), has beyond the sequence's end."""
        return array[:, : self.length]

    @property
    def pieces_per_group(self) -> int:
        """Warpgroups that the channels of a group are shared out to."""
        return self.channels // self.groups // self.geometry.channels

    @property
    def stages(self) -> int:
        return min(self.geometry.stages, self.chunks_per_part)

    @property
    def shared_stages(self) -> int:
        # A single warpgroup can be no further ahead of itself than its own data are.
        stages = self.geometry.shared_stages if self.geometry.warpgroups > 1 else self.stages
        return min(stages, self.chunks_per_part)

    def state_type(self, *dims: int) -> jax.ShapeDtypeStruct:
        """Type of an array of states of all channels, with further dimensions after the batch."""
        lanes, _, states = self.geometry.tile_shape
        return jax.ShapeDtypeStruct((self.batch, *dims, lanes, self.channels, states), jnp.float32)

    def block(self) -> Block:
        """The block that is running."""
        warpgroup = lax.axis_index("warpgroup")
        index = lax.axis_index("channels") * self.geometry.warpgroups + warpgroup
        first = index * self.geometry.channels
        group = first // (self.channels // self.groups)
        channels = pl.ds(first, self.geometry.channels)
        return Block(lax.axis_index("batch"), lax.axis_index("part"), channels, group, index, warpgroup)

    def rows(self, chunk: Any) -> Any:
        """Tokens of a chunk."""
        return pl.ds(chunk * self.geometry.steps, self.geometry.steps)

    def launch(
        self,
        body: Callable[[Refs, Refs], None],
        inputs: Mapping[str, jax.Array],
        outputs: Mapping[str, Any],
        scratch: Refs,
        *,
        num_parts: int | None = None,
    ) -> dict[str, jax.Array]:
        """Runs ``body(gmem, smem)`` in every warpgroup, or those of the first parts; it gets its references by name.

        Each warpgroup gets its own piece of scratch memory, what ``_COMMON`` names excepted.
        """

        def with_own(gmem: Refs, smem: Refs) -> None:
            warpgroup = lax.axis_index("warpgroup")
            body(gmem, {name: ref if name in _COMMON else ref.at[warpgroup] for name, ref in smem.items()})

        with_own.__name__ = body.__name__
        blocks = self.channels // self.geometry.block_channels
        grid = {"part": num_parts or self.num_parts, "batch": self.batch, "channels": blocks}
        warpgroups = self.geometry.warpgroups
        return launch("selective_scan", with_own, inputs, outputs, scratch, grid, warpgroups=warpgroups)

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Shared memory of this shape for each warpgroup."""
        return plgpu.SMEM((self.geometry.warpgroups, *shape), dtype)

    def token_columns(self, count: int) -> Any:
        """Shared memory for several numbers a token, the same of all channels side by side."""
        return self.scratch((self.geometry.steps, count * self.geometry.channels), jnp.float32)

    def buffers(self, inputs: Mapping[str, jax.Array], streamed: Sequence[str]) -> dict[str, Any]:
        """Shared memory for what ``Stream`` loads: for each name, one slot a stage."""
        g = self.geometry
        lanes, _, states = g.tile_shape
        shapes = {"BC": (g.steps, 2 * lanes, states), "keep": (KEEP_LANES,)}
        slots = {}
        for name in streamed:
            if name in SHARED:
                slots[name] = plgpu.SMEM((self.shared_stages, *shapes[name]), inputs[name].dtype)
            else:
                slots[name] = self.scratch((self.stages, g.steps, g.channels), inputs[name].dtype)
        parameters = {name: self.scratch((g.channels,), jnp.float32) for name in _PER_CHANNEL if name in inputs}
        num_shared = sum(name in SHARED for name in streamed)
        return {
            **slots,
            **parameters,
            "loaded": plgpu.Barrier(num_arrivals=len(streamed) - num_shared, num_barriers=g.warpgroups * self.stages),
            "shared_loaded": plgpu.Barrier(num_arrivals=num_shared, num_barriers=self.shared_stages),
            "shared_read": plgpu.Barrier(num_arrivals=g.warpgroups, num_barriers=self.shared_stages),
        }

    def load_parameters(self, gmem: Refs, smem: Refs, block: Block) -> None:
        """Copies what each token tile needs of every channel; visible to all warps after the next barrier."""
        g = self.geometry
        for name in _PER_CHANNEL:
            if name in smem:
                for channels in g.token_tiles():
                    source = gmem[name].at[pl.ds(block.index * g.channels + channels.start, g.token_channels)]
                    row = plgpu.load(source, layout=g.token_channel_layout, optimized=False)
                    store(smem[name].at[channels], row)

    def step_sizes(self, smem: Refs, refs: Refs, chunk: Any, channels: slice) -> jax.Array:
        """delta' of a token tile, zero after the end of the sequence so that the state stays as it is."""
        step_size = load_token(self.geometry, refs["delta"], channels)
        if "delta_bias" in smem:
            step_size = step_size + per_channel(self.geometry, smem["delta_bias"], channels)
        if self.delta_softplus:
            step_size = softplus(step_size, data_dtype=jnp.dtype(refs["delta"].dtype))
        return self.mask(step_size, chunk)

    def mask(self, token: jax.Array, chunk: Any) -> jax.Array:
        """Zeros a token tile after the end of the sequence."""
        if self.num_chunks * self.geometry.steps == self.length:
            return token
        row = lax.broadcasted_iota(jnp.int32, token.shape, 0)
        row = plgpu.layout_cast(row, self.geometry.token_layout)
        return jnp.where(row < self.length - chunk * self.geometry.steps, token, 0.0)


def per_channel(g: Geometry, ref: Any, channels: slice) -> jax.Array:
    """Loads one number a channel of a token tile, repeated for every step."""
    row = plgpu.load(ref.at[channels], layout=g.token_channel_layout, optimized=False)
    return spread(row, (g.steps, g.token_channels), (1,), g.token_layout)


def load_token(g: Geometry, ref: Any, channels: slice, *, column: int = 0) -> jax.Array:
    """Loads a token tile as float32; with a column, from what ``Problem.token_columns`` reserved."""
    first = column * g.channels + channels.start
    return load_float32(ref.at[:, first : first + g.token_channels], g.token_layout)


def store_tokens(g: Geometry, ref: Any, tokens: Sequence[jax.Array], *, column: int = 0) -> None:
    """Stores token tiles, in the reference's dtype; with a column, into what ``Problem.token_columns`` reserved.

    All of a phase's stores come after all of its loads: past a store the compiler would not move a load, and the
    latencies of one tile after the other would add up.
    """
    for channels, token in zip(g.token_tiles(), tokens, strict=True):
        first = column * g.channels + channels.start
        store(ref.at[:, first : first + g.token_channels], token.astype(ref.dtype))


def store_columns(g: Geometry, ref: Any, columns: Sequence[Sequence[jax.Array]]) -> None:
    """Stores several numbers a token, each given by token tile, into what ``Problem.token_columns`` reserved."""
    for column, tokens in enumerate(columns):
        store_tokens(g, ref, tokens, column=column)


def load_columns(g: Geometry, ref: Any, step: Any, count: int) -> jax.Array:
    """Loads the first columns of a step, from what ``Problem.token_columns`` reserved, side by side."""
    # One load for all, which the compiler makes of as few instructions as the hardware allows.
    return plgpu.load(ref.at[step, : count * g.channels], layout=g.channel_layout, optimized=False)


def spread_columns(g: Geometry, columns: jax.Array) -> list[State]:
    """Repeats every number a channel for its states: for each column an array a register tile."""
    return [_spread_channels(g, columns[i : i + g.channels]) for i in range(0, columns.size, g.channels)]


def _spread_channels(g: Geometry, row: jax.Array) -> State:
    tiles = [row[channels] for channels in g.register_tiles()]
    return tuple(spread(tile, g.tile_shape, (1,), g.state_layout) for tile in tiles)


def load_B(g: Geometry, refs: Refs, step: Any) -> jax.Array:
    """Loads a row of B, (state_lanes, states_per_lane)."""
    return plgpu.load(refs["BC"].at[step, : g.state_lanes], layout=g.matrix_layout, optimized=False)


def load_C(g: Geometry, refs: Refs, step: Any) -> jax.Array:
    """Loads a row of C, (state_lanes, states_per_lane)."""
    return plgpu.load(refs["BC"].at[step, g.state_lanes :], layout=g.matrix_layout, optimized=False)


def spread_matrix(g: Geometry, row: jax.Array) -> jax.Array:
    """Repeats a row of B or C for every channel of a register tile."""
    return spread(row, g.tile_shape, (0, 2), g.state_layout)


def take_steps(
    count: int,
    unroll: int,
    row: Callable[[Any], Any],
    load: Callable[[Any], Any],
    take: Callable[[Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """Takes steps.

    Args:
        count: how many.
        unroll: how many are loaded at once; a divisor of ``count``.
        row: row in the chunk of the i-th step.
        load: ``load(row) -> operands``, as they lie in shared memory.
        take: ``take(row, operands, carry) -> carry``.
        carry: passed from step to step.
    """

    def some(i: Any, carry: Any) -> Any:
        rows = [row(i * unroll + u) for u in range(unroll)]
        # Loaded before the first store, past which the compiler would not move them.
        loaded = [load(t) for t in rows]
        for t, operands in zip(rows, loaded, strict=True):
            carry = take(t, operands, carry)
        return carry

    return lax.fori_loop(0, count // unroll, some, carry)


def spread(array: jax.Array, shape: tuple[int, ...], dims: tuple[int, ...], layout: Layout) -> jax.Array:
    """Broadcasts; costs nothing where the layout already has a copy in every lane that needs one."""
    return plgpu.layout_cast(lax.broadcast_in_dim(array, shape, dims), layout)


def load_state(g: Geometry, ref: Any) -> State:
    """Loads the states of the block's channels, (state_lanes, channels, states_per_lane)."""

    return tuple(
        plgpu.load(ref.at[:, channels], layout=g.state_layout, optimized=False) for channels in g.register_tiles()
    )


def load_A(g: Geometry, gmem: Refs, block: Block) -> State:
    """Loads the state matrix of the block's channels, times log2(e): its decays are powers of two."""
    channels_first = gmem["A"].at[block.channels]
    return tuple(tile * LOG2_E for tile in load_state(g, channels_first.transpose((1, 0, 2))))


def store_state(g: Geometry, ref: Any, state: State) -> None:
    """Stores the states of the block's channels."""
    for tile, channels in zip(state, g.register_tiles(), strict=True):
        store(ref.at[:, channels], tile)


def store_tiles(g: Geometry, ref: Any, state: State) -> None:
    """Stores register tiles one after the other, (tiles, *tile_shape), for ``load_tiles`` to load."""
    for tile in range(g.tiles):
        store(ref.at[tile], state[tile])


def load_tiles(g: Geometry, ref: Any) -> State:
    """Loads what ``store_tiles`` stored."""
    return tuple(plgpu.load(ref.at[tile], layout=g.state_layout, optimized=False) for tile in range(g.tiles))


def zero_state(g: Geometry) -> State:
    """States of zero."""
    zeros = plgpu.layout_cast(jnp.zeros(g.tile_shape, jnp.float32), g.state_layout)
    return tuple(zeros for _ in range(g.tiles))


def zero_tokens(g: Geometry) -> jax.Array:
    """Token tile of zeros."""
    return plgpu.layout_cast(jnp.zeros((g.steps, g.token_channels), jnp.float32), g.token_layout)


def fold_steps(g: Geometry, token: jax.Array) -> jax.Array:
    """Adds up what each lane holds of a token tile for different steps."""
    rows = g.token_rows
    return functools.reduce(jnp.add, [token[first : first + rows] for first in range(0, g.steps, rows)])


def store_sums(g: Geometry, ref: Any, block: Block, tokens: Sequence[jax.Array]) -> None:
    """Sums token tiles over their steps and stores one number a channel."""
    for channels, token in zip(g.token_tiles(), tokens, strict=True):
        first = block.index * g.channels + channels.start
        store(ref.at[pl.ds(first, g.token_channels)], jnp.sum(token, axis=0))


def decay(step_size: jax.Array, A: jax.Array, keep: Any) -> jax.Array:
    """What remains of a register tile's states after a step; nothing where a segment starts."""
    factor = jnp.exp2(step_size * A)
    return factor if keep is None else factor * keep


def initial_state(p: Problem, gmem: Refs, block: Block, A: State) -> State:
    """State before the block's part: the given one, carried over the parts before."""
    h = given_state(p.geometry, gmem, "initial_state", block)
    return carry_over_parts(p, gmem, block, A, h, block.part, lambda i: i)


def given_state(g: Geometry, gmem: Refs, name: str, block: Block) -> State:
    """The block's channels of a state that the call was given, or zero."""
    return load_state(g, gmem[name].at[block.batch, :, block.channels]) if name in gmem else zero_state(g)


def carry_over_parts(
    p: Problem, gmem: Refs, block: Block, A: State, h: State, count: Any, order: Callable[[Any], Any]
) -> State:
    """Carries a state over so many whole parts, by what ``parts.summarize`` found about them."""
    if p.num_parts == 1:
        return h
    g = p.geometry

    def load(i: Any) -> tuple[State, State, Any]:
        # In place of a part too many the last one is loaded, for a decay of one and a gain of zero.
        counts = jnp.where(i < count, 1.0, 0.0)
        part = order(jnp.minimum(i, count - 1))
        gained = load_state(g, gmem["part_state"].at[block.batch, part, :, block.channels])
        steps = gmem["part_steps"].at[block.batch, part, block.channels]
        (step_size,) = spread_columns(g, plgpu.load(steps, layout=g.channel_layout, optimized=False) * counts)
        keep = None
        if "part_keep" in gmem:
            keep = gmem["part_keep"][block.batch, part] * counts + (1.0 - counts)
        return step_size, tuple(tile * counts for tile in gained), keep

    def carry(group: Any, h: State) -> State:
        # Several at once: the last part's block waits for them all, and one load takes as long as four.
        for step_size, gained, keep in [load(_PARTS_AT_ONCE * group + i) for i in range(_PARTS_AT_ONCE)]:
            h = tuple(decay(step_size[i], A[i], keep) * h[i] + gained[i] for i in range(g.tiles))
        return h

    return lax.fori_loop(0, (count + _PARTS_AT_ONCE - 1) // _PARTS_AT_ONCE, carry, h)
