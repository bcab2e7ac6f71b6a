"""The trapezoidal SSD operator out of XLA operations: any backend, any dtype, memory for a state per chunk.

With one input a token (``weights.py``) one pass of ``pallas_kernels.ssd.chunked`` computes it. Within a chunk B and C
are turned by the angle since its start, a rotary embedding, and the state stands still; behind the chunk it is turned
by the whole angle. Heads rotate by angles of their own, and so have B and C of their own; these exist for a chunk at a
time. The backward pass keeps the state before each chunk and recomputes the rest.

An angle since the start of the sequence would do for B and C too, but in its gradient, a sum over the rest of the
sequence, nearly all terms cancel: it would drown in the rounding of bfloat16.

At batch 2, length 1024, 8 heads of 64, one group, state 128, 32 pairs in float32, a forward pass, and a forward and a
backward pass, took this many milliseconds of processor time in chunks of 16, 32, 64 and 128: 39, 40, 47 and 67; 149,
152, 161 and 211. With rank 4, in chunks of 8, 16, 32 and 64: 99, 100, 123 and 185; 394, 401, 513 and 769. (AMD EPYC,
jax 0.12.0, 2026-11-24, the machine shared with others.)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels.segments import segment_starts
from pallas_kernels.ssd import chunked
from pallas_kernels.trapezoidal_ssd import ranks, weights
from pallas_kernels.trapezoidal_ssd.inputs import Inputs
from pallas_kernels.trapezoidal_ssd.rotation import cumulative_angle, rotate, turn_by


class _Tokens(NamedTuple):
    """What changes with every token."""

    x: Float[Array, "*chunks batch length heads head_dim"]
    delta: Float[Array, "*chunks batch length heads"]
    """Step sizes: after bias and softplus."""
    log_decay: Float[Array, "*chunks batch length heads"]
    weight: Float[Array, "*chunks batch length heads"]
    own_weight: Float[Array, "*chunks batch length heads"]
    B: Float[Array, "*chunks batch length groups rank state"]
    C: Float[Array, "*chunks batch length groups rank state"]
    theta: Float[Array, "*chunks batch length pairs"]
    z: Float[Array, "*chunks batch length heads head_dim"] | None
    starts: Bool[Array, "*chunks batch length"] | None


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus, norm_epsilon, chunk_size


def trapezoidal_ssd(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> tuple[jax.Array, ...]:
    """Computes y and the parts of the final state; see ``Inputs``."""
    length, rank = inputs.x.shape[1], inputs.B.shape[3]
    delta = inputs.step_sizes(delta_softplus=delta_softplus)
    tokens = _Tokens(
        x=inputs.x,
        delta=delta,
        **weights.weights(inputs, delta)._asdict(),
        B=inputs.B,
        C=inputs.C,
        theta=inputs.theta.astype(delta.dtype),
        z=inputs.z,
        starts=None if inputs.segment_ids is None else segment_starts(inputs.segment_ids),
    )
    # A loop keeps its recomputation apart from the forward pass: no barriers are needed.
    chunk = jax.checkpoint(functools.partial(_chunk, inputs=inputs, norm_epsilon=norm_epsilon), prevent_cse=False)
    size = min(chunk_size or max(1, chunked.default_chunk_size() // rank), length)
    h, y = jax.lax.scan(chunk, weights.state_before(inputs, delta), chunked.cut(tokens, size))
    return chunked.join(y, length), h, *weights.last_token(inputs)


def _chunk(
    h: Float[Array, "batch heads head_dim state"], tokens: _Tokens, *, inputs: Inputs, norm_epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Computes the state after a chunk, and the chunk's outputs."""
    angle = cumulative_angle(tokens.delta[..., None] * tokens.theta[:, :, None])
    dtype = chunked.operand_dtype(tokens.x, tokens.B, tokens.C)

    turn = turn_by(angle[..., None, :])

    def rotated(matrix, bias):
        return rotate(ranks.matrix_per_head(matrix, bias, inputs), turn, dtype)

    x = ranks.input_per_rank(tokens.x, inputs)
    # Every head is a group of its own, with one member.
    h, y = chunked.chunk(
        h[:, :, None],
        x=x[:, :, :, None],
        log_decay=tokens.log_decay[..., None],
        weight=tokens.weight[..., None],
        own_weight=tokens.own_weight[..., None],
        B=rotated(tokens.B, inputs.B_bias),
        C=rotated(tokens.C, inputs.C_bias),
        starts=tokens.starts,
        dtype=dtype,
    )
    h = rotate(h[:, :, 0], turn_by(-angle[:, -1, :, None]))
    y = ranks.output(y[:, :, :, 0], x, tokens.z, inputs, norm_epsilon=norm_epsilon)
    return h, y.astype(tokens.x.dtype)
