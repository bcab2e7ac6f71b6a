"""The gated norm as it is defined."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.gated_rms_norm.inputs import Inputs
from pallas_kernels.sharding import shard_count


def unsupported_reason(inputs: Inputs, *, groups: int, epsilon: float) -> str | None:
    """Runs everywhere."""
    del inputs, groups, epsilon


def gated_rms_norm(inputs: Inputs, *, groups: int, epsilon: float) -> tuple[jax.Array]:
    """Computes y; see ``Inputs``. A group may span several devices of a mesh with explicit axes."""
    x, z, weight = (array.astype(inputs.real_dtype) for array in inputs)
    gated = x * jax.nn.silu(z)
    mean_square = mean_over_groups(jnp.mean(jnp.square(gated), axis=-1), groups)
    scale = jax.lax.rsqrt(mean_square + epsilon)
    return ((gated * scale[..., None] * weight).astype(inputs.x.dtype),)


def mean_over_groups(of_heads: Float[Array, "batch length heads"], groups: int) -> Float[Array, "batch length heads"]:
    """Averages over the heads of each group, and gives every head the mean of its group."""
    batch, length, heads = of_heads.shape
    if groups > 1 and shard_count(of_heads, 2) > 1:
        # One number a head is cheap to bring together.
        of_heads = jax.sharding.reshard(of_heads, PartitionSpec(*jax.typeof(of_heads).sharding.spec[:2], None))
    grouped = of_heads.reshape(batch, length, groups, heads // groups)
    mean = jnp.mean(grouped, axis=-1, keepdims=True)
    return jnp.broadcast_to(mean, grouped.shape).reshape(batch, length, heads)
