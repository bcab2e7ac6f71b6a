"""Initial values of parameters, each with the paper it comes from.

Functions of ``(key, shape, dtype, out_sharding)`` follow ``jax.nn.initializers``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, PRNGKeyArray


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def fan_in_uniform(fan_in: int, scale: float = 1.0) -> Initializer:
    """Uniform on +-scale / sqrt(fan_in): PyTorch's choice for linear and convolution layers."""
    return uniform(scale / math.sqrt(fan_in))


def normal(stddev: float) -> Initializer:
    """Normal with mean zero."""
    return jax.nn.initializers.normal(stddev)


def s4d_real_log(channels: int, state_size: int) -> Float[Array, "channels state"]:
    """log(-A) for A_n = -(n + 1) in every channel: S4D-Real (Gu et al. 2022, arXiv:2206.11893), as in Mamba-1."""
    return jnp.log(jnp.broadcast_to(jnp.arange(1, state_size + 1, dtype=jnp.float32), (channels, state_size)))


def uniform_log(key: PRNGKeyArray, heads: int, *, minimum: float, maximum: float) -> Float[Array, " heads"]:
    """log(-A) for -A uniform on [minimum, maximum], one a head: Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""
    return jnp.log(jax.random.uniform(key, (heads,), minval=minimum, maxval=maximum))


def delta_bias(
    key: PRNGKeyArray, channels: int, *, minimum: float, maximum: float, floor: float
) -> Float[Array, " channels"]:
    """Bias whose softplus is log-uniform on [minimum, maximum], at least ``floor``.

    Gu & Dao 2023 (arXiv:2312.00752), section 3.6: the range of step sizes an untrained model remembers over.
    """
    log_delta = jax.random.uniform(key, (channels,), minval=math.log(minimum), maxval=math.log(maximum))
    delta = jnp.maximum(jnp.exp(log_delta), floor)
    return delta + jnp.log(-jnp.expm1(-delta))
