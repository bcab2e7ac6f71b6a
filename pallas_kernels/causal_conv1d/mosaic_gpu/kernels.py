"""Kernels of the causal convolution, forward and backward: one read of every input, one write of every output.

A lane walks over the tokens with the last width - 1 of them in registers, so a token is read from memory once although
every output needs several. The backward kernel walks in the same direction: the gradient of an input is complete
width - 1 tokens later, so it gathers in registers until then, and runs width - 1 tokens ahead of what it stores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.causal_conv1d.mosaic_gpu.geometry import Geometry
from pallas_kernels.mosaic_gpu_compat import WARPS, plgpu, store
from pallas_kernels.selective_scan.mosaic_gpu.elementwise import sigmoid
from pallas_kernels.sharding import vary_like

Refs = Mapping[str, Any]
Rows = tuple[jax.Array, ...]
"""Arrays in registers, each with one number for every channel of every stretch of the block."""

REACH_LANES = 8
"""Numbers a step in "reach": at least one a warp, and enough bytes in a chunk for a bulk copy."""

_COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # A warp reads and writes only its own part of the buffers; what the copies need is fenced by hand, once a chunk.
    unsafe_no_auto_barriers=True,
    # Register layouts are given, not inferred.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


class Block(NamedTuple):
    """Which piece of the problem this block works on."""

    batch: Any
    index: Any
    """Number of its tokens' block."""
    channels: Any

    def is_first(self, warp: int) -> Any:
        """Whether a stretch is the first of the sequence."""
        return (self.index == 0) & (warp == 0)


class Carry(NamedTuple):
    """What the backward walk remembers from token to token."""

    x: Rows
    """The last width - 1 inputs, the oldest first."""
    dx: Rows
    """Their gradients so far."""
    dweight: Rows
    dbias: Rows
    """One array, or none where there is no bias."""


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

    def first_token(self, block: Block, warp: int) -> Any:
        """Where a warp's stretch begins."""
        return block.index * self.geometry.tokens + warp * self.geometry.stretch

    def launch(
        self,
        body: Callable[[Refs, Refs], None],
        inputs: Mapping[str, jax.Array],
        outputs: Mapping[str, Any],
        scratch: Refs,
    ) -> dict[str, jax.Array]:
        """Runs ``body(gmem, smem)`` in every block; it gets its references by name."""

        def kernel_body(*gmem: Any, **smem: Any) -> None:
            body(dict(zip([*inputs, *outputs], gmem, strict=True)), smem)

        kernel_body.__name__ = f"causal_conv1d_{body.__name__}"
        kernel = plgpu.kernel(
            kernel_body,
            out_type=tuple(outputs.values()),
            scratch_types=dict(scratch),
            # The last dimension may be large, the others no more than 65535.
            grid=(self.token_blocks, self.batch * self.channel_blocks),
            grid_names=("tokens", "columns"),
            compiler_params=_COMPILER_PARAMS,
        )
        with jax.enable_x64(False):  # Python's numbers are 32 bits wide in a kernel, whatever the caller's are.
            results = kernel(*inputs.values())
        return {name: vary_like(array, inputs["x"]) for name, array in zip(outputs, results, strict=True)}


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


