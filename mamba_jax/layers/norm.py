"""Normalisations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mamba_jax import sharding
from pallas_kernels.dispatch import one_token
from pallas_kernels.gated_rms_norm import flops, gated_rms_norm


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dimension, in float32 (arXiv:1910.07467)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32), weight_decay=False)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return _rms_norm(x, self.weight[...], self.epsilon)


# Computed again in the backward pass: to keep what is between input and output, in float32, would take several times as
# many bytes as the input, and longer.
@functools.partial(jax.checkpoint, static_argnums=(2,))
def _rms_norm(x, weight, epsilon):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * scale * weight).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """RMSNorm of x silu(z) over each group of heads, in float32: the norm of Mamba-2 (arXiv:2405.21060, section 7).

    ``groups`` divides ``heads``, which lie along the mesh axis ``axis``. Inputs have a length, or not for one token.
    """

    def __init__(self, heads: int, head_dim: int, *, groups: int, axis: sharding.Axis, epsilon: float = 1e-5):
        weight = sharding.reshard(jnp.ones((heads, head_dim), jnp.float32), (axis, None))
        self.weight = nnx.Param(weight, weight_decay=False)
        self.groups = groups
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "*batch heads head_dim"], z: Float[Array, "*batch heads head_dim"]
    ) -> Float[Array, "*batch heads head_dim"]:
        if x.ndim == 3:
            return self(*one_token(x, z))[:, 0]
        return gated_rms_norm(x, z, self.weight[...], groups=self.groups, epsilon=self.epsilon)

    @property
    def flops(self) -> int:
        """Floating-point operations for one token."""
        return flops.forward(1, 1, *self.weight.shape)
