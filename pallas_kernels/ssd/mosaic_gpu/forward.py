"""Forward kernel of the SSD operator: one walk over the chunks, the state in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem, Refs


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, save_states: bool) -> dict[str, jax.Array]:
    """Computes y and the state after each part.

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "x", "B", "C", "tokens", "start", perhaps "D".
        save_states: whether the backward pass will want the state before each chunk.

    Returns:
        "y" like "x"; "end" like "start", the state after each part; with ``save_states`` also "states".
    """
    dtype = inputs["x"].dtype
    outputs: dict[str, Any] = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "end": p.part_states_type(),
    }
    if save_states:
        outputs["states"] = p.states_type(dtype)
    scratch = p.walk_buffers(["B", "C"], "x", dtype)
    scratch["state"] = blocks.operand(p.warpgroups, CHANNELS, p.state, dtype=dtype)
    scratch["weights"] = blocks.operand(p.warpgroups, CHUNK, CHUNK, dtype=dtype)
    scratch["weighted"] = blocks.operand(p.warpgroups, CHUNK, CHANNELS, dtype=dtype)

    def forward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        h, weights, weighted = (smem[name].at[block.warpgroup] for name in ("state", "weights", "weighted"))
        # Copies out of shared memory that may be under way when the next chunk begins: the last one is y's.
        pending = 1 if save_states else 0

        def step(chunk: Any, refs: Refs, release: Any, state: jax.Array) -> jax.Array:
            tokens, x = refs["tokens"], refs["x"]
            total, whole = blocks.load(tokens.at[0], blocks.ROWS), tokens[0, CHUNK - 1]
            to_end = jnp.exp2(whole - blocks.load(tokens.at[1], blocks.ROWS))
            if save_states:
                plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
            store(h, state.astype(dtype))
            store(weighted, (blocks.load(x) * blocks.by_row(to_end, CHANNELS)).astype(dtype))
            plgpu.commit_smem()
            if save_states:
                plgpu.copy_smem_to_gmem(h, gmem["states"].at[block.batch, block.head, chunk])

            y, scores = blocks.products(
                ([(refs["C"], blocks.transposed(h))], None), ([(refs["C"], blocks.transposed(refs["B"]))], None)
            )
            store(weights, blocks.decayed(scores, tokens).astype(dtype))
            y = y * blocks.by_row(jnp.exp2(total), CHANNELS)
            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
            release()
            plgpu.commit_smem()
            y, state = blocks.products(
                ([(weights, x)], y), ([(blocks.transposed(weighted), refs["B"])], state * jnp.exp2(whole))
            )
            if "D" in gmem:
                D = blocks.load(gmem["D"].at[block.head], blocks.COLUMNS)
                y = y + blocks.load(x) * blocks.by_column(D, CHUNK)
            synchronize()
            store(x, y.astype(dtype))
            plgpu.commit_smem()
            rows, channels = blocks.chunk_rows(chunk), blocks.head_channels(block.head)
            plgpu.copy_smem_to_gmem(x, gmem["y"].at[block.batch, rows, channels])
            return state

        # The product marks it as varying over a mesh's axes where the other operations' results are not.
        state = blocks.load(gmem["start"].at[block.batch, block.part, block.head]) * 1.0
        state = p.walk(gmem, smem, block, ["B", "C"], "x", step, state)
        store(gmem["end"].at[block.batch, block.part, block.head], state)

    grid = {"part": p.parts, "batch": p.batch, "heads": p.groups * p.blocks_per_group}
    return blocks.launch(forward, inputs, outputs, scratch, grid, p.warpgroups)
