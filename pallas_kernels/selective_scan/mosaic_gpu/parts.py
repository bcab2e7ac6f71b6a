"""Summaries of parts of the sequence, where a problem has too few channels to fill the GPU.

The length is cut into parts that run at the same time. What a part does to the state it receives is to let it decay and
to add what it gathers from zero, so a first kernel finds both for every part, and the main one starts each block
by carrying the state over the parts before it. The price is a second, shorter pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.elementwise import sigmoid
from pallas_kernels.mosaic_gpu_compat import synchronize
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.selective_scan.mosaic_gpu import blocks
from pallas_kernels.selective_scan.mosaic_gpu.blocks import Problem, State
from pallas_kernels.selective_scan.mosaic_gpu.stream import Stream


def summarize(p: Problem, inputs: Mapping[str, jax.Array], *, reverse: bool) -> dict[str, jax.Array]:
    """Finds what each part does to a state that passes through it.

    Args:
        p: shapes and options.
        inputs: as ``Problem`` describes them; for ``reverse`` with "dy", the output's gradient.
        reverse: whether it is the state's gradient that passes, from the last part to the first.

    Returns:
        "part_state", (batch, parts, *tile of all channels), what a part adds; "part_steps", (batch, parts, channels),
        the sum of its step sizes, which with A makes its decay. Entries of the part that nothing passes are undefined.
    """
    g = p.geometry
    signal, gate = ("dy", ["z"]) if reverse else ("x", [])
    streamed = [name for name in (signal, "delta", "BC", "keep", *gate) if name in inputs]
    outputs = {
        "part_state": p.state_type(p.num_parts),
        "part_steps": jax.ShapeDtypeStruct((p.batch, p.num_parts, p.channels), jnp.float32),
    }
    scratch = p.buffers(inputs, streamed) | {
        "tokens": p.token_columns(2),
    }

    def summarize_parts(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        if reverse:
            block = block._replace(part=block.part + 1)
        A = blocks.load_A(g, gmem, block)
        p.load_parameters(gmem, smem, block)

        def chunk(index: Any, refs: Refs, carry: tuple[State, tuple[jax.Array, ...]]) -> Any:
            state, totals = carry
            step_sizes = [p.step_sizes(smem, refs, index, channels) for channels in g.token_tiles()]
            signals = []
            for channels, step_size in zip(g.token_tiles(), step_sizes, strict=True):
                value = blocks.load_token(g, refs[signal], channels)
                if "z" in refs:
                    z = blocks.load_token(g, refs["z"], channels)
                    value = value * (z * sigmoid(z))
                signals.append(value if reverse else step_size * value)
            blocks.store_tokens(g, smem["tokens"], step_sizes, column=0)
            blocks.store_tokens(g, smem["tokens"], signals, column=1)
            synchronize()
            totals = tuple(total + step_size for total, step_size in zip(totals, step_sizes, strict=True))
            return _walk(p, refs, smem, A, state, reverse), totals

        totals = tuple(blocks.zero_tokens(g) for _ in g.token_tiles())
        state, totals = Stream(p, gmem, smem, streamed, block, reverse=reverse).walk(
            chunk, (blocks.zero_state(g), totals)
        )
        blocks.store_state(g, gmem["part_state"].at[block.batch, block.part, :, block.channels], state)
        blocks.store_sums(g, gmem["part_steps"].at[block.batch, block.part], block, totals)

    return p.launch(summarize_parts, inputs, outputs, scratch, num_parts=p.num_parts - 1)


def _walk(p: Problem, refs: Refs, smem: Refs, A: State, state: State, reverse: bool) -> State:
    """Takes the steps of a chunk."""
    g = p.geometry

    def load(t: Any) -> tuple[jax.Array, jax.Array]:
        row = blocks.load_C(g, refs, t) if reverse else blocks.load_B(g, refs, t)
        return blocks.load_columns(g, smem["tokens"], t, 2), row

    def take(t: Any, operands: tuple[jax.Array, jax.Array], state: State) -> State:
        columns, row = operands
        step_size, signal = blocks.spread_columns(g, columns)
        row = blocks.spread_matrix(g, row)
        keep = refs["keep"][t] if "keep" in refs else None
        decay = [blocks.decay(s, a, keep) for s, a in zip(step_size, A, strict=True)]
        gain = [s * row for s in signal]
        if reverse:
            return tuple(decay[i] * (state[i] + gain[i]) for i in range(g.tiles))
        return tuple(decay[i] * state[i] + gain[i] for i in range(g.tiles))

    return blocks.take_steps(g.steps, g.unroll, lambda i: g.steps - 1 - i if reverse else i, load, take, state)
