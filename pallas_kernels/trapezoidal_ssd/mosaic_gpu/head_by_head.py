"""How the warpgroups of the backward kernel go from head to head: what they load, and make for each other.

B and C as they are loaded are the same for all heads of a group. Heads follow each other in ``stages`` places of shared
memory; their own B and C have one place, so that the next head's are made when all are done with the last one's. Where
the group's do not fit beside it, they are loaded there for every head, and turned where they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.ssd.mosaic_gpu import blocks, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import Problem

STREAMED = ("x", "dy", "states", "dstates", "tokens", "angles", "step_size")
"""What is loaded for each head."""
STREAMED_IF_THERE = ("D", "B_bias", "C_bias")


@dataclasses.dataclass(frozen=True)
class HeadByHead:
    """A chunk, or some of its heads: one after the other is loaded, and warpgroups share the work on each."""

    p: Problem
    splits: int
    stages: int
    gmem: Refs
    smem: Refs

    @property
    def streamed(self) -> tuple[str, ...]:
        """What is loaded for each head."""
        return tuple(name for name in (*STREAMED, *STREAMED_IF_THERE) if name in self.smem)

    @property
    def heads(self) -> int:
        return self.p.heads_per_group // self.splits

    @property
    def places(self) -> int:
        """Heads in shared memory at once: no more than there are."""
        return min(self.stages, self.heads)

    def head(self, i: Any) -> Any:
        """The block's i-th head."""
        return self.piece * self.heads + i

    @property
    def piece(self) -> Any:
        """Which of the pieces of all heads the block has."""
        return lax.axis_index("group") * self.splits + lax.axis_index("split")

    @property
    def parts(self) -> list[turning.Part]:
        """Of the state: what is in registers at once."""
        return turning.parts_of(self.p.state, self.p.pairs)

    @property
    def in_place(self) -> bool:
        """Whether the group's B and C are loaded for every head."""
        return "B" not in self.smem

    @property
    def at(self) -> tuple[Any, Any]:
        return lax.axis_index("batch"), lax.axis_index("chunk")

    def loads(self) -> None:
        """Loads the group's B and C, and then what belongs to each head: the work of a warpgroup."""
        self.load_matrices()

        def step(i: Any, carry: None) -> None:
            del carry
            slot = lax.rem(i, self.places)

            @pl.when(i >= self.places)
            def _() -> None:
                plgpu.barrier_wait(self.smem["free"].at[slot])

            self.load(i, slot)
            if self.in_place:

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_wait(self.smem["used"])
                    self.load_matrices()

        lax.fori_loop(0, self.heads, step, None)
        if self.in_place:
            plgpu.barrier_wait(self.smem["used"])

    def load_matrices(self) -> None:
        """Starts the copies of the group's B and C."""
        batch, chunk = self.at
        columns = pl.ds(lax.axis_index("group") * self.p.state, self.p.state)
        for name in ("B", "C"):
            source = self.gmem[name].at[batch, blocks.chunk_rows(chunk), columns]
            plgpu.copy_gmem_to_smem(source, self.loaded(name), self.smem["loaded"])

    def loaded(self, name: str) -> Any:
        """Reference to where the group's B or C is loaded."""
        return self.smem[f"turned_{name}" if self.in_place else name]

    def load(self, i: Any, slot: Any) -> None:
        """Starts the copies of what belongs to the i-th head."""
        (batch, chunk), head = self.at, self.head(i)
        for name in self.streamed:
            match name:
                case "x" | "dy":
                    source = self.gmem[name].at[batch, blocks.chunk_rows(chunk), blocks.head_channels(head)]
                case "D":
                    source = self.gmem[name].at[head]
                case "B_bias" | "C_bias":
                    source = self.gmem[name].at[self.p.token_head(head)]
                case "states" | "dstates":
                    source = self.gmem[name].at[batch, head, chunk]
                case _:
                    source = self.gmem[name].at[batch, self.p.token_head(head), chunk]
            plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], self.smem["full"].at[slot])

    def over_heads(self, work: Any, carry: Any = None, *, turns: str | None = None) -> Any:
        """Calls ``work(head, refs, carry) -> carry`` for each head, with references to what belongs to it.

        Args:
            work: of a warpgroup, which must arrive at "used" once, when it no longer needs the head's B and C.
            carry: passed from head to head.
            turns: the matrix that this warpgroup makes for every head, if it makes one.
        """
        if turns is not None and not self.in_place:
            plgpu.barrier_wait(self.smem["loaded"])

        def step(i: Any, carry: Any) -> Any:
            slot, head = lax.rem(i, self.places), self.head(i)
            plgpu.barrier_wait(self.smem["full"].at[slot])
            refs = {name: self.smem[name].at[slot] for name in self.streamed}
            if turns is not None:
                if self.in_place:
                    plgpu.barrier_wait(self.smem["loaded"])
                else:
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(self.smem["used"]))
                self.turn(turns, head, refs)
                plgpu.barrier_arrive(self.smem["turned"])
            plgpu.barrier_wait(self.smem["turned"])
            carry = work(head, refs, carry)
            plgpu.barrier_arrive(self.smem["free"].at[slot])
            return carry

        carry = lax.fori_loop(0, self.heads, step, carry)
        if turns is not None and not self.in_place:
            plgpu.barrier_wait(self.smem["used"])
        return carry

    def turn(self, name: str, head: Any, refs: Refs) -> None:
        """Makes a head's B or C."""
        target, source = self.smem[f"turned_{name}"], self.loaded(name)
        turning.turn_into(self.parts, refs["angles"], (target, source, self.bias(name, head, refs)))
        plgpu.commit_smem()

    def bias(self, matrix: str, head: Any, refs: Refs) -> Any:
        """Reference to the head's bias of B or C, or None."""
        name = f"{matrix}_bias"
        if name in refs:
            return refs[name]
        return self.gmem[name].at[self.p.token_head(head)] if name in self.gmem else None
