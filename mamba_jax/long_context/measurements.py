"""The numbers behind the figures of ``long_context.figures``: one dataclass of arrays a kind of figure.

Numbers of figures are those of the LongMamba paper. Decays and attention are kept as logarithms to base 10. All
functions take one sequence, (1, length), and a model without extenders; LongMamba is applied where it is compared, with
the settings of a ``LongMambaConfig`` whose length is left open.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mamba_jax.long_context import diagnostics
from mamba_jax.long_context.calibration import Calibration
from mamba_jax.long_context.longmamba import LongMambaConfig, apply_longmamba, chosen_channels, decay_threshold
from mamba_jax.mixers.selective import Selection
from mamba_jax.models.language_model import LanguageModel

_POINTS = 400
"""Points of a curve at most."""


def spread(items: Sequence[int] | Int[np.ndarray, " items"], count: int) -> Int[np.ndarray, " chosen"]:
    """``count`` of the items at even distances, all where there are fewer."""
    if len(items) > count:
        return np.asarray(items)[np.linspace(0, len(items) - 1, count).round().astype(int)]
    return np.asarray(items, int)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which channels of a model are global, by number of the layer from the bottom."""

    training_length: int
    is_global: dict[int, Bool[np.ndarray, " channels"]]
    log10_decay: dict[int, Float[np.ndarray, " channels"]]
    """Of a training sequence."""
    log10_threshold: dict[int, float]
    """Decay above which a channel is global."""

    def pick(self, layer: int, *, local: int, globals_: int) -> Int[np.ndarray, " chosen"]:
        """Channels spread over the local ones, then over the global ones; all of a kind where it has fewer."""
        kinds = (~self.is_global[layer], local), (self.is_global[layer], globals_)
        return np.concatenate([spread(np.flatnonzero(mask), count) for mask, count in kinds])


