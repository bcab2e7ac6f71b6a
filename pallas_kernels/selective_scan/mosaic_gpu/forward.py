"""Forward kernel of the selective scan: one walk over the sequence, the state in registers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.elementwise import sigmoid
from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.selective_scan.mosaic_gpu import blocks
from pallas_kernels.selective_scan.mosaic_gpu.blocks import Problem, State
from pallas_kernels.selective_scan.mosaic_gpu.geometry import SAVED_STEPS, Geometry
from pallas_kernels.selective_scan.mosaic_gpu.stream import Stream


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, save_states: bool) -> dict[str, jax.Array]:
    """Runs the scan.

    Args:
        p: shapes and options.
        inputs: as ``Problem`` describes them; with several parts also what ``parts.summarize`` returned.
        save_states: whether to return the state before every ``SAVED_STEPS``-th step.

    Returns:
        "y" like "x"; "final_state" like "initial_state"; with ``save_states`` "states", the same with a dimension of
        saved states after the batch.
    """
    g = p.geometry
    streamed = [name for name in ("x", "delta", "BC", "z", "keep") if name in inputs]
    outputs: dict[str, Any] = {"y": p.token_type(inputs["x"])}
    outputs["final_state"] = p.state_type()
    if save_states:
        outputs["states"] = p.state_type(p.stored_length // SAVED_STEPS)
    scratch = p.buffers(inputs, streamed) | {
        "tokens": p.token_columns(2),
        "y": p.scratch((g.steps, g.channels), inputs["x"].dtype),
        "partial_y": p.scratch((g.steps, g.state_lanes, g.padded_channels), jnp.float32),
    }

    def forward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        A = blocks.load_A(g, gmem, block)
        p.load_parameters(gmem, smem, block)

        stream = Stream(p, gmem, smem, streamed, block)
        stream.start()
        blocks.store_columns(g, smem["tokens"], _prepare(p, smem, stream.wait(0), stream.index(0)))
        synchronize()

        def chunk(i: Any, h: State) -> State:
            index, refs = stream.index(i), {**stream.refs(i), **stream.wait_shared(i)}
            for piece in range(g.steps // SAVED_STEPS):
                if save_states:
                    saved = index * (g.steps // SAVED_STEPS) + piece
                    blocks.store_state(g, gmem["states"].at[block.batch, saved, :, block.channels], h)
                h = _walk(p, refs, smem, A, h, piece * SAVED_STEPS)
            stream.release_shared(i)
            # Also waits until the last chunk's y has been copied out.
            synchronize()
            stream.refill_shared(i - 1)

            @pl.when(i + 1 < stream.count)
            def _() -> None:
                stream.wait(i + 1)

            # One phase, so that the latencies of two overlap. After the last chunk it prepares what nobody will read.
            y = [_output(g, refs, smem, channels) for channels in g.token_tiles()]
            tokens = _prepare(p, smem, stream.refs(i + 1), stream.index(i + 1))
            blocks.store_tokens(g, smem["y"], y)
            blocks.store_columns(g, smem["tokens"], tokens)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["y"], gmem["y"].at[block.batch, p.rows(index), block.channels])
            stream.refill(i)
            return h

        h = lax.fori_loop(0, stream.count, chunk, blocks.initial_state(p, gmem, block, A))
        plgpu.wait_smem_to_gmem(0)

        @pl.when(block.part == p.num_parts - 1)
        def _() -> None:
            blocks.store_state(g, gmem["final_state"].at[block.batch, :, block.channels], h)

    results = p.launch(forward, inputs, outputs, scratch)
    return results | {"y": p.trim(results["y"])}


def _prepare(p: Problem, smem: Refs, refs: Refs, index: Any) -> list[list[jax.Array]]:
    """Computes what the steps need of each token: delta', then delta' x, both by token tile."""
    g = p.geometry
    x = [blocks.load_token(g, refs["x"], channels) for channels in g.token_tiles()]
    step_sizes = [p.step_sizes(smem, refs, index, channels) for channels in g.token_tiles()]
    return [step_sizes, [s * x for s, x in zip(step_sizes, x, strict=True)]]


def _walk(p: Problem, refs: Refs, smem: Refs, A: State, h: State, start: int) -> State:
    """Takes ``SAVED_STEPS`` steps of a chunk; leaves each lane's part of C h in shared memory."""
    g = p.geometry

    def load(t: Any) -> tuple[jax.Array, ...]:
        return blocks.load_columns(g, smem["tokens"], t, 2), blocks.load_B(g, refs, t), blocks.load_C(g, refs, t)

    def take(t: Any, operands: tuple[jax.Array, ...], h: State) -> State:
        columns, B, C = operands
        step_size, x = blocks.spread_columns(g, columns)
        B, C = blocks.spread_matrix(g, B), blocks.spread_matrix(g, C)
        keep = refs["keep"][t] if "keep" in refs else None
        h = tuple(blocks.decay(step_size[tile], A[tile], keep) * h[tile] + x[tile] * B for tile in range(g.tiles))
        partial_y = jnp.concatenate([jnp.sum(tile * C, axis=2) for tile in h], axis=1)
        store(smem["partial_y"].at[t, :, : g.channels], partial_y)
        return h

    return blocks.take_steps(SAVED_STEPS, g.unroll, lambda i: start + i, load, take, h)


def _output(g: Geometry, refs: Refs, smem: Refs, channels: slice) -> jax.Array:
    """Makes y of a token tile out of the lanes' parts of C h."""
    parts = [blocks.load_token(g, smem["partial_y"].at[:, lane], channels) for lane in range(g.state_lanes)]
    y = functools.reduce(jnp.add, parts)
    if "D" in smem:
        y = y + blocks.per_channel(g, smem["D"], channels) * blocks.load_token(g, refs["x"], channels)
    if "z" in refs:
        z = blocks.load_token(g, refs["z"], channels)
        y = y * (z * sigmoid(z))
    return y
