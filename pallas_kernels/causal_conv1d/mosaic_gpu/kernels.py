"""Kernels of the causal convolution, forward and backward: one read of every input, one write of every output.

A lane walks over the tokens with the last width - 1 of them in registers, so a token is read from memory once although
every output needs several. The backward kernel walks in the same direction: the gradient of an input is complete
width - 1 tokens later, so it gathers in registers until then, and runs width - 1 tokens ahead of what it stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.causal_conv1d.mosaic_gpu import blocks
from pallas_kernels.causal_conv1d.mosaic_gpu.blocks import Block, Problem, Rows
from pallas_kernels.elementwise import sigmoid
from pallas_kernels.mosaic_gpu_compat import WARPS, plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch


class Carry(NamedTuple):
    """What the backward walk remembers from token to token."""

    x: Rows
    """The last width - 1 inputs, the oldest first."""
    dx: Rows
    """Their gradients so far."""
    dweight: Rows
    dbias: Rows
    """One array, or none where there is no bias."""


def forward(p: Problem, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """Computes y."""
    g = p.geometry
    x = inputs["x"]
    streamed = [name for name in ("x", "reach") if name in inputs]
    scratch = blocks.buffers(p, streamed, x.dtype)
    if p.history:
        scratch["head_x"] = plgpu.SMEM((WARPS, p.history, g.channels), x.dtype)
        scratch["head_barrier"] = plgpu.Barrier(num_arrivals=WARPS)

    def forward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        blocks.start_stream(p, gmem, smem, streamed, block, lead=0)
        weight, bias = blocks.parameters(p, gmem, block)
        history: Rows = ()
        if p.history:
            plgpu.warp_map(lambda warp: blocks.load_history(p, gmem, smem, block, warp))
            plgpu.barrier_wait(smem["head_barrier"])
            history = tuple(blocks.load_row(g, smem["head_x"].at[:, i]) for i in range(p.history))

        def chunk(index: Any, refs: Refs, history: Rows) -> Rows:
            def steps(i: Any, history: Rows) -> Rows:
                rows = [i * g.unroll + u for u in range(g.unroll)]
                # Loaded before the first store, past which the compiler would not move them.
                loaded = [(blocks.load_row(g, refs["x"].at[:, t]), blocks.load_reach(p, refs, (t,))) for t in rows]
                for t, (x, reach) in zip(rows, loaded, strict=True):
                    y = _filter(weight, bias, _seen((*history, x), reach))
                    if p.silu:
                        y = y * sigmoid(y)
                    store(refs["x"].at[:, t], y.astype(refs["x"].dtype))
                    history = (*history, x)[1:]
                return history

            history = lax.fori_loop(0, g.steps // g.unroll, steps, history)
            blocks.store_chunk(p, refs["x"], gmem["y"], block, index)
            return history

        blocks.stream(p, gmem, smem, streamed, block, chunk, history, lead=0)

    return launch("causal_conv1d", forward, inputs, {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}, scratch, p.grid)["y"]


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
    scratch = blocks.buffers(p, streamed, x.dtype) | {"totals": plgpu.SMEM(g.row_shape, jnp.float32)}
    if p.history:
        scratch["head_x"] = plgpu.SMEM((WARPS, 2 * p.history, g.channels), x.dtype)
        scratch["head_dy"] = plgpu.SMEM((WARPS, p.history, g.channels), x.dtype)
        scratch["head_barrier"] = plgpu.Barrier(num_arrivals=3 * WARPS)
    if "initial_state" in inputs:
        outputs["dinitial_state"] = jax.ShapeDtypeStruct(inputs["initial_state"].shape, x.dtype)

    def backward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        blocks.start_stream(p, gmem, smem, streamed, block, lead=p.history)
        weight, bias = blocks.parameters(p, gmem, block)

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
                    (
                        blocks.load_row(g, refs["x"].at[:, t]),
                        blocks.load_row(g, refs["dy"].at[:, t]),
                        blocks.load_reach(p, refs, (t,)),
                    )
                    for t in rows
                ]
                for t, token in zip(rows, loaded, strict=True):
                    carry, dx = step(carry, *token)
                    store(refs["x"].at[:, t], dx.astype(refs["x"].dtype))
                return carry

            carry = lax.fori_loop(0, g.steps // g.unroll, steps, carry)
            blocks.store_chunk(p, refs["x"], gmem["dx"], block, index)
            return carry

        zeros = blocks.zeros(g)
        carry = Carry((), (), (zeros,) * p.width, (zeros,) * num_biases)
        if p.history:
            carry = _walk_head(p, gmem, smem, block, step, carry)
        carry = blocks.stream(p, gmem, smem, streamed, block, chunk, carry, lead=p.history)
        for i, total in enumerate((*carry.dweight, *carry.dbias)):
            target = gmem["dparameters"].at[block.batch, block.index, i, block.channels]
            store(target, blocks.sum_over_warps(g, smem["totals"], total))

    results = launch("causal_conv1d", backward, inputs, outputs, scratch, p.grid)
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

    def load(warp: Any) -> None:
        blocks.load_history(p, gmem, smem, block, warp)
        tokens = pl.ds(p.first_token(block, warp), p.history)
        for name, rows in (("x", slice(p.history, 2 * p.history)), ("dy", slice(p.history))):
            source = gmem[name].at[block.batch, tokens, block.channels]
            plgpu.copy_gmem_to_smem(source, smem[f"head_{name}"].at[warp, rows], smem["head_barrier"])

    plgpu.warp_map(load)
    plgpu.barrier_wait(smem["head_barrier"])

    carry = carry._replace(
        x=tuple(blocks.load_row(g, smem["head_x"].at[:, i]) for i in range(p.history)),
        dx=(blocks.zeros(g),) * p.history,
    )
    for i in range(p.history):
        x = blocks.load_row(g, smem["head_x"].at[:, p.history + i])
        dy = blocks.load_row(g, smem["head_dy"].at[:, i])
        carry, dx = step(carry, x, dy, blocks.load_reach(p, gmem, (block.batch, block.index, i)))
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