def layers_of(model: LanguageModel, calibration: Calibration, config: LongMambaConfig) -> Layers:
    """Tells channels that LongMamba extends, the global ones, from the others."""
    per_repeat = len(model.config.pattern)
    numbered = {
        repeat * per_repeat + place: (place, repeat)
        for place in calibration.places
        for repeat in range(model.config.repeats)
    }
    numbered = dict(sorted(numbered.items()))
    chosen = chosen_channels(calibration, config)
    return Layers(
        training_length=calibration.training_length,
        is_global={layer: chosen[place][repeat] for layer, (place, repeat) in numbered.items()},
        log10_decay={
            layer: calibration.places[place].log_decay[repeat] / math.log(10)
            for layer, (place, repeat) in numbered.items()
        },
        log10_threshold={
            layer: math.log10(decay_threshold(calibration.places[place], config))
            for layer, (place, _) in numbered.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Figures 1, 15 and 16. A pixel is the largest weight of a block of inputs in the last output of a block."""

    length: int
    layer: Int[np.ndarray, " panels"]
    channel: Int[np.ndarray, " panels"]
    is_global: Bool[np.ndarray, " panels"]
    receptive_field: Float[np.ndarray, " panels"]
    """Effective receptive field of the last token, in tokens."""
    log10_attention: Float[np.ndarray, "panels pixels pixels"]
    """Relative to the largest of each map; -inf above the diagonal and where the weight is 0."""


def attention_maps(
    model: LanguageModel,
    tokens: Int[Array, "1 length"],
    layers: Layers,
    channels: dict[int, Int[np.ndarray, " chosen"]],
    *,
    pixels: int = 200,
) -> AttentionMaps:
    """Maps of some channels of some layers, by number of the layer."""
    parts = [
        _maps_of_layer(diagnostics.selection_of_layer(model, tokens, layer), chosen, pixels)
        for layer, chosen in channels.items()
    ]
    return AttentionMaps(
        length=tokens.shape[1],
        layer=np.concatenate([np.full(len(chosen), layer) for layer, chosen in channels.items()]),
        channel=np.concatenate(list(channels.values())),
        is_global=np.concatenate([layers.is_global[layer][chosen] for layer, chosen in channels.items()]),
        receptive_field=np.concatenate([fields for fields, _ in parts]),
        log10_attention=np.concatenate([maps for _, maps in parts]),
    )


def _maps_of_layer(selection: Selection, channels, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    length = selection.delta.shape[1]
    block = -(-length // pixels)
    rows = jnp.minimum(jnp.arange(block - 1, length + block - 1, block), length - 1)

    @jax.jit
    def of_channel(selection, channel):
        attention = diagnostics.hidden_attention(selection, channel[None], rows)[0, 0]
        weights = diagnostics.weight_sizes(attention, selection.rank)
        weights = jnp.pad(weights, ((0, 0), (0, len(rows) * block - length)))
        largest = jnp.max(weights.reshape(len(rows), len(rows), block), axis=-1)
        return jnp.log10(largest) - jnp.log10(jnp.max(largest))

    maps = np.stack([np.asarray(of_channel(selection, jnp.asarray(channel))) for channel in channels])
    fields = jax.jit(diagnostics.effective_receptive_field)(selection)[0]
    return np.asarray(fields)[channels], maps


@dataclasses.dataclass(frozen=True)
class ReceptiveFields:
    """Figure 7: effective receptive field of the last token against the length of the sequence."""

    training_length: int
    layer: int
    channel: Int[np.ndarray, " channels"]
    is_global: Bool[np.ndarray, " channels"]
    length: Int[np.ndarray, " lengths"]
    receptive_field: Float[np.ndarray, "channels lengths"]
    """In tokens."""


def receptive_fields(
    model: LanguageModel, tokens: Int[Array, "1 length"], layers: Layers, layer: int, channels: Int[np.ndarray, " c"]
) -> ReceptiveFields:
    """Fields of some channels of a layer, at lengths up to the sequence's."""
    selection = diagnostics.selection_of_layer(model, tokens, layer)
    shortest = min(64, tokens.shape[1])
    lengths = np.unique(np.geomspace(shortest, tokens.shape[1], 12).round().astype(int))
    field = jax.jit(diagnostics.effective_receptive_field)
    fields = [field(selection.until(length))[0, channels] for length in lengths.tolist()]
    return ReceptiveFields(
        layers.training_length, layer, channels, layers.is_global[layer][channels], lengths, np.stack(fields, axis=1)
    )


@dataclasses.dataclass(frozen=True)
class DecayCurves:
    """Figures 9 to 14: what is left of the first state after each token, for the channels of one layer.

    As trained, and with LongMamba's g(S) for the length of the sequence.
    """

    training_length: int
    layer: int
    channel: Int[np.ndarray, " channels"]
    is_global: Bool[np.ndarray, " channels"]
    log10_threshold: float
    position: Int[np.ndarray, " points"]
    log10_original: Float[np.ndarray, "channels points"]
    log10_extended: Float[np.ndarray, "channels points"]


def decay_curves(
    model: LanguageModel,
    calibration: Calibration,
    config: LongMambaConfig,
    tokens: Int[Array, "1 length"],
    layers: Layers,
    layer: int,
    channels: Int[np.ndarray, " c"],
) -> DecayCurves:
    """Curves of some channels of a layer; the sequence is no shorter than those in training."""
    length = tokens.shape[1]
    position, original = _decay(model, tokens, layer, channels, length)
    extended = apply_longmamba(model, calibration, dataclasses.replace(config, length=length))
    return DecayCurves(
        layers.training_length,
        layer,
        channels,
        layers.is_global[layer][channels],
        layers.log10_threshold[layer],
        position,
        original,
        _decay(extended, tokens, layer, channels, length)[1],
    )


@dataclasses.dataclass(frozen=True)
class ExtendedDecay:
    """Figure 8: decay with and without LongMamba at several lengths S, each with its own g(S)."""

    training_length: int
    layer: int
    channel: Int[np.ndarray, " channels"]
    is_global: Bool[np.ndarray, " channels"]
    """Local channels are not extended."""
    length: Int[np.ndarray, " panels"]
    position: Int[np.ndarray, "panels points"]
    log10_original: Float[np.ndarray, "panels channels points"]
    log10_extended: Float[np.ndarray, "panels channels points"]


def extended_decay(
    model: LanguageModel,
    calibration: Calibration,
    config: LongMambaConfig,
    tokens: Int[Array, "1 length"],
    layers: Layers,
    layer: int,
    channels: Int[np.ndarray, " c"],
    lengths: Sequence[int],
) -> ExtendedDecay:
    """Curves at each of the lengths, none below the training length, none above that of the sequence."""
    panels = []
    for length in lengths:
        extended = apply_longmamba(model, calibration, dataclasses.replace(config, length=length))
        position, original = _decay(model, tokens[:, :length], layer, channels, min(lengths))
        panels.append((position, original, _decay(extended, tokens[:, :length], layer, channels, min(lengths))[1]))
    position, original, extended = (np.stack(part) for part in zip(*panels, strict=True))
    return ExtendedDecay(
        layers.training_length,
        layer,
        channels,
        layers.is_global[layer][channels],
        np.array(lengths),
        position,
        original,
        extended,
    )


def _decay(model, tokens, layer: int, channels, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, from 1, as many as wanted but no more than fit on paper, and log10 decay there, (channels, points)."""
    selection = diagnostics.selection_of_layer(model, tokens, layer)
    A = selection.A if selection.A.ndim < 3 else selection.A[0]
    log_decay = diagnostics.log_cumulative_decay(selection.delta[0], A)
    position = np.linspace(1, tokens.shape[1], min(_POINTS, points)).round().astype(int)
    return position, np.asarray(log_decay)[position - 1][:, channels].T / math.log(10)


@dataclasses.dataclass(frozen=True)
class FilteredShare:
    """Share of the tokens that global channels leave out; quartiles over the global channels of a layer."""

    training_length: int
    layer: Int[np.ndarray, " layers"]
    length: Int[np.ndarray, " lengths"]
    whole: Float[np.ndarray, "lengths layers 3"]
    """With one g(S), lower quartile, median and upper quartile; NaN where a layer has no global channel."""
    streaming: Float[np.ndarray, "lengths layers 3"]
    """With g following the position."""


def filtered_share(
    model: LanguageModel,
    calibration: Calibration,
    config: LongMambaConfig,
    tokens: Int[Array, "1 length"],
    layers: Layers,
    lengths: Sequence[int],
) -> FilteredShare:
    """Shares at each of the lengths, none below the training length, none above that of the sequence."""

    def quartiles(length: int, of_sequence: int | None) -> list[np.ndarray]:
        extended = apply_longmamba(model, calibration, dataclasses.replace(config, length=of_sequence))
        shares = diagnostics.collect(
            extended, tokens[:, :length], lambda selection: diagnostics.frozen_share(selection.delta[0])
        )
        of_globals = [np.asarray(share)[layers.is_global[layer]] for layer, share in shares.items()]
        return [np.quantile(share, [0.25, 0.5, 0.75]) if share.size else np.full(3, np.nan) for share in of_globals]

    return FilteredShare(
        layers.training_length,
        np.array(list(layers.is_global)),
        np.array(lengths),
        whole=np.array([quartiles(length, length) for length in lengths]),
        streaming=np.array([quartiles(length, None) for length in lengths]),
    )


@dataclasses.dataclass(frozen=True)
class StateNorms:
    """Norms of the states while a model reads, as it is and with LongMamba streaming; medians over channels."""

    training_length: int
    layer: Int[np.ndarray, " layers"]
    position: Int[np.ndarray, " points"]
    original: Float[np.ndarray, "layers points"]
    extended: Float[np.ndarray, "layers points"]


def state_norms(
    model: LanguageModel,
    calibration: Calibration,
    config: LongMambaConfig,
    tokens: Int[Array, "1 length"],
    layers: Layers,
) -> StateNorms:
    """Norms of the states of global channels; of all, in a layer that has no global ones."""
    every = max(tokens.shape[1] // 100, 1)

    def medians(model: LanguageModel) -> np.ndarray:
        norms = diagnostics.collect(model, tokens, lambda selection: diagnostics.state_norms(selection, every)[0])
        return np.stack([np.median(norm[:, _or_all(layers.is_global[layer])], axis=1) for layer, norm in norms.items()])

    original, extended = medians(model), medians(apply_longmamba(model, calibration, config))
    position = every * np.arange(1, original.shape[1] + 1)
    return StateNorms(layers.training_length, np.array(list(layers.is_global)), position, original, extended)


def _or_all(mask: np.ndarray) -> np.ndarray:
    return mask if mask.any() else ~mask