def forward(p: Problem, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """Computes y."""
    g = p.geometry
    x = inputs["x"]
    streamed = [name for name in ("x", "reach") if name in inputs]
    scratch = _buffers(p, streamed, x.dtype)
    if p.history:
        scratch["head_x"] = plgpu.SMEM((WARPS, p.history, g.channels), x.dtype)
        scratch["head_barrier"] = plgpu.Barrier(num_arrivals=WARPS)

    def forward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        _start_stream(p, gmem, smem, streamed, block, lead=0)
        weight, bias = _parameters(p, gmem, block)
        history: Rows = ()
        if p.history:
            for warp in range(WARPS):
                _load_history(p, gmem, smem, block, warp)
            plgpu.barrier_wait(smem["head_barrier"])
            history = tuple(_load_row(g, smem["head_x"].at[:, i]) for i in range(p.history))

        def chunk(index: Any, refs: Refs, history: Rows) -> Rows:
            def steps(i: Any, history: Rows) -> Rows:
                rows = [i * g.unroll + u for u in range(g.unroll)]
                # Loaded before the first store, past which the compiler would not move them.
                loaded = [(_load_row(g, refs["x"].at[:, t]), _load_reach(p, refs, (t,))) for t in rows]
                for t, (x, reach) in zip(rows, loaded, strict=True):
                    y = _filter(weight, bias, _seen((*history, x), reach))
                    if p.silu:
                        y = y * sigmoid(y)
                    store(refs["x"].at[:, t], y.astype(refs["x"].dtype))
                    history = (*history, x)[1:]
                return history

            history = lax.fori_loop(0, g.steps // g.unroll, steps, history)
            _store_chunk(p, refs["x"], gmem["y"], block, index)
            return history

        _stream(p, gmem, smem, streamed, block, chunk, history, lead=0)

    return p.launch(forward, inputs, {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}, scratch)["y"]


def backward(p: Problem, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes the gradients.

    Returns:
        "x" and, where there is an initial state, "initial_state", like these. "parameters", (batch, token blocks,
        width, padded channels) float32, the terms of the gradients of weight, and after it of bias if there is one, to
        be summed outside.
    """
    g = p.geometry
    x = inputs["x"]
    streamed = [name for name in ("x", "dy", "reach") if name in inputs]
    num_biases = 1 if "bias" in inputs else 0
    parameters = (p.batch, p.token_blocks, p.width + num_biases, p.padded_channels)
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "dparameters": jax.ShapeDtypeStruct(parameters, jnp.float32),
    }
    scratch = _buffers(p, streamed, x.dtype) | {"totals": plgpu.SMEM(g.row_shape, jnp.float32)}
    if p.history:
        scratch["head_x"] = plgpu.SMEM((WARPS, 2 * p.history, g.channels), x.dtype)
        scratch["head_dy"] = plgpu.SMEM((WARPS, p.history, g.channels), x.dtype)
        scratch["head_barrier"] = plgpu.Barrier(num_arrivals=3 * WARPS)
    if "initial_state" in inputs:
        outputs["dinitial_state"] = jax.ShapeDtypeStruct(inputs["initial_state"].shape, x.dtype)

    def backward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        _start_stream(p, gmem, smem, streamed, block, lead=p.history)
        weight, bias = _parameters(p, gmem, block)

        def step(carry: Carry, x: jax.Array, dy: jax.Array, reach: Any) -> tuple[Carry, jax.Array]:
            """Takes in a token; returns also the gradient of the input that is now complete."""
            seen = _seen((*carry.x, x), reach)
            d = dy
            if p.silu:
                y = _filter(weight, bias, seen)
                gate = sigmoid(y)
                d = dy * (gate + gate * (y - y * gate))
            dweight = tuple(total + d * tap for total, tap in zip(carry.dweight, seen, strict=True))
            dbias = tuple(total + d for total in carry.dbias)
            zero = jnp.zeros_like(d)
            dx = [
                total + w * d_k
                for total, w, d_k in zip((*carry.dx, zero), weight, _seen((d,) * p.width, reach), strict=True)
            ]
            return Carry((*carry.x, x)[1:], tuple(dx[1:]), dweight, dbias), dx[0]

        def chunk(index: Any, refs: Refs, carry: Carry) -> Carry:
            def steps(i: Any, carry: Carry) -> Carry:
                rows = [i * g.unroll + u for u in range(g.unroll)]
                loaded = [
                    (_load_row(g, refs["x"].at[:, t]), _load_row(g, refs["dy"].at[:, t]), _load_reach(p, refs, (t,)))
                    for t in rows
                ]
                for t, token in zip(rows, loaded, strict=True):
                    carry, dx = step(carry, *token)
                    store(refs["x"].at[:, t], dx.astype(refs["x"].dtype))
                return carry

            carry = lax.fori_loop(0, g.steps // g.unroll, steps, carry)
            _store_chunk(p, refs["x"], gmem["dx"], block, index)
            return carry

        zeros = _zeros(g)
        carry = Carry((), (), (zeros,) * p.width, (zeros,) * num_biases)
        if p.history:
            carry = _walk_head(p, gmem, smem, block, step, carry)
        carry = _stream(p, gmem, smem, streamed, block, chunk, carry, lead=p.history)
        for i, total in enumerate((*carry.dweight, *carry.dbias)):
            target = gmem["dparameters"].at[block.batch, block.index, i, block.channels]
            store(target, _sum_over_warps(g, smem["totals"], total))

    results = p.launch(backward, inputs, outputs, scratch)
    return {name.removeprefix("d"): array for name, array in results.items()}


def _walk_head(
    p: Problem,
    gmem: Refs,
    smem: Refs,
    block: Block,
    step: Callable[[Carry, jax.Array, jax.Array, Any], tuple[Carry, jax.Array]],
    carry: Carry,
) -> Carry:
    """Takes the first width - 1 steps of each stretch, which complete the gradients of inputs before it.

    These belong to the stretch before, or to the initial state. The stretch before also counts these tokens for the
    gradients of weight and bias, since it runs as many tokens ahead of its end; only the first one has none before it.
    """
    g = p.geometry
    for warp in range(WARPS):
        _load_history(p, gmem, smem, block, warp)
        tokens = pl.ds(p.first_token(block, warp), p.history)
        for name, rows in (("x", slice(p.history, 2 * p.history)), ("dy", slice(p.history))):
            source = gmem[name].at[block.batch, tokens, block.channels]
            plgpu.copy_gmem_to_smem(source, smem[f"head_{name}"].at[warp, rows], smem["head_barrier"])
    plgpu.barrier_wait(smem["head_barrier"])

    carry = carry._replace(
        x=tuple(_load_row(g, smem["head_x"].at[:, i]) for i in range(p.history)), dx=(_zeros(g),) * p.history
    )
    for i in range(p.history):
        x = _load_row(g, smem["head_x"].at[:, p.history + i])
        dy = _load_row(g, smem["head_dy"].at[:, i])
        carry, dx = step(carry, x, dy, _load_reach(p, gmem, (block.batch, block.index, i)))
        if "dinitial_state" in gmem:
            store(smem["head_x"].at[:, i], dx.astype(smem["head_x"].dtype))

    if "dinitial_state" in gmem:
        plgpu.commit_smem()

        @pl.when(block.index == 0)
        def _() -> None:
            target = gmem["dinitial_state"].at[block.batch, :, block.channels]
            plgpu.copy_smem_to_gmem(smem["head_x"].at[0, : p.history], target)

    stretch = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, g.row_shape, 0), g.row_layout)
    is_first = (block.index == 0) & (stretch == 0)
    first_only = lambda rows: tuple(jnp.where(is_first, row, 0.0) for row in rows)  # noqa: E731
    return carry._replace(dweight=first_only(carry.dweight), dbias=first_only(carry.dbias))


def _buffers(p: Problem, streamed: Sequence[str], dtype: Any) -> dict[str, Any]:
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


def _start_chunk(
    p: Problem, gmem: Refs, smem: Refs, streamed: Sequence[str], block: Block, index: Any, slot: Any, lead: int
) -> None:
    """Starts loading a chunk of every stretch, ``lead`` tokens ahead. After the end of the sequence there are zeros."""
    barrier = smem["barrier"].at[slot]
    offset = index * p.geometry.steps + lead
    for name in streamed:
        if name == "reach":
            source = gmem["reach"].at[block.batch, block.index, pl.ds(offset, p.geometry.steps)]
            plgpu.copy_gmem_to_smem(source, smem["reach"].at[slot], barrier)
        else:
            for warp in range(WARPS):
                tokens = pl.ds(p.first_token(block, warp) + offset, p.geometry.steps)
                source = gmem[name].at[block.batch, tokens, block.channels]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot, warp], barrier)


def _start_stream(p: Problem, gmem: Refs, smem: Refs, streamed: Sequence[str], block: Block, *, lead: int) -> None:
    """Starts loading the first chunks."""
    for i in range(p.geometry.stages):
        _start_chunk(p, gmem, smem, streamed, block, i, i, lead)


def _stream[C](
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
                _start_chunk(p, gmem, smem, streamed, block, i - 2 + g.stages, lax.rem(i - 2, g.stages), lead)

        slot = lax.rem(i, g.stages)
        plgpu.barrier_wait(smem["barrier"].at[slot])
        return chunk(i, {name: smem[name].at[slot] for name in streamed}, carry)

    carry = lax.fori_loop(0, g.chunks, step, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def _store_chunk(p: Problem, ref: Any, target: Any, block: Block, index: Any) -> None:
    """Starts storing a chunk of every stretch."""
    plgpu.commit_smem()
    for warp in range(WARPS):
        tokens = pl.ds(p.first_token(block, warp) + index * p.geometry.steps, p.geometry.steps)
        destination = target.at[block.batch, tokens, block.channels]
        plgpu.copy_smem_to_gmem(ref.at[warp], destination, commit_group=warp == WARPS - 1)


def _load_history(p: Problem, gmem: Refs, smem: Refs, block: Block, warp: int) -> None:
    """Starts loading the width - 1 inputs before a warp's stretch."""
    destination, barrier = smem["head_x"].at[warp, : p.history], smem["head_barrier"]
    before = p.first_token(block, warp) - p.history

    def load(first: Any) -> None:
        source = gmem["x"].at[block.batch, pl.ds(first, p.history), block.channels]
        plgpu.copy_gmem_to_smem(source, destination, barrier)

    if warp > 0:
        load(before)
    elif "initial_state" not in gmem:
        # There are zeros after the end.
        load(jnp.where(block.index == 0, p.length, before))
    else:

        @pl.when(block.index > 0)
        def _() -> None:
            load(before)

        @pl.when(block.index == 0)
        def _() -> None:
            source = gmem["initial_state"].at[block.batch, :, block.channels]
            plgpu.copy_gmem_to_smem(source, destination, barrier)


def _parameters(p: Problem, gmem: Refs, block: Block) -> tuple[Rows, jax.Array | None]:
    """Loads the taps, the oldest token's first, and the bias."""
    load = lambda ref: _spread(p.geometry, plgpu.load(ref, layout=p.geometry.channel_layout, optimized=False), 1)  # noqa: E731
    weight = tuple(load(gmem["weight"].at[i, block.channels]) for i in range(p.width))
    return weight, load(gmem["bias"].at[block.channels]) if "bias" in gmem else None


def _filter(weight: Rows, bias: jax.Array | None, seen: Rows) -> jax.Array:
    """Sums the tokens that the filter sees, the oldest first, by its taps."""
    y = bias
    for tap, x in zip(weight, seen, strict=True):
        y = tap * x if y is None else y + tap * x
    assert y is not None
    return y


def _seen(window: Rows, reach: Any) -> Rows:
    """Zeros what is out of a token's reach in a window that ends with the token."""
    if reach is None:
        return window
    back = range(len(window) - 1, 0, -1)
    return (*(jnp.where(reach >= i, row, 0.0) for i, row in zip(back, window, strict=False)), window[-1])


def _sum_over_warps(g: Geometry, buffer: Any, row: jax.Array) -> jax.Array:
    store(buffer, row)
    plgpu.commit_smem()
    rows = [plgpu.load(buffer.at[warp], layout=g.channel_layout, optimized=False) for warp in range(WARPS)]
    plgpu.commit_smem()  # All have read the buffer before it is written again.
    return functools.reduce(jnp.add, rows)


def _load_row(g: Geometry, ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=g.row_layout, optimized=False).astype(jnp.float32)


def _load_reach(p: Problem, refs: Refs, step: tuple[Any, ...]) -> jax.Array | None:
    if "reach" not in refs or not p.history:
        return None
    reach = plgpu.load(refs["reach"].at[(*step, slice(WARPS))], layout=p.geometry.stretch_layout, optimized=False)
    return _spread(p.geometry, reach, 0)


def _spread(g: Geometry, array: jax.Array, dim: int) -> jax.Array:
    """Broadcasts to a row; costs nothing, since every lane that needs a copy has one."""
    return plgpu.layout_cast(lax.broadcast_in_dim(array, g.row_shape, (dim,)), g.row_layout)


def _zeros(g: Geometry) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(g.row_shape, jnp.float32), g.row_layout)
