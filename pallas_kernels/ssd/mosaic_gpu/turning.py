"""B and C of a head made of its group's, in shared memory, where heads turn theirs by angles of their own.

Components n and n + state // 2 are a pair, for n below the number of angles of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK, Block, Problem

FULL_TURN = 2**16
"""Angles are 16-bit integers that wrap at a full turn."""


class Turn(NamedTuple):
    """Cosines and sines of a chunk's angles, in registers."""

    cos: jax.Array
    sin: jax.Array


def turn_by(angles: Any) -> Turn:
    """Loads a chunk's angles."""
    angle = blocks.load(angles) * (2 * math.pi / FULL_TURN)
    return Turn(jnp.cos(angle), jnp.sin(angle))


def turned(matrix: jax.Array, turn: Turn, *, back: bool = False) -> jax.Array:
    """A matrix with the pairs of each row turned, or turned back."""
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


def turn_into(target: Any, matrix: jax.Array, turn: Turn, bias: Any = None) -> None:
    """Adds the head's bias, if there is one, to a group's B or C in a chunk, and turns it; a fence must follow.

    Args:
        target: reference to where the result goes, perhaps what ``matrix`` was loaded from.
        matrix: the group's.
        turn: by what.
        bias: reference to a number a component, or one a row and component.
    """
    matrix = matrix.astype(jnp.float32)
    of_head = made(matrix, turn, None if bias is None else load_bias(bias))
    store(target, of_head.astype(target.dtype))


def made(matrix: jax.Array, turn: Turn | None, bias: jax.Array | None) -> jax.Array:
    """A head's B or C in a chunk: the group's, in float32, with its bias, if there is one, turned, if it turns."""
    if bias is not None:
        matrix = matrix + bias
    return matrix if turn is None else turned(matrix, turn)


def load_bias(bias: Any) -> jax.Array:
    """Loads a bias of all rows of a chunk, or of each."""
    by_row = len(bias.shape) == 2
    return blocks.load(bias) if by_row else blocks.by_column(blocks.load(bias, blocks.COLUMNS), CHUNK)
