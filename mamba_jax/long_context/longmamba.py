"""LongMamba: global channels leave out tokens with small steps, so that their state lasts for the whole sequence.

The paper's threshold g(S) is for a sequence whose length S is known before its first token. Here it may also follow the
position: each token is judged by g of the tokens so far (streaming). A channel that would forget exponentially then
forgets by a power law: with D the sum of its steps over a training length L, the steps kept between positions s and t
add to D ln(t / s) in expectation, where without filtering they add to D (t - s) / L.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba_jax import sharding
from mamba_jax.long_context.attach import with_extenders
from mamba_jax.long_context.calibration import Calibration, length_ratios
from mamba_jax.long_context.delta_scaling import inverse_softplus
from mamba_jax.long_context.diagnostics import is_global
from mamba_jax.mixers.selective import FROZEN
from mamba_jax.models.language_model import LanguageModel

Channels = Literal["global", "local", "random"]


@dataclasses.dataclass(frozen=True)
class LongMambaConfig:
    decay_threshold: float = 1e-30
    """Decay Th over a training sequence above which a channel is global (1e-30 for Mamba-1, 5e-2 for Mamba-2)."""
    length: int | None = None
    """Length S of the whole sequence, answer included, for one g(S); None lets g follow the position (streaming)."""
    channels: Channels = "global"
    """Channels that leave out tokens; 'local' and 'random' (as many as are global in the layer) are ablations."""
    layers: int | None = None
    """Extend only this many layers, those with the largest decay factor averaged over channels; None extends all."""
    seed: int = 0
    """Decides the random channels."""

    def __post_init__(self):
        if not 0 < self.decay_threshold < 1:
            raise ValueError(
                f"LongMamba.decay_threshold = {self.decay_threshold} cannot be used: above 0 and below 1, as 1e-30."
            )
        if self.channels not in get_args(Channels):
            raise ValueError(
                f"LongMamba.channels = {self.channels!r} cannot be used: one of {', '.join(get_args(Channels))}."
            )
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"LongMamba.layers = {self.layers} cannot be used: at least 1, or None for all.")


def apply_longmamba(
    model: LanguageModel, calibration: Calibration, config: LongMambaConfig = LongMambaConfig()
) -> LanguageModel:
    """A copy of a model, sharing its parameters, that reads longer sequences than it was trained on.

    Up to the training length, its logits are those of the model, bit for bit.

    Raises:
        ValueError: the calibration is of another model, or ``config.length`` is below the training length.
    """
    calibration.require_model(model)
    if config.length is not None and config.length < calibration.training_length:
        raise ValueError(
            f"LongMamba.length = {config.length} cannot be used: at least the training length "
            f"({calibration.training_length}); shorter sequences need no extension, use the model itself."
        )
    chosen = _chosen_channels(calibration, config)
    return with_extenders(
        model,
        {
            place: TokenFilter(
                np.where(chosen[place][:, None], layers.thresholds, 0.0),
                training_length=calibration.training_length,
                length=config.length,
            )
            for place, layers in calibration.places.items()
        },
    )


class TokenFilter(nnx.Module):
    """delta -> 0 where delta <= g: the token neither decays the state nor enters it (eq. 17)."""

    def __init__(
        self,
        thresholds: Float[np.ndarray, "*repeats lengths channels"],
        *,
        training_length: int,
        length: int | None = None,
    ):
        # Compared before the softplus, where delta comes from: what is kept passes as it is, to the last bit.
        before_softplus = inverse_softplus(jnp.asarray(thresholds, jnp.float32))
        self.thresholds = nnx.data(jnp.where(thresholds > 0, before_softplus, -jnp.inf))
        self.training_length = training_length
        self.length = length

    def __call__(
        self,
        delta: Float[Array, "batch length channels"],
        bias: Float[Array, " channels"],
        position: Int[Array, "batch length"],
    ) -> Float[Array, "batch length channels"]:
        last_positions = _last_positions(self.training_length)
        spec = sharding.spec_of(delta)
        if self.length is None:
            entry = jnp.sum(position[..., None] > last_positions, axis=-1)
        else:
            entry = jnp.full((1, 1), np.sum(self.length > last_positions))
            spec = (None, None, spec[-1])
        threshold = self.thresholds.at[entry].get(out_sharding=sharding.out_sharding(*spec))
        return jnp.where(delta + bias <= threshold, jnp.asarray(FROZEN, delta.dtype), delta)


def _last_positions(training_length: int) -> Int[np.ndarray, " lengths_but_last"]:
    """Last position at which each entry of a table of thresholds holds; the last entry holds for ever after."""
    next_lengths = np.ceil(training_length * length_ratios()[1:])
    last = np.maximum(next_lengths - 1, training_length)
    return np.minimum(last, np.iinfo(np.int32).max).astype(np.int32)


def _chosen_channels(calibration: Calibration, config: LongMambaConfig) -> dict[int, np.ndarray]:
    """Masks (repeats, channels) by place of the channels that leave out tokens."""
    decays = {place: layers.log_decay.astype(np.float64) for place, layers in calibration.places.items()}
    least = _least_decay_of_top_layers(decays, config.layers)
    random = np.random.default_rng(config.seed)
    chosen = {}
    for place, decay in decays.items():
        mask = is_global(decay, config.decay_threshold)
        if config.channels == "local":
            mask = ~mask
        if config.channels == "random":
            mask = random.permuted(mask, axis=1)
        chosen[place] = mask & (np.exp(decay).mean(axis=1, keepdims=True) >= least)
    return chosen


def _least_decay_of_top_layers(decays: dict[int, np.ndarray], layers: int | None) -> float:
    """Mean decay factor of the last layer chosen when the ``layers`` with the largest are."""
    means = np.sort(np.concatenate([np.exp(decay).mean(axis=1) for decay in decays.values()]))[::-1]
    if layers is not None and layers > len(means):
        raise ValueError(f"LongMamba.layers = {layers} cannot be used: the model has {len(means)} with a delta.")
    return -math.inf if layers is None else float(means[layers - 1])
