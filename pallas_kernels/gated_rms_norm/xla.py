"""The gated norm out of XLA operations, with a backward pass that keeps and writes nothing as large as its inputs.

Left to itself XLA keeps the gated input in float32 from one pass over the tokens to the next, twice as many bytes as it
would read again. So passes are kept apart, and each starts from the arrays that the caller has anyway.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gated_rms_norm.inputs import Inputs
from pallas_kernels.gated_rms_norm.reference import mean_over_groups, unsupported_reason

__all__ = ["gated_rms_norm", "unsupported_reason"]


def gated_rms_norm(inputs: Inputs, *, groups: int, epsilon: float) -> tuple[jax.Array]:
    """Computes y; see ``Inputs``."""
    return (_norm(groups, epsilon, inputs),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(groups: int, epsilon: float, inputs: Inputs) -> jax.Array:
    return _forward(groups, epsilon, inputs)[0]


def _forward(groups: int, epsilon: float, inputs: Inputs) -> tuple[jax.Array, tuple[Inputs, jax.Array]]:
    x, z, _ = _wide(inputs)
    gated = x * jax.nn.silu(z)
    scale = jax.lax.rsqrt(mean_over_groups(jnp.mean(jnp.square(gated), axis=-1), groups) + epsilon)
    # The same numbers once more: XLA takes what passes a barrier for others, and does not keep them.
    again, scale = jax.lax.optimization_barrier((inputs, scale))
    x, z, weight = _wide(again)
    y = x * jax.nn.silu(z) * scale[..., None] * weight
    return y.astype(inputs.x.dtype), (inputs, scale)


def _backward(groups: int, epsilon: float, residuals: tuple[Inputs, jax.Array], dy: jax.Array) -> tuple[Inputs]:
    del epsilon
    inputs, scale = residuals

    def normalized_and_gradient(inputs: Inputs, dy: jax.Array) -> tuple[jax.Array, ...]:
        x, z, weight = _wide(inputs)
        return x, z, x * jax.nn.silu(z) * scale[..., None], dy.astype(x.dtype) * weight

    _, _, normalized, gradient = normalized_and_gradient(inputs, dy)
    along = mean_over_groups(jnp.mean(normalized * gradient, axis=-1), groups)
    (inputs, dy), along = jax.lax.optimization_barrier(((inputs, dy), along))
    x, z, normalized, gradient = normalized_and_gradient(inputs, dy)
    # The gradient of the gated input; a change along it changes nothing.
    dgated = scale[..., None] * (gradient - normalized * along[..., None])
    sigmoid = jax.nn.sigmoid(z)
    gradients = Inputs(
        x=dgated * z * sigmoid,
        z=dgated * x * sigmoid * (1 + z * (1 - sigmoid)),
        weight=jnp.sum(dy.astype(normalized.dtype) * normalized, axis=(0, 1)),
    )
    return (jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), gradients, inputs),)


_norm.defvjp(_forward, _backward)


def _wide(inputs: Inputs) -> tuple[jax.Array, ...]:
    return tuple(array.astype(inputs.real_dtype) for array in inputs)
