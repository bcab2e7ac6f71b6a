"""Forward kernel of the trapezoidal SSD operator: one walk over the chunks, the states in registers.

A block has one head or two, which do not wait for each other, and two warpgroups for each. The maker loads a chunk,
makes the head's B and C of the group's, and the weights of the inputs; the walker, a chunk behind, has the state.
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

from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Block, Problem

_EVEN_SHARE = 128
"""Registers of a lane, where four warpgroups have the same."""
_REGISTERS = {"walk": 168, "make": 88}
"""Of a lane of each warpgroup, where a block has two heads. With one head there are enough for all."""

_LOADED = ("B", "C", "x", "tokens", "angles")


def shared_memory(heads: int, stages: int, state: int, pairs: int, token_rows: int) -> int:
    """Bytes of a block."""
    square, matrix = CHUNK * CHUNK * 2, CHUNK * state * 2
    stage = 2 * matrix + 2 * square + token_rows * CHUNK * 4 + CHUNK * pairs * 2
    return heads * (stages * stage + 2 * state * 4)


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, save_states: bool) -> dict[str, jax.Array]:
    """Computes y and the state after each part.

    Args:
        p: shapes; warpgroups are heads here.
        inputs: as ``Problem`` describes them: "x", "B", "C", "tokens" with own weights, "angles", "start", perhaps "D",
            "B_bias" and "C_bias".
        save_states: whether the backward pass will want the state before each chunk.

    Returns:
        "y" like "x"; "end" as "start" would be, the state after each part; with ``save_states`` also "states".
    """
    dtype, slots = inputs["x"].dtype, (p.warpgroups, p.stages)
    outputs: dict[str, Any] = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "end": p.part_states_type(),
    }
    if save_states:
        outputs["states"] = p.states_type(dtype)
    scratch = {
        # That of the state on its way out, too.
        "B": blocks.operand(*slots, CHUNK, p.state, dtype=dtype),
        "C": blocks.operand(*slots, CHUNK, p.state, dtype=dtype),
        # That of y, too.
        "x": blocks.operand(*slots, CHUNK, CHANNELS, dtype=dtype),
        "tokens": plgpu.SMEM((*slots, p.token_rows, CHUNK), jnp.float32),
        "angles": plgpu.SMEM((*slots, CHUNK, p.pairs), jnp.int16),
        "weights": blocks.operand(*slots, CHUNK, CHUNK, dtype=dtype),
        **turning.bias_buffers(p, inputs, ["B", "C"]),
        "full": plgpu.Barrier(num_arrivals=len(_LOADED), num_barriers=p.warpgroups * p.stages),
        "made": plgpu.Barrier(num_barriers=p.warpgroups * p.stages),
        "free": plgpu.Barrier(num_barriers=p.warpgroups * p.stages),
    }

    def forward(gmem: Refs, smem: Refs) -> None:
        warpgroup = lax.axis_index("warpgroup")
        walker, maker = (_Block(p, gmem, smem, place) for place in (warpgroup, warpgroup - p.warpgroups))
        pl.when(warpgroup < p.warpgroups)(walker.walk)
        pl.when(warpgroup >= p.warpgroups)(maker.make)

    grid = {"part": p.parts, "batch": p.batch, "heads": p.groups * p.blocks_per_group}
    return launch("trapezoidal_ssd", forward, inputs, outputs, scratch, grid, warpgroups=2 * p.warpgroups)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What two warpgroups do with one of the block's heads."""

    p: Problem
    gmem: Refs
    smem: Refs
    place: Any
    """Of the head among the block's."""

    @property
    def block(self) -> Block:
        return self.p.block(self.place)

    @property
    def count(self) -> Any:
        """Chunks to walk over."""
        return self.p.chunks_of_part(lax.axis_index("part"))

    def chunk(self, i: Any) -> Any:
        """The i-th of them."""
        return lax.axis_index("part") * self.p.chunks_per_part + i

    def slot(self, i: Any) -> Any:
        """Where the i-th chunk is in shared memory."""
        return lax.rem(i, self.p.stages)

    def refs(self, i: Any) -> Refs:
        """References to what there is of the i-th chunk in shared memory."""
        return {name: self.smem[name].at[self.place, self.slot(i)] for name in (*_LOADED, "weights")}

    def barrier(self, name: str, i: Any) -> Any:
        """The i-th chunk's."""
        return self.smem[name].at[self.place * self.p.stages + self.slot(i)]

    def take_registers(self, work: str) -> None:
        """Gives up registers, or waits for those that others give up."""
        if self.p.warpgroups > 1:
            registers = _REGISTERS[work]
            plgpu.set_max_registers(registers, action="increase" if registers > _EVEN_SHARE else "decrease")

    def load(self, i: Any) -> None:
        """Starts the copies of the i-th chunk."""
        block, chunk, refs = self.block, self.chunk(i), self.refs(i)
        for name in _LOADED:
            match name:
                case "B" | "C":
                    place = (blocks.chunk_rows(chunk), self.p.matrix_columns(block.group))
                case "x":
                    place = (blocks.chunk_rows(chunk), blocks.head_channels(block.head))
                case _:
                    place = (self.p.token_head(block.head), chunk)
            plgpu.copy_gmem_to_smem(self.gmem[name].at[block.batch, *place], refs[name], self.barrier("full", i))

    def make(self) -> None:
        """The maker's work."""
        self.take_registers("make")
        p, stages, count = self.p, self.p.stages, self.count
        for i in range(stages):
            pl.when(i < count)(functools.partial(self.load, i))
        row, column = blocks.token_coordinates(p.rank)
        biases = turning.biases(p, self.gmem, self.smem, self.block, ["B", "C"])

        def step(i: Any, carry: None) -> None:
            del carry
            refs = self.refs(i)
            plgpu.barrier_wait(self.barrier("full", i))
            turn = turning.turn_by(refs["angles"])
            for name in ("B", "C"):
                turning.turn_into(refs[name], blocks.load_operand(refs[name]), turn, biases[name])
            plgpu.commit_smem()
            # A row is a token that was added, a column one that sees it.
            scores, decays = blocks.products(
                ([(refs["B"], blocks.transposed(refs["C"]))], None),
                meanwhile=functools.partial(blocks.decays, refs["tokens"], transpose=True, rank=p.rank),
            )
            weights = jnp.where(row <= column, scores * decays, 0.0)
            store(refs["weights"], weights.astype(refs["weights"].dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.barrier("made", i))

            @pl.when((i > 0) & (i - 1 + stages < count))
            def _() -> None:
                plgpu.barrier_wait(self.barrier("free", i - 1))
                self.load(i - 1 + stages)

        lax.fori_loop(0, count, step, None)

    def walk(self) -> None:
        """The walker's work."""
        self.take_registers("walk")
        p, gmem, block, count = self.p, self.gmem, self.block, self.count
        dtype = self.smem["x"].dtype
        D = blocks.load(gmem["D"].at[block.head], blocks.ROWS) if "D" in gmem else None

        # Tokens are columns here, so that the state, as it leaves a matrix instruction, is ready to enter the next.
        def step(i: Any, state: jax.Array) -> jax.Array:
            refs, chunk = self.refs(i), self.chunk(i)
            tokens, B, C = refs["tokens"], refs["B"], blocks.transposed(refs["C"])
            for name in ("full", "made"):
                plgpu.barrier_wait(self.barrier(name, i))
            whole = tokens[0, CHUNK - 1]

            def weigh() -> tuple[jax.Array, jax.Array]:
                # Copies out of the chunk before.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(self.barrier("free", i - 1)))
                x = blocks.load_operand(blocks.transposed(refs["x"]))
                to_end = jnp.exp2(whole - blocks.load(tokens.at[1], blocks.COLUMNS))
                return x, (x.astype(jnp.float32) * blocks.by_column(to_end, CHANNELS)).astype(dtype)

            y, (x, weighted) = blocks.products(([(state.astype(dtype), C)], None), meanwhile=weigh)
            y = y * blocks.by_column(jnp.exp2(blocks.load(tokens.at[0], blocks.COLUMNS)), CHANNELS)
            y, state = blocks.products(([(x, refs["weights"])], y), ([(weighted, B)], state * jnp.exp2(whole)))
            if D is not None:
                y = y + x.astype(jnp.float32) * blocks.by_row(D, CHUNK)
            # The product reads B, and it ends in each warp by itself: no warp may write before all have ended.
            synchronize()
            store(blocks.transposed(refs["x"]), y.astype(dtype))
            if "states" in gmem:
                store(B, state.astype(dtype))
            plgpu.commit_smem()
            rows, channels = blocks.chunk_rows(chunk), blocks.head_channels(block.head)
            plgpu.copy_smem_to_gmem(refs["x"], gmem["y"].at[block.batch, rows, channels])
            if "states" in gmem:

                @pl.when(i + 1 < count)
                def _() -> None:
                    plgpu.copy_smem_to_gmem(B, gmem["states"].at[block.batch, block.head, chunk + 1])

            return state

        state = p.start(gmem, block)
        if "states" in gmem:
            store(gmem["states"].at[block.batch, block.head, self.chunk(0)], state.astype(dtype))
        state = lax.fori_loop(0, count, step, state)
        plgpu.wait_smem_to_gmem(0)
        store(gmem["end"].at[block.batch, block.part, block.head], state)
