"""Forward kernel of the trapezoidal SSD operator: the SSD operator's, for heads that make a B and C of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem

_LARGEST_AT_ONCE = 192
"""State beside which scores and what the state adds to y are multiplied at once. Where registers do not suffice the
compiler waits for each matrix instruction before it starts the next."""


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, save_states: bool) -> dict[str, jax.Array]:
    """Computes y and the state after each part.

    Args:
        p: shapes, of one warpgroup a block.
        inputs: as ``Problem`` describes them: "x", "B", "C", "tokens" with own weights, "angles", "start", perhaps "D",
            "B_bias" and "C_bias".
        save_states: whether the backward pass will want the state before each chunk.

    Returns:
        "y" like "x"; "end" as "start" would be, the state after each part; with ``save_states`` also "states".
    """
    dtype = inputs["x"].dtype
    outputs: dict[str, Any] = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "end": p.part_states_type(),
    }
    if save_states:
        outputs["states"] = p.states_type(dtype)
    scratch = p.walk_buffers(["B", "C"], "x", dtype) | turning.bias_buffers(p, inputs, ["B", "C"])
    scratch["weights"] = blocks.operand(CHUNK, CHUNK, dtype=dtype)

    def forward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        weights = smem["weights"]
        # Beside a larger state registers have no place for the results of two products, or what is made meanwhile.
        at_once = p.state <= _LARGEST_AT_ONCE
        row, column = blocks.token_coordinates(p.rank)
        biases = turning.biases(p, gmem, smem, block, ["B", "C"])
        D = blocks.load(gmem["D"].at[block.head], blocks.ROWS) if "D" in gmem else None

        # Tokens are columns here, so that the state, as it leaves a matrix instruction, is ready to enter the next.
        def step(chunk: Any, refs: Refs, release: Any, state: jax.Array) -> jax.Array:
            tokens, B, C = refs["tokens"], refs["B"], blocks.transposed(refs["C"])
            whole = tokens[0, CHUNK - 1]
            in_place = [(refs[name], refs[name], biases[name]) for name in ("B", "C")]
            turning.turn_into(turning.parts_of(p.state, p.pairs), refs["angles"], *in_place)
            plgpu.commit_smem()

            def load_decays() -> jax.Array:
                return blocks.decays(tokens, transpose=True, rank=p.rank)

            def load_x() -> tuple[jax.Array, jax.Array]:
                x = blocks.load_operand(blocks.transposed(refs["x"]))
                to_end = jnp.exp2(whole - blocks.load(tokens.at[1], blocks.COLUMNS))
                return x, (x.astype(jnp.float32) * blocks.by_column(to_end, CHANNELS)).astype(dtype)

            if at_once:
                scores, y, (decays, (x, weighted)) = blocks.products(
                    ([(B, C)], None), ([(state.astype(dtype), C)], None), meanwhile=lambda: (load_decays(), load_x())
                )
            else:
                scores, decays = blocks.products(([(B, C)], None), meanwhile=load_decays)
            store(weights, jnp.where(row <= column, scores * decays, 0.0).astype(dtype))
            plgpu.commit_smem()
            # Of the chunk before.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            release()

            if not at_once:
                y = blocks.product((state.astype(dtype), C))
                x, weighted = load_x()
            y = y * blocks.by_column(jnp.exp2(blocks.load(tokens.at[0], blocks.COLUMNS)), CHANNELS)
            y, state = blocks.products(([(x, weights)], y), ([(weighted, B)], state * jnp.exp2(whole)))
            if D is not None:
                y = y + x.astype(jnp.float32) * blocks.by_row(D, CHUNK)
            store(blocks.transposed(refs["x"]), y.astype(dtype))
            if save_states:
                # The product reads B, and it ends in each warp by itself: no warp may write before all have ended.
                synchronize()
                store(B, state.astype(dtype))
            plgpu.commit_smem()
            rows, channels = blocks.chunk_rows(chunk), blocks.head_channels(block.head)
            plgpu.copy_smem_to_gmem(refs["x"], gmem["y"].at[block.batch, rows, channels])
            if save_states:

                @pl.when((lax.rem(chunk + 1, p.chunks_per_part) != 0) & (chunk + 1 < p.chunks))
                def _() -> None:
                    plgpu.copy_smem_to_gmem(B, gmem["states"].at[block.batch, block.head, chunk + 1])

            return state

        start = p.start(gmem, block)
        if save_states:
            first = block.part * p.chunks_per_part
            store(gmem["states"].at[block.batch, block.head, first], start.astype(dtype))
        state = p.walk(gmem, smem, block, ["B", "C"], "x", step, start)
        store(gmem["end"].at[block.batch, block.part, block.head], state)

    grid = {"part": p.parts, "batch": p.batch, "heads": p.groups * p.blocks_per_group}
    return launch("trapezoidal_ssd", forward, inputs, outputs, scratch, grid, warpgroups=p.warpgroups)
