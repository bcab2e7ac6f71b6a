"""Normalisations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mamba_jax import sharding


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dimension, in float32 (arXiv:1910.07467)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32), weight_decay=False)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale * self.weight[...]).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """RMSNorm of x silu(z) over each group of heads, in float32: the norm of Mamba-2 (arXiv:2405.21060, section 7).

    ``groups`` divides ``heads``, which lie along the mesh axis ``axis``.
    """

    def __init__(self, heads: int, head_dim: int, *, groups: int, axis: sharding.Axis, epsilon: float = 1e-5):
        weight = sharding.reshard(jnp.ones((heads, head_dim), jnp.float32), (axis, None))
        self.weight = nnx.Param(weight, weight_decay=False)
        self.groups = groups
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "*batch heads head_dim"], z: Float[Array, "*batch heads head_dim"]
    ) -> Float[Array, "*batch heads head_dim"]:
        gated = x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        mean_square = self._mean_over_groups(jnp.mean(jnp.square(gated), axis=-1))
        scale = jax.lax.rsqrt(mean_square + self.epsilon)
        return (gated * scale[..., None] * self.weight[...]).astype(x.dtype)

    @property
    def flops(self) -> int:
        """Floating-point operations for one token: the gate three, square, its sum and two products a channel."""
        return 7 * self.weight.size

    def _mean_over_groups(self, per_head):
        """Averages (..., heads) over the heads of each group, and gives every head the mean of its group."""
        *batch, heads = per_head.shape
        if self.groups > 1:
            # A group may span several devices, or share one. This is one number a head: cheap to bring together.
            per_head = sharding.reshard(per_head, (*sharding.spec_of(per_head)[:-1], None))
        grouped = per_head.reshape(*batch, self.groups, heads // self.groups)
        return jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape).reshape(*batch, heads)
