"""The trapezoidal SSD operator as a recurrence: one token after the other.

Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", 2026 (arXiv:2603.15569). It keeps
every state for the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.trapezoidal_ssd import ranks
from pallas_kernels.trapezoidal_ssd.inputs import Inputs, State
from pallas_kernels.trapezoidal_ssd.rotation import rotate, turn_by


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus, norm_epsilon, chunk_size


def trapezoidal_ssd(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> tuple[jax.Array, ...]:
    """Computes y and the parts of the final state; see ``Inputs``. It has no chunks, of any size."""
    del chunk_size
    dtype = inputs.real_dtype
    ids = inputs.segment_ids
    starts = jnp.zeros(inputs.x.shape[:2], bool) if ids is None else segment_starts(ids)

    def step(state, token):
        x, delta, A, B, C, lambda_, theta, z, starts = token
        h, B_before, x_before = jax.tree.map(lambda part: _forget(part, starts), state)
        B = ranks.matrix_per_head(B, inputs.B_bias, inputs)
        C = ranks.matrix_per_head(C, inputs.C_bias, inputs)
        u, u_before = ranks.input_per_rank(x, inputs), ranks.input_per_rank(x_before, inputs)

        h = h + ((1 - lambda_) * delta)[..., None, None] * _product("bhrp,bhrn->bhpn", u_before, B_before)
        h = jnp.exp(delta * A)[..., None, None] * rotate(h, turn_by(-(delta[..., None] * theta[:, None])[:, :, None]))
        h = h + (lambda_ * delta)[..., None, None] * _product("bhrp,bhrn->bhpn", u, B)
        y = ranks.output(_product("bhpn,bhrn->bhrp", h, C), u, z, inputs, norm_epsilon=norm_epsilon)
        return State(h, B, x), y

    tokens = (
        inputs.x.astype(dtype),
        inputs.step_sizes(delta_softplus=delta_softplus),
        inputs.A.astype(dtype),
        inputs.B,
        inputs.C,
        inputs.lambda_.astype(dtype),
        inputs.theta.astype(dtype),
        inputs.z,
        starts,
    )
    state, y = jax.lax.scan(step, inputs.initial_state(), jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(inputs.x.dtype), *state


def _forget(part: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *(1,) * (part.ndim - 1)), 0, part)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
