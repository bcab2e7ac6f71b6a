"""Gradients of B and C for more states than the backward kernel has registers for: a kernel that does nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.mosaic_gpu_stream import Stream, stream_barriers
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem

_STAGES = 3
"""Heads in shared memory at once: two blocks share a multiprocessor still."""


def weights_type(p: Problem, splits: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """Type of the weights of a chunk's own tokens in the gradients, summed over the heads of each split."""
    return jax.ShapeDtypeStruct((splits, p.batch, p.groups, p.chunks, CHUNK, CHUNK), dtype)


def into_state(signal: Any, tokens: Any) -> jax.Array:
    """x as it goes into the state after the chunk, given references to it and to the head's tokens, in registers."""
    decay = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[1], blocks.ROWS))
    return blocks.load_operand(signal) * blocks.by_row(decay.astype(signal.dtype), CHANNELS)


def from_state(signal: Any, tokens: Any) -> jax.Array:
    """dy as it goes into the gradient of the state before the chunk, likewise."""
    decay = jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS))
    return blocks.load_operand(signal) * blocks.by_row(decay.astype(signal.dtype), CHANNELS)


def gradient(
    p: Problem, inputs: Mapping[str, jax.Array], name: str, *, splits: int, first: int, dtype: Any
) -> jax.Array:
    """Computes the gradient of B or C for the states from one on.

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "x", "dy", "B", "C", "tokens", "states", "dstates"; and "weights".
        name: "B" or "C".
        splits: pieces that the heads of a group are cut into, which run at the same time; they divide these heads.
        first: of these states, no more than 128.
        dtype: of the result.

    Returns:
        (splits, batch, length, groups · states), to be summed.
    """
    signal, states, other = ("x", "dstates", "C") if name == "B" else ("dy", "states", "B")
    heads, width = p.heads_per_group // splits, p.state - first
    stages, operand_dtype = min(_STAGES, heads), inputs["x"].dtype
    streamed = {"signal": signal, "states": states, "tokens": "tokens"}
    used = {key: inputs[n] for key, n in {**streamed, "other": other, "weights": "weights"}.items()}
    output = jax.ShapeDtypeStruct((splits, p.batch, p.chunks * CHUNK, p.groups * width), dtype)
    scratch = {
        "signal": blocks.operand(stages, CHUNK, CHANNELS, dtype=operand_dtype),
        "states": blocks.operand(stages, CHANNELS, width, dtype=operand_dtype),
        "tokens": plgpu.SMEM((stages, blocks.TOKEN_ROWS, CHUNK), jnp.float32),
        "other": blocks.operand(CHUNK, width, dtype=operand_dtype),
        "weights": blocks.operand(CHUNK, CHUNK, dtype=operand_dtype),
        "loaded": plgpu.Barrier(num_arrivals=2),
        **stream_barriers(len(streamed), stages),
    }

    def matrix_gradient(gmem: Refs, smem: Refs) -> None:
        group, batch, chunk, split = (lax.axis_index(n) for n in ("group", "batch", "chunk", "split"))
        first_head, rows = group * p.heads_per_group + split * heads, blocks.chunk_rows(chunk)
        states = pl.ds(first, width)

        def sources(i: Any) -> Refs:
            head = first_head + i
            return {
                "signal": gmem["signal"].at[batch, rows, blocks.head_channels(head)],
                "states": gmem["states"].at[batch, head, chunk, :, states],
                "tokens": gmem["tokens"].at[batch, p.token_head(head), chunk],
            }

        stream = Stream(smem, sources, heads, stages)
        stream.start()
        other = gmem["other"].at[batch, rows, pl.ds(group * p.state + first, width)]
        plgpu.copy_gmem_to_smem(other, smem["other"], smem["loaded"])
        plgpu.copy_gmem_to_smem(gmem["weights"].at[split, batch, group, chunk], smem["weights"], smem["loaded"])

        def work(i: Any, refs: Refs, total: jax.Array) -> jax.Array:
            del i
            weighted = (into_state if name == "B" else from_state)(refs["signal"], refs["tokens"])
            return blocks.product((weighted, refs["states"]), plus=total)

        zeros = plgpu.layout_cast(jnp.zeros((CHUNK, width), jnp.float32), blocks.LAYOUT)
        total = stream.walk(work, zeros)
        plgpu.barrier_wait(smem["loaded"])
        weights = blocks.transposed(smem["weights"]) if name == "B" else smem["weights"]
        total = blocks.product((weights, smem["other"]), plus=total)
        target = gmem["gradient"].at[split, batch, rows, pl.ds(group * width, width)]
        store(target, total.astype(target.dtype))

    grid = {"group": p.groups, "batch": p.batch, "chunk": p.chunks, "split": splits}
    return launch("ssd", matrix_gradient, used, {"gradient": output}, scratch, grid, warpgroups=1)["gradient"]
