"""How the one warpgroup of a block goes through what it loads, while what comes next is on its way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.experimental.pallas as pl
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu
from pallas_kernels.mosaic_gpu_launch import Refs


def stream_barriers(copies: int, stages: int) -> dict[str, Any]:
    """Barriers of a ``Stream``, by the names that it knows them under.

    Args:
        copies: that are made for one item.
        stages: items in shared memory at once.
    """
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return {"full": full, "free": plgpu.Barrier(num_barriers=stages)}


@dataclasses.dataclass(frozen=True)
class Stream:
    """Items that follow each other through a few places in shared memory."""

    smem: Refs
    """Buffers with a place for every stage in front, and what ``stream_barriers`` returns."""
    sources: Callable[[Any], Mapping[str, Any]]
    """``sources(i)``, references to what is loaded of item i, by the names of the buffers."""
    count: Any
    """Of items, known or not when the kernel is traced."""
    stages: int

    def start(self) -> None:
        """Starts the first loads."""
        for i in range(self.stages):
            if isinstance(self.count, int):
                self._load(i, i)
            else:
                pl.when(i < self.count)(functools.partial(self._load, i, i))

    def walk(self, work: Callable[[Any, Refs, Any], Any], carry: Any) -> Any:
        """Calls ``work(i, refs, carry) -> carry`` for each item, with references to what was loaded of it."""

        def step(i: Any, carry: Any) -> Any:
            slot = lax.rem(i, self.stages)
            plgpu.barrier_wait(self.smem["full"].at[slot])
            carry = work(i, {name: self.smem[name].at[slot] for name in self.sources(i)}, carry)
            plgpu.barrier_arrive(self.smem["free"].at[slot])

            @pl.when(i + self.stages < self.count)
            def _() -> None:
                plgpu.barrier_wait(self.smem["free"].at[slot])
                self._load(i + self.stages, slot)

            return carry

        return lax.fori_loop(0, self.count, step, carry)

    def _load(self, i: Any, slot: Any) -> None:
        for name, source in self.sources(i).items():
            plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], self.smem["full"].at[slot])
