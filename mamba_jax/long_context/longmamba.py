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

import numpy as np
from jaxtyping import Bool, Float

from mamba_jax import settings
from mamba_jax.long_context.attach import require_layers_that_can_freeze, with_extenders
from mamba_jax.long_context.calibration import OCTAVES, Calibration, LayerStatistics, length_ratios
from mamba_jax.long_context.diagnostics import is_global
from mamba_jax.long_context.token_filter import TokenFilter
from mamba_jax.models.language_model import LanguageModel

Channels = Literal["global", "local", "random"]

_STREAMING_STEPS_PER_OCTAVE = 16
"""Thresholds that a streaming filter has for each doubling of the position: each is at most 4.4 % of it too early."""


@dataclasses.dataclass(frozen=True)
class LongMambaConfig:
    decay_threshold: float | None = None
    """Decay Th over a training sequence above which a channel is global. None takes what was published: 1e-30 where a
    channel has several decay rates (Mamba-1), 5e-2 where it has one (Mamba-2; for Mamba-3 nothing was published)."""
    length: int | None = None
    """Length S of the whole sequence, answer included, for one g(S); None lets g follow the position (streaming)."""
    table_step: int | None = None
    """Round ``length`` to a multiple of this, as the paper's table of g does (1,000); None takes g of the length."""
    rescale: bool = False
    """Leave out tokens until as many are left as a training sequence has, and scale their steps to its mean."""
    channels: Channels = "global"
    """Channels that leave out tokens; 'local' and 'random' (as many as are global in the layer) are ablations."""
    layers: int | None = None
    """Extend only this many layers, those with the largest decay factor averaged over channels; None extends all."""
    seed: int = 0
    """Decides the random channels."""

    def __post_init__(self):
        is_share = self.decay_threshold is None or 0 < self.decay_threshold < 1
        settings.require(is_share, self, "decay_threshold", "above 0 and below 1, as 1e-30")
        channels = get_args(Channels)
        settings.require(self.channels in channels, self, "channels", f"one of {', '.join(channels)}")
        settings.require(self.layers is None or self.layers >= 1, self, "layers", "at least 1, or None for all")
        steps = self.table_step is None or (self.table_step >= 1 and self.length is not None)
        settings.require(steps, self, "table_step", "at least 1, and only with LongMamba.length")


def apply_longmamba(
    model: LanguageModel, calibration: Calibration, config: LongMambaConfig = LongMambaConfig()
) -> LanguageModel:
    """A copy of a model, sharing its parameters, that reads longer sequences than it was trained on.

    Up to the training length, its logits are those of the model, bit for bit.

    Raises:
        ValueError: the calibration is of another model, ``config.length`` is below the training length, or a layer
            cannot leave out tokens.
    """
    calibration.require_model(model)
    require_layers_that_can_freeze(model)
    training_length = calibration.training_length
    if config.length is not None and config.length < training_length:
        raise ValueError(
            f"LongMamba.length = {config.length} cannot be used: at least the training length "
            f"({training_length}); shorter sequences need no extension, use the model itself."
        )
    ratios = _ratios(config, training_length)
    last_positions = _last_positions(ratios, training_length) if config.length is None else ()
    chosen = chosen_channels(calibration, config)

    def token_filter(layers: LayerStatistics, channels: Bool[np.ndarray, "repeats channels"]) -> TokenFilter:
        thresholds = layers.count_thresholds if config.rescale else layers.thresholds
        scales = interpolated(layers.count_scales, ratios) if config.rescale else None
        return TokenFilter(
            np.where(channels[:, None], interpolated(thresholds, ratios), 0.0),
            scales=None if scales is None else np.where(channels[:, None], scales, 1.0),
            last_positions=last_positions,
        )

    return with_extenders(
        model, {place: token_filter(layers, chosen[place]) for place, layers in calibration.places.items()}
    )


def chosen_channels(
    calibration: Calibration, config: LongMambaConfig = LongMambaConfig()
) -> dict[int, Bool[np.ndarray, "repeats channels"]]:
    """Marks the channels that leave out tokens, by place in the model's pattern."""
    decays = {place: layers.log_decay.astype(np.float64) for place, layers in calibration.places.items()}
    least = _least_decay_of_top_layers(decays, config.layers)
    random = np.random.default_rng(config.seed)
    chosen = {}
    for place, decay in decays.items():
        mask = is_global(decay, decay_threshold(calibration.places[place], config))
        if config.channels == "local":
            mask = ~mask
        if config.channels == "random":
            mask = random.permuted(mask, axis=1)
        chosen[place] = mask & (np.exp(decay).mean(axis=1, keepdims=True) >= least)
    return chosen


def decay_threshold(layers: LayerStatistics, config: LongMambaConfig) -> float:
    """Decay Th above which a channel of these layers is global."""
    if config.decay_threshold is not None:
        return config.decay_threshold
    return 1e-30 if layers.decay_rates > 1 else 5e-2


def interpolated(
    table: Float[np.ndarray, "repeats measured channels"], ratios: Float[np.ndarray, " lengths"]
) -> Float[np.ndarray, "repeats lengths channels"]:
    """A calibration's table at other lengths S/L than it was measured at: linear in the logarithm of the length."""
    measured = np.log2(length_ratios())
    wanted = np.clip(np.log2(ratios), measured[0], measured[-1])
    below = np.clip(np.searchsorted(measured, wanted, side="right") - 1, 0, len(measured) - 2)
    weight = ((wanted - measured[below]) / (measured[below + 1] - measured[below]))[:, None].astype(table.dtype)
    return table[:, below] * (1 - weight) + table[:, below + 1] * weight


def _ratios(config: LongMambaConfig, training_length: int) -> Float[np.ndarray, " lengths"]:
    """Lengths S/L that the filter has a threshold for."""
    if config.length is None:
        return 2.0 ** (np.arange(OCTAVES * _STREAMING_STEPS_PER_OCTAVE + 1) / _STREAMING_STEPS_PER_OCTAVE)
    length = config.length
    if config.table_step is not None:
        length = max(round(length / config.table_step) * config.table_step, training_length)
    return np.array([length / training_length])


def _last_positions(ratios: Float[np.ndarray, " lengths"], training_length: int) -> tuple[int, ...]:
    """Last position at which each threshold but the last holds; that holds for ever after."""
    next_lengths = np.ceil(training_length * ratios[1:])
    last = np.maximum(next_lengths - 1, training_length)
    return tuple(np.minimum(last, np.iinfo(np.int32).max).astype(int).tolist())


def _least_decay_of_top_layers(decays: dict[int, np.ndarray], layers: int | None) -> float:
    """Mean decay factor of the last layer chosen when the ``layers`` with the largest are."""
    means = np.sort(np.concatenate([np.exp(decay).mean(axis=1) for decay in decays.values()]))[::-1]
    if layers is not None and layers > len(means):
        raise ValueError(f"LongMamba.layers = {layers} cannot be used: the model has {len(means)} with a delta.")
    return -math.inf if layers is None else float(means[layers - 1])
