"""Normalisations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dimension, in float32 (arXiv:1910.07467)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32), weight_decay=False)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale * self.weight[...]).astype(x.dtype)
