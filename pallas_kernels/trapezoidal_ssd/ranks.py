"""What surrounds the recurrence at each token: inputs for every head and rank before it, one output a head behind it.

Functions of tokens with any leading dimensions, in ``Inputs.real_dtype``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.trapezoidal_ssd.inputs import Inputs


def matrix_per_head(
    matrix: Float[Array, "*tokens groups rank state"], bias: Float[Array, "heads rank state"] | None, inputs: Inputs
) -> Float[Array, "*tokens heads rank state"]:
    """Gives every head the B or C of its group, plus its bias."""
    members = inputs.x.shape[2] // matrix.shape[-3]
    matrix = jnp.repeat(matrix.astype(inputs.real_dtype), members, axis=-3)
    return matrix if bias is None else matrix + bias


def input_per_rank(
    x: Float[Array, "*tokens heads head_dim"], inputs: Inputs
) -> Float[Array, "*tokens heads rank head_dim"]:
    """Gives every rank its share of the input."""
    return _per_rank(x, inputs.mimo_x, inputs)


def output(
    y: Float[Array, "*tokens heads rank head_dim"],
    x: Float[Array, "*tokens heads rank head_dim"],
    z: Float[Array, "*tokens heads head_dim"] | None,
    inputs: Inputs,
    *,
    norm_epsilon: float,
) -> Float[Array, "*tokens heads head_dim"]:
    """Skip connection, norm and gate of each rank, then their weighted sum."""
    if inputs.D is not None:
        y = y + inputs.D[:, None] * x
    if inputs.norm_weight is not None:
        mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean_square + norm_epsilon) * inputs.norm_weight[:, None]
    if z is not None:
        y = y * jax.nn.silu(_per_rank(z, inputs.mimo_z, inputs))
    if inputs.mimo_o is not None:
        y = y * inputs.mimo_o
    return jnp.sum(y, axis=-2)


def _per_rank(array, weight, inputs: Inputs):
    array = array.astype(inputs.real_dtype)[..., None, :]
    if weight is not None:
        return array * weight
    rank = inputs.B.shape[-2]
    return jnp.broadcast_to(array, (*array.shape[:-2], rank, array.shape[-1]))
