"""The SSD operator out of XLA operations: any backend, any dtype, memory for a state per chunk.

The chunked form of ``pallas_kernels.ssd.chunked``. The backward pass keeps the state before each chunk and recomputes
what lies within it.

At batch 2, length 1024, 8 heads of 64, one group, state 128 in float32, a forward pass, and a forward and a backward
pass, took this many milliseconds of processor time in chunks of 32, 64, 128 and 256 (Xeon with AVX-512, jax 0.12.0):
22, 21, 26 and 37; 71, 66, 79 and 134.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.segments import segment_starts
from pallas_kernels.sharding import vary_like
from pallas_kernels.ssd import chunked
from pallas_kernels.ssd.inputs import Inputs


class _Tokens(NamedTuple):
    """What changes with every token."""

    x: Float[Array, "*chunks batch length groups members head_dim"]
    delta: Float[Array, "*chunks batch length groups members"]
    """Step sizes: after bias, softplus and limits."""
    B: Float[Array, "*chunks batch length groups state"]
    C: Float[Array, "*chunks batch length groups state"]
    z: Float[Array, "*chunks batch length groups members head_dim"] | None
    starts: Bool[Array, "*chunks batch length"] | None


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus, delta_limit, chunk_size


def ssd(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    batch, length, heads, head_dim = inputs.x.shape
    groups, state = inputs.B.shape[2:]

    def by_group(array: jax.Array, dim: int) -> jax.Array:
        return array.reshape(*array.shape[:dim], groups, heads // groups, *array.shape[dim + 1 :])

    tokens = _Tokens(
        x=by_group(inputs.x, 2),
        delta=by_group(inputs.step_sizes(delta_softplus=delta_softplus, delta_limit=delta_limit), 2),
        B=inputs.B,
        C=inputs.C,
        z=None if inputs.z is None else by_group(inputs.z, 2),
        starts=None if inputs.segment_ids is None else segment_starts(inputs.segment_ids),
    )
    h = inputs.initial_state
    if h is None:
        h = vary_like(jnp.zeros((batch, heads, head_dim, state), inputs.real_dtype), inputs.x)
    chunk = functools.partial(
        _chunk,
        A=by_group(inputs.A.astype(inputs.real_dtype), 0),
        D=None if inputs.D is None else by_group(inputs.D.astype(inputs.real_dtype), 0),
    )
    # A loop keeps its recomputation apart from the forward pass: no barriers are needed.
    chunk = jax.checkpoint(chunk, prevent_cse=False)
    size = min(chunk_size or chunked.default_chunk_size(), length)
    h, y = jax.lax.scan(chunk, by_group(h, 1), chunked.cut(tokens, size))
    return chunked.join(y, length).reshape(inputs.x.shape), h.reshape(batch, heads, head_dim, state)


def _chunk(
    h: Float[Array, "batch groups members head_dim state"],
    tokens: _Tokens,
    *,
    A: Float[Array, "groups members"],
    D: Float[Array, "groups members head_dim"] | None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the state after a chunk, and the chunk's outputs."""
    x, delta, B, C, z, starts = tokens
    dtype = chunked.operand_dtype(x, B, C)
    x, B, C = (array.astype(h.dtype) for array in (x, B, C))
    h, y = chunked.chunk(
        h,
        x=x[..., None, :],
        log_decay=delta * A,
        weight=delta,
        B=B[..., None, :],
        C=C[..., None, :],
        starts=starts,
        dtype=dtype,
    )
    y = y[..., 0, :]
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(h.dtype))
    return h, y.astype(tokens.x.dtype)
