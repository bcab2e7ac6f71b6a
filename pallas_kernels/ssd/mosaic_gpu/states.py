"""Kernel that walks over the chunks for their states alone, or for the gradients of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_compat import plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, reverse: bool, save: bool) -> dict[str, jax.Array]:
    """Carries the state over the chunks of each part, or its gradient the other way.

    With ``x``, ``B`` in the one case and ``dy``, ``C`` in the other, each times its decay to the end that is ahead::

        state = decay of the chunk · state + x^T B

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "tokens", "x", "B" or, in reverse, "dy", "C", and perhaps "start",
            "angles", "B_bias" or "C_bias".
        reverse: whether to start with the last chunk, and carry a gradient.
        save: whether to write down the state before each chunk; in reverse, its gradient after the chunk.

    Returns:
        "end", as "start" would be, what is left at the other end of each part; with ``save`` also "states".
    """
    signal, matrix = ("dy", "C") if reverse else ("x", "B")
    dtype = inputs[signal].dtype
    wanted = (signal, matrix, f"{matrix}_bias", *p.numbers, "start")
    inputs = {name: inputs[name] for name in wanted if name in inputs}
    outputs: dict[str, Any] = {"end": p.part_states_type()}
    scratch = p.walk_buffers([matrix], signal, dtype) | turning.bias_buffers(p, inputs, [matrix])
    if save:
        outputs["states"] = p.states_type(dtype)
        scratch["state"] = blocks.operand(p.warpgroups, CHANNELS, p.state, dtype=dtype)

    def states(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        bias = turning.biases(p, gmem, smem, block, [matrix])[matrix]

        def step(chunk: Any, refs: Refs, release: Any, state: jax.Array) -> jax.Array:
            tokens = refs["tokens"]
            whole = tokens[0, CHUNK - 1]
            if reverse:
                weight = jnp.exp2(blocks.load(tokens.at[0], blocks.COLUMNS))
            else:
                weight = jnp.exp2(whole - blocks.load(tokens.at[1], blocks.COLUMNS))
            if p.pairs:
                parts = turning.parts_of(p.state, p.pairs)
                turning.turn_into(parts, refs["angles"], (refs[matrix], refs[matrix], bias))
                plgpu.commit_smem()
            signals = blocks.load_operand(blocks.transposed(refs[signal]))
            weighted = signals * blocks.by_column(weight.astype(dtype), CHANNELS)
            if save:
                buffer = smem["state"].at[block.warpgroup]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store(buffer, state.astype(dtype))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, gmem["states"].at[block.batch, block.head, chunk])
            release()
            return blocks.product((weighted, refs[matrix]), plus=state * jnp.exp2(whole))

        state = p.walk(gmem, smem, block, [matrix], signal, step, p.start(gmem, block), reverse=reverse)
        store(gmem["end"].at[block.batch, block.part, block.head], state)

    grid = {"part": p.parts, "batch": p.batch, "heads": p.groups * p.blocks_per_group}
    return launch("ssd", states, inputs, outputs, scratch, grid, warpgroups=p.warpgroups)
