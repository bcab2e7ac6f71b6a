"""Draws how far a trained model sees, as in the figures of the LongMamba paper, and saves the numbers beside them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from mamba_jax.long_context import LongMambaConfig, figures, measurements
from mamba_jax.long_context.calibration import Calibration
from mamba_jax.models.language_model import LanguageModel
from train import calibrate
from train.checkpoint import TrainedModel, load_for_inference
from train.data import pipeline
from train.errors import UsageError, UserError

_EXTENSION = 8
"""The extended sequence is this many times as long as a training sequence, as in the paper's figure 1."""


def run(
    checkpoint: Path,
    out: Path,
    *,
    calibration: Path | None = None,
    length: int | None = None,
    layer: int | None = None,
    decay_threshold: float | None = None,
) -> None:
    """Writes a PNG and an .npz for each figure; the text is the beginning of the held-out split.

    Args:
        checkpoint: a run's workdir, or the folder of one of its checkpoints.
        out: folder to write to, made where there is none.
        calibration: file of 'mamba-jax calibrate'; None measures with its defaults.
        length: tokens of the extended sequence; None takes 8 times the training length.
        layer: layer that figures 1, 7 and 8 show; None takes the middle one of those with a delta.
        decay_threshold: decay above which a channel is global; None takes that of ``LongMambaConfig``.

    Raises:
        UserError: a file cannot be read or written, or the calibration is of another model.
        UsageError: there is no such layer, the length does not fit the text, or the threshold is no share.
    """
    try:
        config = LongMambaConfig(decay_threshold=decay_threshold)
    except ValueError as error:
        raise UsageError(f"--decay_threshold: {error}") from None
    trained = load_for_inference(checkpoint)
    _, model = trained.restore_model()
    measured = (
        calibrate.calibrate(trained, model) if calibration is None else calibrate.load(calibration, model, checkpoint)
    )
    length = _EXTENSION * measured.training_length if length is None else length
    tokens = _held_out_tokens(trained, measured.training_length, length)
    layers = measurements.layers_of(model, measured, config)
    layer = _middle(layers) if layer is None else layer
    if layer not in layers.is_global:
        raise UsageError(f"--layer {layer}: the layers with a delta are {', '.join(map(str, layers.is_global))}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        for name, numbers, figure in _figures(model, measured, config, layers, tokens, layer):
            np.savez(out / f"{name}.npz", **_arrays(numbers))
            figures.save(figure, out / f"{name}.png")
            print(f"{time.perf_counter() - began:6.1f} s  {out / name}.png", flush=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}.") from None


def _figures(
    model: LanguageModel,
    calibration: Calibration,
    config: LongMambaConfig,
    layers: measurements.Layers,
    tokens: Int[Array, "1 length"],
    layer: int,
) -> Iterator[tuple[str, Any, Figure]]:
    """Name, numbers and picture of each figure; numbers in names are the paper's."""
    training_length, length = layers.training_length, tokens.shape[1]
    at_training_length = tokens[:, :training_length]
    doublings = [training_length << i for i in range((length // training_length).bit_length())]

    yield "channels", layers, figures.census(layers)

    five = {layer: layers.pick(layer, local=3, globals_=2)}
    for part, sequence in (("a", at_training_length), ("b", tokens)):
        maps = measurements.attention_maps(model, sequence, layers, five)
        title = f"Hidden attention at {sequence.shape[1]:,} tokens"
        picture = figures.attention_maps(maps, columns=len(maps.channel), title=title)
        yield f"figure_01{part}_attention", maps, picture

    fields = measurements.receptive_fields(model, tokens, layers, layer, layers.pick(layer, local=2, globals_=2))
    yield "figure_07_receptive_field", fields, figures.receptive_fields(fields)

    slowest = np.argsort(layers.log10_decay[layer])[::-1][:4]
    decay = measurements.extended_decay(model, calibration, config, tokens, layers, layer, slowest, doublings)
    yield "figure_08_decay_with_longmamba", decay, figures.extended_decay(decay)

    for number, shown in zip(range(9, 15), measurements.spread(list(layers.is_global), 6).tolist(), strict=False):
        first_24 = np.arange(min(24, layers.is_global[shown].size))
        curves = measurements.decay_curves(model, calibration, config, tokens, layers, shown, first_24)
        yield f"figure_{number:02}_decay_layer_{shown}", curves, figures.decay_curves(curves)

    share = measurements.filtered_share(model, calibration, config, tokens, layers, doublings[1:])
    yield "filtered_share", share, figures.filtered_share(share)

    twelve = {
        shown: measurements.spread(np.arange(layers.is_global[shown].size), 12)
        for shown in measurements.spread(list(layers.is_global), 4).tolist()
    }
    columns = min(12, *(len(channels) for channels in twelve.values()))
    for number, sequence in ((15, at_training_length), (16, tokens)):
        maps = measurements.attention_maps(model, sequence, layers, twelve, pixels=120)
        title = f"Hidden attention at {sequence.shape[1]:,} tokens"
        yield f"figure_{number}_attention", maps, figures.attention_maps(maps, columns=columns, title=title)

    norms = measurements.state_norms(model, calibration, config, tokens, layers)
    yield "state_norms", norms, figures.state_norms(norms)


def _held_out_tokens(trained: TrainedModel, training_length: int, length: int) -> Int[Array, "1 length"]:
    corpus = pipeline.load(trained.experiment.data)
    corpus.require_vocabulary(trained.experiment.model.vocab_size)
    available = len(corpus.held_out.ids)
    if not 2 * training_length <= length <= available:
        raise UsageError(
            f"--length {length} cannot be used: at least twice the training length ({2 * training_length}), at most "
            f"the {available} tokens of the held-out text."
        )
    return jnp.asarray(corpus.held_out.read(0, length), jnp.int32)[None]


def _middle(layers: measurements.Layers) -> int:
    numbers = list(layers.is_global)
    return numbers[len(numbers) // 2]


def _arrays(numbers: Any) -> dict[str, Any]:
    """Fields of a dataclass by name; of a field that has a value a layer, ``NAME_LAYER``."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(numbers):
        value = getattr(numbers, field.name)
        by_layer = value.items() if isinstance(value, dict) else ()
        arrays |= {f"{field.name}_{layer}": item for layer, item in by_layer} or {field.name: value}
    return {name: np.asarray(value) for name, value in arrays.items()}
