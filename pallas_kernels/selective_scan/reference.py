"""The selective scan as the paper defines it: one token after the other.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2, with the
discretisation of its equation 4 simplified for B to delta B. It keeps every state for the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.sharding import vary_like


def unsupported_reason(inputs: Inputs, *, delta_softplus: bool) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus


def selective_scan(inputs: Inputs, *, delta_softplus: bool) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    batch, _, channels = inputs.x.shape
    groups, state = inputs.B.shape[2:]
    x = inputs.x.astype(inputs.real_dtype)
    delta = inputs.step_sizes(delta_softplus=delta_softplus)
    A = inputs.A.astype(inputs.state_dtype)
    B = jnp.repeat(inputs.B.astype(inputs.state_dtype), channels // groups, axis=2)
    C = jnp.repeat(inputs.C.astype(inputs.state_dtype), channels // groups, axis=2)
    ids = inputs.segment_ids
    starts = jnp.zeros(x.shape[:2], bool) if ids is None else segment_starts(ids)
    h = inputs.initial_state
    if h is None:
        h = vary_like(jnp.zeros((batch, channels, state), inputs.state_dtype), x)

    def step(h, token):
        x, delta, B, C, starts = token
        h = jnp.where(starts[:, None, None], 0, h)
        h = jnp.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B
        y = jnp.sum(C * h, axis=-1)
        return h, 2 * y.real if jnp.iscomplexobj(y) else y

    tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, delta, B, C, starts))
    h, y = jax.lax.scan(step, h, tokens)
    y = jnp.moveaxis(y, 0, 1)
    if inputs.D is not None:
        y = y + inputs.D * x
    if inputs.z is not None:
        y = y * jax.nn.silu(inputs.z.astype(inputs.real_dtype))
    return y.astype(inputs.x.dtype), h
