"""The SSD operator as a recurrence: one token after the other.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", 2024, equation 1 with a scalar A per head. It keeps every state for the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.sharding import vary_like
from pallas_kernels.ssd.inputs import Inputs


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus, delta_limit, chunk_size


def ssd(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``. It has no chunks, of any size."""
    del chunk_size
    dtype = inputs.real_dtype
    batch, length, heads, head_dim = inputs.x.shape
    groups, state = inputs.B.shape[2:]
    x = inputs.x.astype(dtype)
    delta = inputs.step_sizes(delta_softplus=delta_softplus, delta_limit=delta_limit)
    A = inputs.A.astype(dtype)
    B = jnp.repeat(inputs.B.astype(dtype), heads // groups, axis=2)
    C = jnp.repeat(inputs.C.astype(dtype), heads // groups, axis=2)
    ids = inputs.segment_ids
    starts = jnp.zeros((batch, length), bool) if ids is None else segment_starts(ids)
    h = inputs.initial_state
    if h is None:
        h = vary_like(jnp.zeros((batch, heads, head_dim, state), dtype), x)

    def step(h, token):
        x, delta, B, C, starts = token
        h = jnp.where(starts[:, None, None, None], 0, h)
        h = jnp.exp(delta * A)[..., None, None] * h + (delta[..., None] * x)[..., None] * B[:, :, None]
        return h, jnp.sum(C[:, :, None] * h, axis=-1)

    tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, delta, B, C, starts))
    h, y = jax.lax.scan(step, h, tokens)
    y = jnp.moveaxis(y, 0, 1)
    if inputs.D is not None:
        y = y + inputs.D.astype(dtype) * x
    if inputs.z is not None:
        y = y * jax.nn.silu(inputs.z.astype(dtype))
    return y.astype(inputs.x.dtype), h
