"""Scaling of step sizes and decay rates: a slower clock, or slower forgetting, for each layer.

MambaExtend (Azizi, Kundu, Sadeghi and Pedram, ICLR 2025) scales delta by a factor of each layer's own, which it
searches on sequences of the extended length. Here factors are given.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba_jax import settings
from mamba_jax.long_context.attach import require_layers_that_can_freeze, selective_places, with_extenders
from mamba_jax.models.language_model import LanguageModel

Factors = float | tuple[float, ...]
"""One for all layers, or one for each layer that has a delta, from the bottom."""


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    delta: Factors = 1.0
    """Multiplies every step size, and with it what a token adds to the state; 1/8 lets states last 8 times as long."""
    A: Factors = 1.0
    """Multiplies decay rates: states last longer too, and what enters them stays as large as it was."""

    def __post_init__(self):
        for name in ("delta", "A"):
            factors = getattr(self, name)
            each = factors if isinstance(factors, tuple) else (factors,)
            usable = bool(each) and all(0 < factor < math.inf for factor in each)
            accepted = (
                "finite numbers above 0, one for all layers or a tuple with one a layer, as training length / length"
            )
            settings.require(usable, self, name, accepted)


def apply_scaling(model: LanguageModel, config: ScalingConfig) -> LanguageModel:
    """A copy of a model, sharing its parameters, whose layers step and decay by scaled delta and A.

    In Mamba-3, whose decay rates are each token's own, those are multiplied. Limits of step sizes that a layer has
    (``Mamba2Config.delta_limit_max``) hold for the scaled ones.

    Raises:
        ValueError: no layer has a delta, there are more or fewer factors than layers that have one, or delta is to be
            scaled in a layer that has a lower limit of it.
    """
    places, repeats = selective_places(model), model.config.repeats
    if not places:
        raise ValueError(f"model of pattern {model.config.pattern!r} has no layer with a delta to scale.")
    if config.delta != 1:
        require_layers_that_can_freeze(model)

    def by_place(name: str) -> np.ndarray:
        factors = getattr(config, name)
        layers = repeats * len(places)
        settings.require(
            not isinstance(factors, tuple) or len(factors) == layers,
            config,
            name,
            f"one number, or a tuple of {layers}, the number of layers that have a delta",
        )
        return np.broadcast_to(np.asarray(factors, np.float32), (layers,)).reshape(repeats, len(places))

    extenders = {
        place: Scaled(delta, A) for place, delta, A in zip(places, by_place("delta").T, by_place("A").T, strict=True)
    }
    return with_extenders(model, extenders)


class Scaled(nnx.Module):
    """delta -> delta_scale · delta, behind the softplus, and A -> A_scale · A; nothing where all factors are 1."""

    def __init__(self, delta_scale: Float[np.ndarray, "*repeats"], A_scale: Float[np.ndarray, "*repeats"]):
        def unless_one(scale):
            return None if np.all(scale == 1) else nnx.data(jnp.asarray(scale))

        self.delta_scale = unless_one(delta_scale)
        self.A_scale = unless_one(A_scale)

    def __call__(
        self,
        delta: Float[Array, "batch length channels"],
        bias: Float[Array, " channels"],
        position: Int[Array, "batch length"],
    ) -> Float[Array, "batch length channels"]:
        del position
        return delta if self.delta_scale is None else scaled_delta(delta, bias, self.delta_scale)


def scaled_delta(
    delta: Float[Array, "batch length channels"], bias: Float[Array, " channels"], scale: Float[Array, "*#tokens"]
) -> Float[Array, "batch length channels"]:
    """What becomes ``scale`` times as large as ``delta`` behind bias and softplus, but for rounding.

    Args:
        delta: step sizes before bias and softplus, in any floating-point dtype, which is the result's.
        bias: added to them before the softplus.
        scale: one for all, or of a shape that broadcasts against ``delta``'s.
    """
    scaled = scale * jax.nn.softplus(delta.astype(jnp.float32) + bias)
    return (inverse_softplus(scaled) - bias).astype(delta.dtype)


def inverse_softplus(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The x with softplus(x) = y, for y >= 0; far below zero, not infinite, for y = 0."""
    y = jnp.maximum(y, jnp.finfo(y.dtype).tiny)
    return y + jnp.log(-jnp.expm1(-y))
