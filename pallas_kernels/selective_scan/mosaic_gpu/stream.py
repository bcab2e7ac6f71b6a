"""The stream of chunks that a warpgroup walks over: loads of the next ones while one is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
from jax import lax

from pallas_kernels.mosaic_gpu_compat import WARPS, plgpu
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.selective_scan.mosaic_gpu.blocks import SHARED, Block, Problem


@dataclasses.dataclass(frozen=True)
class Stream:
    """Chunks of one part of the sequence, in slots of shared memory.

    What differs between channels is loaded by each warpgroup for itself. B and C are loaded by the first warpgroup for
    all of the block, which ties the others to it.
    """

    problem: Problem
    gmem: Refs
    smem: Refs
    names: Sequence[str]
    """Inputs to load."""
    block: Block
    reverse: bool = False
    """Whether the last chunk comes first."""

    @property
    def count(self) -> int:
        return self.problem.chunks_per_part

    def index(self, i: Any) -> Any:
        """Number in the sequence of the stream's i-th chunk."""
        return self.block.part * self.count + (self.count - 1 - i if self.reverse else i)

    def start(self) -> None:
        """Begins to load the first chunks."""
        for i in range(self.problem.stages):
            self._load(i)

        @pl.when(self.block.warpgroup == 0)
        def _() -> None:
            for i in range(self.problem.shared_stages):
                self._load_shared(i)

    def wait(self, i: Any) -> Refs:
        """Waits for what differs between channels; returns references to it by name."""
        plgpu.barrier_wait(self._loaded(self._slot(i)))
        return self.refs(i)

    def refs(self, i: Any) -> Refs:
        """References to what differs between channels, by name."""
        return {name: self.smem[name].at[self._slot(i)] for name in self.names if name not in SHARED}

    def wait_shared(self, i: Any) -> Refs:
        """Waits for what all channels share; returns references to it by name."""
        slot = self._shared_slot(i)
        plgpu.barrier_wait(self.smem["shared_loaded"].at[slot])
        return {name: self.smem[name].at[slot] for name in self.names if name in SHARED}

    def refill(self, i: Any) -> None:
        """Loads a later chunk into the slot of a chunk that all warps of the warpgroup have read."""
        if self.count > self.problem.stages:

            @pl.when((i >= 0) & (i + self.problem.stages < self.count))
            def _() -> None:
                self._load(i + self.problem.stages)

    def release_shared(self, i: Any) -> None:
        """Tells the first warpgroup that this one has read what is shared."""
        if self.problem.geometry.warpgroups > 1:
            plgpu.barrier_arrive(self.smem["shared_read"].at[self._shared_slot(i)])

    def refill_shared(self, i: Any) -> None:
        """Loads a later chunk into the shared slot of one that this warpgroup has read, once all others have too."""
        if self.count > self.problem.shared_stages:

            @pl.when((self.block.warpgroup == 0) & (i >= 0) & (i + self.problem.shared_stages < self.count))
            def _() -> None:
                if self.problem.geometry.warpgroups > 1:
                    plgpu.barrier_wait(self.smem["shared_read"].at[self._shared_slot(i)])
                self._load_shared(i + self.problem.shared_stages)

    def walk(self, chunk: Callable[[Any, Refs, Any], Any], carry: Any) -> Any:
        """Takes one chunk after the other.

        Args:
            chunk: ``chunk(index, refs, carry) -> carry``, with references to the loaded chunk by name. It may leave
                results in those that are not shared, and start copies out of them.
            carry: passed from chunk to chunk.
        """
        self.start()

        def step(i: Any, carry: Any) -> Any:
            # Before the last chunk's slot is filled again, copies out of it must have ended and all warps have read it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.refill(i - 1)
            self.refill_shared(i - 1)
            carry = chunk(self.index(i), {**self.wait(i), **self.wait_shared(i)}, carry)
            self.release_shared(i)
            return carry

        carry = lax.fori_loop(0, self.count, step, carry)
        plgpu.wait_smem_to_gmem(0)
        return carry

    def _slot(self, i: Any) -> Any:
        return lax.rem(i, self.problem.stages)

    def _shared_slot(self, i: Any) -> Any:
        return lax.rem(i, self.problem.shared_stages)

    def _loaded(self, slot: Any) -> Any:
        return self.smem["loaded"].at[self.block.warpgroup * self.problem.stages + slot]

    def _load(self, i: Any) -> None:
        slot, rows = self._slot(i), self.problem.rows(self.index(i))
        share_out(
            [
                functools.partial(
                    plgpu.copy_gmem_to_smem,
                    self.gmem[name].at[self.block.batch, rows, self.block.channels],
                    self.smem[name].at[slot],
                    self._loaded(slot),
                )
                for name in self.names
                if name not in SHARED
            ]
        )

    def _load_shared(self, i: Any) -> None:
        slot, index = self._shared_slot(i), self.index(i)
        sources = {
            "BC": lambda ref: ref.at[self.block.batch, self.problem.rows(index), self.block.group],
            "keep": lambda ref: ref.at[self.block.batch, index],
        }
        for name in self.names:
            if name in SHARED:
                source = sources[name](self.gmem[name])
                plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], self.smem["shared_loaded"].at[slot])


def share_out(copies: Sequence[Callable[[], None]]) -> None:
    """Starts copies, each in another warp: one is some twenty instructions, which all warps would execute otherwise."""

    def start(warp: Any) -> None:
        for number, copy in enumerate(copies):
            pl.when(warp == number % WARPS)(copy)

    plgpu.warp_map(start)
