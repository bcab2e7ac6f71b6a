"""B and C of a head made of its group's, in shared memory, where heads turn theirs by angles of their own.

A state, and with it B and C, has one part or several: columns that hold both components of each of their pairs, the
first ones of all pairs and then the second ones. Kernels work on one part after the other where all would not fit in
registers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK, STATE_UNIT, Block, Problem

FULL_TURN = 2**16
"""Angles are 16-bit integers that wrap at a full turn."""

WHOLE = 2 * STATE_UNIT
"""The largest state that is one part. Those of a larger one have STATE_UNIT columns each."""


class Part(NamedTuple):
    """Some columns of B, C and the states."""

    start: int
    stop: int
    pairs: int
    """How many of their pairs turn: all of several parts, or none."""
    is_whole: bool
    """Whether there are no other columns."""

    @property
    def tiles(self) -> list[int]:
        """Numbers of the tiles of STATE_UNIT columns."""
        return list(range(self.start // STATE_UNIT, self.stop // STATE_UNIT))

    def of(self, matrix: Any) -> Any:
        """Reference to these columns of a matrix, or of a vector."""
        if self.is_whole:
            return matrix
        return matrix.at[(*[slice(None)] * (len(matrix.shape) - 1), pl.ds(self.start, self.stop - self.start))]

    def of_pairs(self, numbers: Any) -> Any:
        """Reference to the numbers of the pairs that turn, of a number a pair in each row."""
        return numbers if self.is_whole else numbers.at[:, pl.ds(self.start // 2, self.pairs)]


def part_width(state: int) -> int:
    """Columns of each part of a state."""
    return state if state <= WHOLE else STATE_UNIT


def parts_of(state: int, pairs: int) -> list[Part]:
    """The parts of a state.

    Args:
        state: size of the kernels' state.
        pairs: angles of a token; where there are several parts, a multiple of the pairs of one.
    """
    width = part_width(state)
    if width == state:
        return [Part(0, state, pairs, is_whole=True)]
    return [
        Part(start, start + width, min(max(pairs - start // 2, 0), width // 2), is_whole=False)
        for start in range(0, state, width)
    ]


class Turn(NamedTuple):
    """Cosines and sines of a chunk's angles, in registers."""

    cos: jax.Array
    sin: jax.Array


def turn_by(part: Part, angles: Any) -> Turn | None:
    """Loads a chunk's angles of a part; None where nothing turns."""
    if not part.pairs:
        return None
    angle = blocks.load(part.of_pairs(angles)) * (2 * math.pi / FULL_TURN)
    return Turn(jnp.cos(angle), jnp.sin(angle))


def turned(matrix: jax.Array, turn: Turn | None, *, back: bool = False) -> jax.Array:
    """A part of a matrix with the pairs of each row turned, or turned back."""
    if turn is None:
        return matrix
    pairs, half = turn.cos.shape[1], matrix.shape[1] // 2
    first, second = columns(matrix, 0, pairs), columns(matrix, half, half + pairs)
    sin = -turn.sin if back else turn.sin
    pieces = [turn.cos * first - sin * second, sin * first + turn.cos * second]
    if pairs < half:
        pieces = [pieces[0], columns(matrix, pairs, half), pieces[1], columns(matrix, half + pairs, 2 * half)]
    return jnp.concatenate(pieces, axis=1)


def columns(matrix: jax.Array, start: int, stop: int) -> jax.Array:
    """Some columns of a matrix in registers."""
    return lax.slice(matrix, (0, start), (matrix.shape[0], stop))


def bias_buffers(p: Problem, inputs: Mapping[str, jax.Array], matrices: Sequence[str]) -> dict[str, Any]:
    """Shared memory for the biases of a block's heads, where they are a number a component, and their barriers.

    Those of a number a row and component would not fit: they stay in device memory.
    """
    names = [f"{matrix}_bias" for matrix in matrices]
    names = [name for name in names if name in inputs and inputs[name].ndim == 2]
    if not names:
        return {}
    return {
        **{name: plgpu.SMEM((p.warpgroups, p.state), jnp.float32) for name in names},
        "biases": plgpu.Barrier(num_arrivals=len(names), num_barriers=p.warpgroups),
    }


def biases(p: Problem, gmem: Refs, smem: Refs, block: Block, matrices: Sequence[str]) -> dict[str, Any]:
    """Loads a head's biases into the shared memory there is for them; returns references, or None, by matrix."""
    head = p.token_head(block.head)
    found = {matrix: gmem[f"{matrix}_bias"].at[head] for matrix in matrices if f"{matrix}_bias" in gmem}
    buffers = {matrix: smem[f"{matrix}_bias"].at[block.warpgroup] for matrix in found if f"{matrix}_bias" in smem}
    for matrix, buffer in buffers.items():
        plgpu.copy_gmem_to_smem(found[matrix], buffer, smem["biases"].at[block.warpgroup])
    if buffers:
        plgpu.barrier_wait(smem["biases"].at[block.warpgroup])
    return dict.fromkeys(matrices) | found | buffers


def turn_into(parts: Sequence[Part], angles: Any, *matrices: tuple[Any, Any, Any]) -> None:
    """Makes B or C of a head in a chunk, or both: adds its bias to the group's, and turns it; a fence must follow.

    Args:
        parts: of the state.
        angles: reference to the chunk's angles.
        matrices: references to where the result goes, to the group's, which may be the same, and to the bias: a number
            a component, or one a row and component, or None.
    """
    for part in parts:
        turn = turn_by(part, angles)
        for target, source, bias in matrices:
            matrix = blocks.load(part.of(source))
            if bias is not None:
                matrix = matrix + _load_bias(part.of(bias))
            store(part.of(target), turned(matrix, turn).astype(target.dtype))


def _load_bias(bias: Any) -> jax.Array:
    """Loads a bias of all rows of a chunk, or of each."""
    by_row = len(bias.shape) == 2
    return blocks.load(bias) if by_row else blocks.by_column(blocks.load(bias, blocks.COLUMNS), CHUNK)
