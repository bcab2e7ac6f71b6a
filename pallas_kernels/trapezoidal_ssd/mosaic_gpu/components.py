"""Parts of a state that the backward kernel works on one by one, where all of it would not fit in registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_compat import store
from pallas_kernels.ssd.mosaic_gpu import blocks, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import STATE_UNIT
from pallas_kernels.ssd.mosaic_gpu.turning import Turn

MOST_AT_ONCE = 192
"""Components: the gradients of more would not fit."""


@dataclasses.dataclass(frozen=True)
class Components:
    """Some of a state's components, with both of each pair: columns of B, C and the states."""

    ranges: tuple[tuple[int, int], ...]
    """The columns, from and up to: all of them, or as many of either half."""
    pairs: tuple[int, int]
    """Which pairs turn, from and up to."""

    @property
    def tiles(self) -> list[int]:
        """Numbers of the tiles of STATE_UNIT columns."""
        return [tile for start, stop in self.ranges for tile in range(start // STATE_UNIT, stop // STATE_UNIT)]

    @property
    def turning_pairs(self) -> int:
        """How many pairs turn."""
        return self.pairs[1] - self.pairs[0]

    def of(self, matrix: Any) -> list[Any]:
        """References to the ranges of a matrix' columns, or of a vector, in memory."""
        if len(self.ranges) == 1:
            return [matrix]
        rows = [slice(None)] * (len(matrix.shape) - 1)
        return [matrix.at[(*rows, pl.ds(start, stop - start))] for start, stop in self.ranges]

    def of_pairs(self, numbers: Any) -> Any:
        """Reference to the numbers of the pairs that turn, in memory."""
        return numbers if len(self.ranges) == 1 else numbers.at[:, pl.ds(self.pairs[0], self.turning_pairs)]

    def load(self, matrix: Any) -> jax.Array:
        """Loads the columns as float32."""
        return together([blocks.load(some) for some in self.of(matrix)])

    def product(
        self, *operands: tuple[Any, Any], plus: jax.Array | None = None, meanwhile: Callable[[], None] | None = None
    ) -> jax.Array:
        """``blocks.product`` with these columns of the right operands, and something to do meanwhile."""
        sums, first = [], 0
        for i, (start, stop) in enumerate(self.ranges):
            added = (
                plus if plus is None or len(self.ranges) == 1 else turning.columns(plus, first, first + stop - start)
            )
            sums.append(([(left, self.of(right)[i]) for left, right in operands], added))
            first += stop - start
        return together(blocks.products(*sums, meanwhile=meanwhile)[: len(sums)])

    def turn(self, target: Any, source: Any, angles: Any, bias: Any) -> None:
        """Adds the head's bias to a group's B or C in a chunk, and turns it, as ``turning.turn_into`` does."""
        matrix = together([blocks.load_operand(some) for some in self.of(source)])
        turn = self.turn_by(angles)
        matrix = matrix.astype(jnp.float32)
        biases = None if bias is None else together([turning.load_bias(some) for some in self.of(bias)])
        of_head = turning.made(matrix, turn, biases)
        first = 0
        for some in self.of(target):
            last = first + some.shape[1]
            store(some, turning.columns(of_head, first, last).astype(some.dtype))
            first = last

    def turn_by(self, angles: Any) -> Turn | None:
        """Loads a chunk's angles of the pairs; None where none of them turns."""
        return turning.turn_by(self.of_pairs(angles)) if self.turning_pairs else None


def parts(state: int, pairs: int) -> list[Components]:
    """All components of a state, in as many parts as it takes."""
    if state <= MOST_AT_ONCE:
        return [Components(((0, state),), (0, pairs))]
    half = state // 2
    return [
        Components(
            ((start, start + STATE_UNIT), (half + start, half + start + STATE_UNIT)),
            (min(start, pairs), min(start + STATE_UNIT, pairs)),
        )
        for start in range(0, half, STATE_UNIT)
    ]


def together(columns: Sequence[jax.Array]) -> jax.Array:
    """Columns beside each other, in registers."""
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)
