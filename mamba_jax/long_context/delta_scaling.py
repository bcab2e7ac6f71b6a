"""Uniform scaling of the step sizes: a slower clock for all layers.

MambaExtend (Azizi, Kundu, Sadeghi and Pedram, ICLR 2025) scales delta too, by a factor of each layer's own, which it
searches on sequences of the extended length. Here one factor, chosen beforehand, is that of all layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba_jax.long_context.attach import require_layers_that_can_freeze, selective_places, with_extenders
from mamba_jax.models.language_model import LanguageModel


def scale_delta(model: LanguageModel, scale: float) -> LanguageModel:
    """A copy of a model whose layers multiply every step size by ``scale``; 1/8 lets states last 8 times as long.

    Limits of step sizes that a layer has (``Mamba2Config.delta_limit_max``) hold for the scaled ones.

    Raises:
        ValueError: the scale is not a positive number, no layer has a delta, or one has a lower limit.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale = {scale} cannot be used: a finite number above 0, such as training length / length.")
    places = selective_places(model)
    if not places:
        raise ValueError(f"model of pattern {model.config.pattern!r} has no layer with a delta to scale.")
    require_layers_that_can_freeze(model)
    repeats = model.config.repeats
    return with_extenders(model, {place: ScaledDelta(jnp.full((repeats,), scale)) for place in places})


class ScaledDelta(nnx.Module):
    """delta -> scale · delta, behind the softplus."""

    def __init__(self, scale: Float[Array, "*repeats"]):
        self.scale = nnx.data(scale)

    def __call__(
        self,
        delta: Float[Array, "batch length channels"],
        bias: Float[Array, " channels"],
        position: Int[Array, "batch length"],
    ) -> Float[Array, "batch length channels"]:
        del position
        scaled = self.scale * jax.nn.softplus(delta.astype(jnp.float32) + bias)
        return (inverse_softplus(scaled) - bias).astype(delta.dtype)


def inverse_softplus(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The x with softplus(x) = y, for y >= 0; far below zero, not infinite, for y = 0."""
    y = jnp.maximum(y, jnp.finfo(y.dtype).tiny)
    return y + jnp.log(-jnp.expm1(-y))
