"""Forward kernel of the SSD operator: one walk over the chunks, the states in registers.

Of a block's warpgroups all but the last two are walkers, which have a head each. Then there is a maker: it computes
the product B Cᵀ of a chunk once for all heads, and makes of it each one's weights for the chunk that comes next. The
last one is the loader, which fills what walkers are done with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, plgpu, register_tile, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import AHEAD, CHANNELS, CHUNK, Problem

_WALKER_REGISTERS = {1: 256, 2: 192}
"""Of a lane of a walker, by their number."""
_MAKER_REGISTERS = 96
_LOADER_REGISTERS = 32

_A_NUMBER_A_LANE = register_tile([(2, CHUNK), (1, LANES), (1, 1)], warp_dims=(-6, -5), lane_dims=(-3,), vector_dim=-1)
assert 2 * CHUNK == WARPS * LANES


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, save_states: bool) -> dict[str, jax.Array]:
    """Computes y and the state after each part.

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "x", "B", "C", "tokens", perhaps "D" and "start".
        save_states: whether the backward pass will want the state before each chunk.

    Returns:
        "y" like "x"; "end" as "start" would be, the state after each part; with ``save_states`` also "states".
    """
    dtype, heads = inputs["x"].dtype, p.warpgroups
    outputs: dict[str, Any] = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "end": p.part_states_type(),
    }
    scratch = {
        **{name: blocks.operand(p.stages, CHUNK, p.state, dtype=dtype) for name in ("B", "C")},
        # That of y, too.
        "x": blocks.operand(heads, p.stages, CHUNK, CHANNELS, dtype=dtype),
        "tokens": plgpu.SMEM((heads, p.stages, blocks.TOKEN_ROWS, CHUNK), jnp.float32),
        "weights": blocks.operand(heads, AHEAD, CHUNK, CHUNK, dtype=dtype),
        "decays": plgpu.SMEM((heads, AHEAD, 2, CHUNK), jnp.float32),
        "shared_full": plgpu.Barrier(num_arrivals=2 + heads, num_barriers=p.stages),
        "x_full": plgpu.Barrier(num_arrivals=heads, num_barriers=p.stages),
        "free": plgpu.Barrier(num_arrivals=heads, num_barriers=p.stages),
        "made": plgpu.Barrier(num_barriers=heads * AHEAD),
    }
    if save_states:
        outputs["states"] = p.states_type(dtype)
        scratch["state"] = blocks.operand(heads, CHANNELS, p.state, dtype=dtype)

    def forward(gmem: Refs, smem: Refs) -> None:
        block = _Block(p, gmem, smem)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < heads)(block.walk)
        pl.when(warpgroup == heads)(block.make)
        pl.when(warpgroup == heads + 1)(block.load)

    grid = {"part": p.parts, "batch": p.batch, "heads": p.groups * p.blocks_per_group}
    return launch("ssd", forward, inputs, outputs, scratch, grid, warpgroups=heads + 2)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block does."""

    p: Problem
    gmem: Refs
    smem: Refs

    def load(self) -> None:
        """The loader's work."""
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        stages, count = self.p.stages, self.p.chunks_of_part(lax.axis_index("part"))
        for i in range(stages):
            pl.when(i < count)(functools.partial(self._load_chunk, i, i))

        def reload(i: Any, carry: None) -> None:
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(self.smem["free"].at[slot])
            self._load_chunk(i + stages, slot)

        lax.fori_loop(0, jnp.maximum(count - stages, 0), reload, None)

    def make(self) -> None:
        """The maker's work."""
        plgpu.set_max_registers(_MAKER_REGISTERS, action="decrease")
        p, smem = self.p, self.smem
        row, column = blocks.coordinates((CHUNK, CHUNK))

        def step(i: Any, carry: None) -> None:
            slot, place = lax.rem(i, p.stages), lax.rem(i, AHEAD)
            plgpu.barrier_wait(smem["shared_full"].at[slot])
            scores = blocks.product((smem["B"].at[slot], blocks.transposed(smem["C"].at[slot])))
            scores = jnp.where(row <= column, scores, 0.0)

            @pl.when(i >= AHEAD)
            def _() -> None:
                # These weights take the place of that chunk's.
                plgpu.barrier_wait(smem["free"].at[lax.rem(i - AHEAD, p.stages)])

            for walker in range(p.warpgroups):
                tokens = smem["tokens"].at[walker, slot]
                weights = scores * blocks.finite(blocks.decays(tokens, transpose=True))
                store(smem["weights"].at[walker, place], weights.astype(smem["weights"].dtype))
                store(smem["decays"].at[walker, place], _decays_at_the_ends(tokens))
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem["made"].at[walker * AHEAD + place])

        lax.fori_loop(0, p.chunks_of_part(lax.axis_index("part")), step, None)

    def _load_chunk(self, i: Any, slot: Any) -> None:
        """Starts the copies of the part's i-th chunk."""
        p, gmem, smem = self.p, self.gmem, self.smem
        block = p.block(0)
        chunk = block.part * p.chunks_per_part + i
        rows, full = blocks.chunk_rows(chunk), smem["shared_full"].at[slot]
        for name in ("B", "C"):
            source = gmem[name].at[block.batch, rows, pl.ds(block.group * p.state, p.state)]
            plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full)
        heads = [p.block(walker).head for walker in range(p.warpgroups)]
        for walker, head in enumerate(heads):
            source = gmem["tokens"].at[block.batch, p.token_head(head), chunk]
            plgpu.copy_gmem_to_smem(source, smem["tokens"].at[walker, slot], full)
        for walker, head in enumerate(heads):
            source = gmem["x"].at[block.batch, rows, blocks.head_channels(head)]
            plgpu.copy_gmem_to_smem(source, smem["x"].at[walker, slot], smem["x_full"].at[slot])

    def walk(self) -> None:
        """A walker's work."""
        plgpu.set_max_registers(_WALKER_REGISTERS[self.p.warpgroups], action="increase")
        p, gmem, smem = self.p, self.gmem, self.smem
        block = p.block()
        count, dtype = p.chunks_of_part(block.part), smem["x"].dtype
        first = block.part * p.chunks_per_part
        D = blocks.load(gmem["D"].at[block.head], blocks.ROWS) if "D" in gmem else None

        def save(chunk: Any, state: jax.Array) -> None:
            buffer = smem["state"].at[block.warpgroup]
            store(buffer, state.astype(dtype))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, gmem["states"].at[block.batch, block.head, chunk])

        # Tokens are columns here, so that the state, as it leaves a matrix instruction, is ready to enter the next.
        def step(i: Any, state: jax.Array) -> jax.Array:
            slot, place = lax.rem(i, p.stages), lax.rem(i, AHEAD)
            x_ref = blocks.transposed(smem["x"].at[block.warpgroup, slot])
            decays = smem["decays"].at[block.warpgroup, place]
            B, C = smem["B"].at[slot], blocks.transposed(smem["C"].at[slot])
            plgpu.barrier_wait(smem["shared_full"].at[slot])

            def release() -> None:
                # Copies out of the chunk before.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(smem["free"].at[lax.rem(i - 1 + p.stages, p.stages)])

            def weigh() -> tuple[jax.Array, jax.Array]:
                release()
                plgpu.barrier_wait(smem["x_full"].at[slot])
                plgpu.barrier_wait(smem["made"].at[block.warpgroup * AHEAD + place])
                to_end = blocks.load(decays.at[1], blocks.COLUMNS).astype(dtype)
                x = blocks.load_operand(x_ref)
                return x, x * blocks.by_column(to_end, CHANNELS)

            y, (x, weighted) = blocks.products(([(state.astype(dtype), C)], None), meanwhile=weigh)
            y = y * blocks.by_column(blocks.load(decays.at[0], blocks.COLUMNS), CHANNELS)
            y, state = blocks.products(
                ([(x, smem["weights"].at[block.warpgroup, place])], y),
                ([(weighted, B)], state * decays[0, CHUNK - 1]),
            )
            if D is not None:
                y = y + x.astype(jnp.float32) * blocks.by_row(D, CHUNK)
            store(x_ref, y.astype(dtype))
            if "states" in gmem:
                pl.when(i + 1 < count)(functools.partial(save, first + i + 1, state))
            plgpu.commit_smem()
            target = gmem["y"].at[block.batch, blocks.chunk_rows(first + i), blocks.head_channels(block.head)]
            plgpu.copy_smem_to_gmem(smem["x"].at[block.warpgroup, slot], target)
            return state

        state = p.start(gmem, block)
        if "states" in gmem:
            save(first, state)
        state = lax.fori_loop(0, count, step, state)
        plgpu.wait_smem_to_gmem(0)
        store(gmem["end"].at[block.batch, block.part, block.head], state)


def _decays_at_the_ends(tokens: Any) -> jax.Array:
    """What each token leaves of the state before the chunk, and what the end of the chunk has of each token's x."""
    numbers = blocks.load(tokens.at[pl.ds(0, 2)], _A_NUMBER_A_LANE)
    row = plgpu.broadcasted_iota(jnp.int32, (2, CHUNK), 0, layout=_A_NUMBER_A_LANE)
    return jnp.exp2(jnp.where(row == 0, numbers, tokens[0, CHUNK - 1] - numbers))
