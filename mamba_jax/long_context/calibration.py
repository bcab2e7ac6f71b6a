"""What a model's step sizes are like on sequences of the length it was trained on: measured once, kept in one file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mamba_jax.long_context.attach import selective_places, without_extenders
from mamba_jax.long_context.diagnostics import log_decay
from mamba_jax.mixers.selective import Selection, SelectiveMixer
from mamba_jax.models.language_model import LanguageModel

_FORMAT = "mamba-jax long-context calibration 1"

STEPS_PER_OCTAVE = 16
"""Entries of a table of thresholds for each doubling of the length."""
OCTAVES = 12
"""Doublings of the training length that a table covers; its last entry holds beyond."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """The step sizes of the layers at one place of a model's pattern. ``channels`` are Mamba-2's heads."""

    log_decay: Float[np.ndarray, "repeats channels"]
    """Natural logarithm of what a training sequence leaves of the state before it (eq. 14), averaged over sequences."""
    thresholds: Float[np.ndarray, "repeats lengths channels"]
    """Threshold g (eq. 18) at ``length_ratios`` times the training length: steps up to it are left out. 0 for none."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Step sizes of a whole model, as LongMamba needs them."""

    training_length: int
    """Tokens of a calibration sequence."""
    sequences: int
    """Sequences measured."""
    clamp: float | None
    """Share of the largest step sizes of each channel that were cut off at the least of them; None for none."""
    checkpoint: str
    """``fingerprint`` of the model measured."""
    places: dict[int, LayerStatistics]
    """By place in the model's pattern, those with a delta."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file: the arrays, and a JSON header that says what they are and of which checkpoint."""
        header = {
            "format": _FORMAT,
            "training_length": self.training_length,
            "sequences": self.sequences,
            "clamp": self.clamp,
            "checkpoint": self.checkpoint,
            "places": sorted(self.places),
        }
        arrays = {
            f"{field.name}_{place}": getattr(layers, field.name)
            for place, layers in self.places.items()
            for field in dataclasses.fields(layers)
        }
        # Complete or not there: an interrupted write leaves no half file under the name.
        part = Path(f"{os.fspath(path)}.part")
        with part.open("wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
        os.replace(part, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            with np.load(path) as file:
                arrays = dict(file)
            header = json.loads(str(arrays.pop("header")))
            is_ours = header.pop("format") == _FORMAT
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)} is no calibration file: make one with calibrate(...).save.") from error
        if not is_ours:
            raise ValueError(f"{os.fspath(path)} is of another version than {_FORMAT!r}: calibrate again.")
        names = [field.name for field in dataclasses.fields(LayerStatistics)]
        places = {p: LayerStatistics(**{name: arrays[f"{name}_{p}"] for name in names}) for p in header.pop("places")}
        return Calibration(places=places, **header)

    def require_model(self, model: LanguageModel) -> None:
        """Raises a ValueError unless this was measured on exactly these parameters."""
        actual = fingerprint(model)
        if actual != self.checkpoint:
            raise ValueError(
                f"the calibration is of checkpoint {self.checkpoint[:12]}, but the model is {actual[:12]}: "
                f"calibrate this model and use that."
            )


def length_ratios() -> Float[np.ndarray, " lengths"]:
    """Lengths, in training lengths, that tables of thresholds have an entry for: from 1, geometric."""
    return 2.0 ** (np.arange(OCTAVES * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)


def calibrate(
    model: LanguageModel, sequences: Int[Array | np.ndarray, "batch length"], *, clamp: float | None = None
) -> Calibration:
    """Measures the step sizes of every layer.

    Args:
        model: the model to extend later; extenders it has already are not applied.
        sequences: tokens such as it was trained on, as long as its training sequences; the paper takes 10. Never
            take them from what the extended model will be evaluated on.
        clamp: cut off this share of the largest step sizes of each channel before all else, as the authors' code
            does (0.2 for Mamba-1, 0.05 for Mamba-2); None, as in the paper, cuts off none.

    Raises:
        ValueError: there is no token, no layer has a delta, or the share is not between 0 and 1.
    """
    count, length = sequences.shape
    if not count * length:
        raise ValueError(f"sequences of shape {sequences.shape} are empty: give at least one of the training length.")
    if clamp is not None and not 0 < clamp < 1:
        raise ValueError(f"clamp = {clamp} cannot be used: a share above 0 and below 1, or None for none.")
    model = without_extenders(model)
    places = selective_places(model)
    if not places:
        raise ValueError(f"model of pattern {model.config.pattern!r} has no layer with a delta to calibrate.")

    @jax.jit
    def measure(model, sequences):
        def of_mixer(mixer, x):
            return _statistics(mixer.selection(x), clamp) if isinstance(mixer, SelectiveMixer) else None

        return model.map_mixers(of_mixer, sequences)

    measured = measure(model, jnp.asarray(sequences, jnp.int32))
    return Calibration(
        training_length=length,
        sequences=count,
        clamp=clamp,
        checkpoint=fingerprint(model),
        places={place: LayerStatistics(*map(np.asarray, measured[place])) for place in places},
    )


def sample_sequences(
    tokens: Int[np.ndarray, " tokens"], *, length: int, count: int = 10, seed: int = 0
) -> Int[np.ndarray, "count length"]:
    """Draws calibration sequences from a stream of tokens; the seed decides which.

    Raises:
        ValueError: the stream is shorter than a sequence, or the count or length below 1.
    """
    if count < 1 or length < 1:
        raise ValueError(f"count = {count} and length = {length} cannot be used: at least 1 each.")
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} tokens are too few for sequences of length {length}: give at least as many.")
    starts = np.random.default_rng(seed).integers(len(tokens) - length + 1, size=count)
    return np.stack([tokens[start : start + length] for start in starts])


def thresholds(
    delta: Float[Array, "samples channels"], ratios: Float[Array | np.ndarray, " lengths"]
) -> Float[Array, "lengths channels"]:
    """Threshold g for sequences longer than the training length (eq. 18), from a sample of step sizes.

    A sequence S/L times as long as a training sequence, drawn from the same distribution, has S/L times its sum. The
    largest step sizes that make up L/S of the sum therefore add to a training sequence's sum, whatever S: g is a
    quantile of the sum, not of the count. Samples up to g are left out, those above it add to L/S or just more.

    Args:
        delta: step sizes, all of training sequences.
        ratios: S/L, at least 1.
    """
    descending = jnp.sort(delta, axis=0, descending=True)
    cumulative = jnp.cumsum(descending, axis=0)
    wanted = cumulative[-1] / jnp.asarray(ratios, delta.dtype)[:, None]
    last_kept = jax.vmap(jnp.searchsorted, in_axes=1, out_axes=1)(cumulative, wanted)
    next_smaller = jnp.pad(descending[1:], ((0, 1), (0, 0)))
    return jnp.take_along_axis(next_smaller, last_kept, axis=0, mode="clip")


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 of a model's parameters: their names, shapes and values. Extenders do not count."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(without_extenders(model)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _statistics(selection: Selection, clamp: float | None):
    delta = selection.delta
    samples = delta.reshape(-1, delta.shape[-1])
    if clamp is not None:
        delta = jnp.minimum(delta, jnp.quantile(samples, 1 - clamp, axis=0))
        samples = delta.reshape(samples.shape)
    decay = jnp.mean(jnp.sum(log_decay(delta, selection.A), axis=1), axis=0)
    return decay, thresholds(samples, length_ratios())
