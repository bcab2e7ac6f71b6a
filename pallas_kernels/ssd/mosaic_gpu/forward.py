"""Forward kernel of the SSD operator: one walk over the chunks, the state in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_compat import plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, save_states: bool) -> dict[str, jax.Array]:
    """Computes y and the state after each part.

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "x", "B", "C", "tokens", perhaps "D" and "start".
        save_states: whether the backward pass will want the state before each chunk.

    Returns:
        "y" like "x"; "end" as "start" would be, the state after each part; with ``save_states`` also "states".
    """
    dtype = inputs["x"].dtype
    outputs: dict[str, Any] = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "end": p.part_states_type(),
    }
    scratch = p.walk_buffers(["B", "C"], "x", dtype)
    # A comparison for each number would cost more instructions.
    scratch["causal"] = blocks.operand(CHUNK, CHUNK, dtype=dtype)
    scratch["weights"] = blocks.operand(p.warpgroups, CHUNK, CHUNK, dtype=dtype)
    if save_states:
        outputs["states"] = p.states_type(dtype)
        scratch["state"] = blocks.operand(p.warpgroups, CHANNELS, p.state, dtype=dtype)

    def forward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        weights = smem["weights"].at[block.warpgroup]
        D = blocks.load(gmem["D"].at[block.head], blocks.ROWS) if "D" in gmem else None

        row, column = blocks.coordinates((CHUNK, CHUNK))
        store(smem["causal"], jnp.where(row <= column, 1.0, 0.0).astype(dtype))
        plgpu.commit_smem()

        # Tokens are columns here, so that the state, as it leaves a matrix instruction, is ready to enter the next.
        def step(chunk: Any, refs: Refs, release: Any, state: jax.Array) -> jax.Array:
            tokens, B, C = refs["tokens"], refs["B"], blocks.transposed(refs["C"])
            whole = tokens[0, CHUNK - 1]
            if save_states:
                buffer = smem["state"].at[block.warpgroup]
                # All copies of the chunk before but that of y.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                store(buffer, state.astype(dtype))

            scores = blocks.product((B, C)) * blocks.finite(blocks.decays(tokens, transpose=True))
            store(weights, scores.astype(dtype) * blocks.load_operand(smem["causal"]))
            # Of the chunk before.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            release()
            plgpu.commit_smem()
            if save_states:
                plgpu.copy_smem_to_gmem(buffer, gmem["states"].at[block.batch, block.head, chunk])

            y = blocks.product((state.astype(dtype), C))
            y = y * blocks.by_column(jnp.exp2(blocks.load(tokens.at[0], blocks.COLUMNS)), CHANNELS)
            to_end = jnp.exp2(whole - blocks.load(tokens.at[1], blocks.COLUMNS))
            x = blocks.load_operand(blocks.transposed(refs["x"]))
            weighted = (x.astype(jnp.float32) * blocks.by_column(to_end, CHANNELS)).astype(dtype)
            y, state = blocks.products(([(x, weights)], y), ([(weighted, B)], state * jnp.exp2(whole)))
            if D is not None:
                y = y + x.astype(jnp.float32) * blocks.by_row(D, CHUNK)
            store(blocks.transposed(refs["x"]), y.astype(dtype))
            plgpu.commit_smem()
            rows, channels = blocks.chunk_rows(chunk), blocks.head_channels(block.head)
            plgpu.copy_smem_to_gmem(refs["x"], gmem["y"].at[block.batch, rows, channels])
            return state

        state = p.walk(gmem, smem, block, ["B", "C"], "x", step, p.start(gmem, block))
        store(gmem["end"].at[block.batch, block.part, block.head], state)

    grid = {"part": p.parts, "batch": p.batch, "heads": p.groups * p.blocks_per_group}
    return launch("ssd", forward, inputs, outputs, scratch, grid, warpgroups=p.warpgroups)
