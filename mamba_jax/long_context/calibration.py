"""What a model's step sizes are like on sequences of the length it was trained on: measured once, kept in one file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from mamba_jax import sharding
from mamba_jax.long_context import overlap
from mamba_jax.long_context.attach import selective_places, without_extenders
from mamba_jax.long_context.diagnostics import log_decay
from mamba_jax.long_context.fingerprint import fingerprint
from mamba_jax.mixers.selective import Selection, SelectiveMixer
from mamba_jax.models.language_model import LanguageModel

_FORMAT = "mamba-jax long-context calibration 4"

STEPS_PER_OCTAVE = 8
"""Lengths measured for each doubling."""
OCTAVES = 12
"""Doublings of the training length that are measured; the last entry of each table holds beyond."""

_ROUNDING = 1e-5
"""Relative difference up to which step sizes count as equal: that of one token in two matrix products."""

PUBLISHED_CLAMP = 0.05
"""Share that the authors' code cuts off for Mamba-2."""

_DIMS_OF_TOKENS_OWN = 4
"""Dimensions of decay rates that are each token's own."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """The step sizes of the layers at one place of a model's pattern. ``channels`` are Mamba-2's heads.

    ``lengths`` are those of ``length_ratios``, in training lengths. S is such a length, L the training length.
    """

    log_decay: Float[np.ndarray, "repeats channels"]
    """Natural logarithm of what a training sequence leaves of the state before it (eq. 14), mean over sequences."""
    thresholds: Float[np.ndarray, "repeats lengths channels"]
    """g(S) of eq. 18: the steps above it, in S tokens, decay the state as all of L tokens do. 0 leaves none out."""
    count_thresholds: Float[np.ndarray, "repeats lengths channels"]
    """The threshold that L of S tokens are above: they decay the state more than L tokens do, being the largest."""
    count_scales: Float[np.ndarray, "repeats lengths channels"]
    """What the steps above ``count_thresholds`` are to be multiplied by, to decay the state as all do on average."""
    longest_ratio: Float[np.ndarray, "repeats channels"]
    """S/L up to which the sample tells thresholds apart: at the next, its largest steps alone exceed L/S."""
    decay_rates: int
    """Decay rates of a channel's state: its size in Mamba-1, 1 in the heads of Mamba-2 and Mamba-3."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Step sizes of a whole model, as LongMamba needs them."""

    training_length: int
    """Tokens of a calibration sequence."""
    sequences: int
    """Sequences measured."""
    clamp: float | None
    """As given to ``calibrate``."""
    checkpoint: str
    """``fingerprint`` of the model measured."""
    source: str | None
    """Names the text the sequences are from, by its content; None where that was not said."""
    excerpts: tuple[int, ...]
    """Hashes by which parts of the sequences are known again in any text; see ``overlap``."""
    places: dict[int, LayerStatistics]
    """By place in the model's pattern, those with a delta."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file: the arrays, and a JSON header that says what they are and of which checkpoint."""
        header = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "places"}
        header |= {"format": _FORMAT, "places": sorted(self.places)}
        arrays: dict[str, Any] = {
            f"{field.name}_{place}": np.asarray(getattr(layers, field.name))
            for place, layers in self.places.items()
            for field in dataclasses.fields(layers)
        }
        # Complete or not there: an interrupted write leaves no half file under the name.
        part = Path(f"{os.fspath(path)}.part")
        with part.open("wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
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
            raise ValueError(
                f"{os.fspath(path)} is no calibration file: make one with 'mamba-jax calibrate'."
            ) from error
        if not is_ours:
            raise ValueError(f"{os.fspath(path)} is of another version than {_FORMAT!r}: calibrate again.")
        excerpts = tuple(header.pop("excerpts"))
        places = {place: _layers(arrays, place) for place in header.pop("places")}
        return Calibration(excerpts=excerpts, places=places, **header)

    def require_model(self, model: LanguageModel) -> None:
        """Raises a ValueError unless this was measured on exactly these parameters."""
        actual = fingerprint(model)
        if actual != self.checkpoint:
            raise ValueError(
                f"the calibration is of checkpoint {self.checkpoint[:12]}, but the model is {actual[:12]}: "
                f"calibrate this model and use that."
            )

    def require_unseen(self, source: str, pieces: Iterable[Integer[np.ndarray, " _"]]) -> None:
        """Raises a ValueError unless this was measured on other text than is to be evaluated on.

        The text may neither be the one that the sequences are from, nor hold ``overlap.run_length`` consecutive tokens
        of one of them: half a sequence, at most 1,024.

        Args:
            source: name of the text to evaluate on, of the same kind as was given to ``calibrate``.
            pieces: its tokens in their order, cut anywhere, without separators; see ``overlap.found``.
        """
        if self.source is None:
            raise ValueError(
                "the calibration does not say what text it was measured on, so it may be the text to evaluate on: "
                "calibrate(..., source=...) again, or with 'mamba-jax calibrate'."
            )
        if self.source == source:
            raise ValueError(
                f"the calibration was measured on the very text to evaluate on ({source[:12]}): "
                "calibrate on training data."
            )
        hashes = np.array(self.excerpts, np.uint64)
        if overlap.found(hashes, pieces, self.training_length).any():
            raise ValueError(
                "the text to evaluate on holds a part of what the calibration was measured on "
                f"({overlap.run_length(self.training_length)} tokens or nearly as many): evaluate on other text, or "
                "calibrate on other sequences (another seed)."
            )


def length_ratios() -> Float[np.ndarray, " lengths"]:
    """Lengths, in training lengths, that tables of thresholds have an entry for: from 1, geometric."""
    return 2.0 ** (np.arange(OCTAVES * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)


def calibrate(
    model: LanguageModel,
    sequences: Integer[Array | np.ndarray, "batch length"],
    *,
    clamp: float | None = None,
    source: str | None = None,
    separator: int | None = None,
) -> Calibration:
    """Measures the step sizes of every layer.

    Args:
        model: the model to extend later; extenders it has already are not applied.
        sequences: tokens such as it was trained on, as long as its training sequences; the paper takes 10. Never
            take them from what the extended model will be evaluated on.
        clamp: cut off this share of the largest step sizes of each channel at the least of them, before all else, as
            the authors' code does. None takes what was published: 0.05 for Mamba-2 (the authors' code, which has
            0.2 for Mamba-1), 0 for all others (the paper).
        source: names the text the sequences are from, such as ``train.data.tokens.Tokens.fingerprint``; evaluations
            then refuse to use the calibration on the same text.
        separator: token between documents, if there is one. What evaluations read has none, so the excerpts by which
            they know the sequences again are without.

    Raises:
        ValueError: there is no token, no layer has a delta, or the share is below 0 or not below 1.
    """
    count, length = sequences.shape
    if not count * length:
        raise ValueError(f"sequences of shape {sequences.shape} are empty: give at least one of the training length.")
    if clamp is not None and not 0 <= clamp < 1:
        raise ValueError(f"clamp = {clamp} cannot be used: a share from 0 to below 1, or None for what was published.")
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
    texts = [sequence[sequence != separator] for sequence in np.asarray(sequences)]
    return Calibration(
        training_length=length,
        sequences=count,
        clamp=clamp,
        checkpoint=fingerprint(model),
        source=source,
        excerpts=tuple(np.concatenate(overlap.excerpts(texts, length)).tolist()),
        places={
            place: LayerStatistics(*map(np.asarray, measured[place]), decay_rates=_decay_rates(model, place))
            for place in places
        },
    )


def sample_sequences(
    tokens: Integer[np.ndarray, " tokens"], *, length: int, count: int = 10, seed: int = 0
) -> Integer[np.ndarray, "count length"]:
    """Draws calibration sequences from a stream of tokens; arguments and errors are those of ``sample_starts``."""
    starts = sample_starts(len(tokens), length=length, count=count, seed=seed)
    return np.stack([tokens[start : start + length] for start in starts])


def sample_starts(tokens: int, *, length: int, count: int = 10, seed: int = 0) -> list[int]:
    """Draws where calibration sequences begin in a stream of this many tokens; the seed decides.

    Raises:
        ValueError: the stream is shorter than a sequence, or the count or length below 1.
    """
    if count < 1 or length < 1:
        raise ValueError(f"count = {count} and length = {length} cannot be used: at least 1 each.")
    if tokens < length:
        raise ValueError(f"{tokens} tokens are too few for sequences of length {length}: give at least as many.")
    return np.random.default_rng(seed).integers(tokens - length + 1, size=count).tolist()


def thresholds(
    delta: Float[Array, "samples channels"],
    ratios: Float[Array | np.ndarray, " lengths"],
    decay: Float[Array, "samples channels"] | None = None,
) -> Float[Array, "lengths channels"]:
    """Threshold g for sequences longer than the training length (eq. 18), from a sample of step sizes.

    A sequence S/L times as long as a training sequence, drawn from the same distribution, decays the state S/L times as
    much, by its logarithm. The largest step sizes that make up L/S of that therefore decay it as a training sequence
    does, whatever S: g is a quantile of the sum, not of the count. Samples up to g are left out, those above it make up
    L/S or just more.

    Args:
        delta: step sizes, all of training sequences.
        ratios: S/L, at least 1.
        decay: how much each of them decays the state: its negative logarithm, to any scale. None where the decay rate
            is the same for all, which makes it the step size.
    """
    descending, decay = _by_size(delta, decay)
    cumulative = jnp.cumsum(decay, axis=0)
    wanted = cumulative[-1] / jnp.asarray(ratios, delta.dtype)[:, None]
    last_kept = jax.vmap(jnp.searchsorted, in_axes=1, out_axes=1)(cumulative, wanted)
    return _threshold_below(descending, jnp.minimum(last_kept, len(delta) - 1))[0]


def count_thresholds(
    delta: Float[Array, "samples channels"],
    ratios: Float[np.ndarray, " lengths"],
    decay: Float[Array, "samples channels"] | None = None,
) -> tuple[Float[Array, "lengths channels"], Float[Array, "lengths channels"]]:
    """Threshold that a share L/S of a sample of step sizes is above, or just more, and the factor for those above it.

    Times the factor, the step sizes above decay the state as much as the whole sample does, on average. So of S tokens
    as many are kept as a training sequence has, and they decay it as much.

    Args:
        delta: step sizes, all of training sequences.
        ratios: S/L, at least 1.
        decay: as for ``thresholds``.
    """
    descending, decay = _by_size(delta, decay)
    wanted = np.ceil(len(delta) / ratios).astype(int)
    last_kept = jnp.broadcast_to(wanted[:, None] - 1, (len(ratios), delta.shape[1]))
    threshold, kept = _threshold_below(descending, last_kept)
    mean_kept = jnp.take_along_axis(jnp.cumsum(decay, axis=0), kept - 1, axis=0) / kept
    # Compiled, a number divided by itself need not be 1.
    return threshold, jnp.where(kept == len(delta), 1, jnp.mean(decay, axis=0) / mean_kept)


def _by_size(
    delta: Float[Array, "samples channels"], decay: Float[Array, "samples channels"] | None
) -> tuple[Float[Array, "samples channels"], Float[Array, "samples channels"]]:
    """Step sizes, the largest first, and what each adds to the decay: itself, if nothing else is given."""
    if decay is None:
        descending = jnp.sort(delta, axis=0, descending=True)
        return descending, descending
    order = jnp.argsort(delta, axis=0, descending=True)
    return jnp.take_along_axis(delta, order, axis=0), jnp.take_along_axis(decay, order, axis=0)


def _threshold_below(
    descending: Float[Array, "samples channels"], last_kept: Int[Array, "lengths channels"]
) -> tuple[Float[Array, "lengths channels"], Int[Array, "lengths channels"]]:
    """What is just above the largest sample smaller than those at ``last_kept``, 0 where there is none; and how many
    are above it.

    Equal samples are kept or left out together: where delta depends on the token alone, as in a first layer of
    Mamba-2, there are many. Rounding may not tell them apart, here or where the threshold is used.
    """
    smallest_kept = jnp.take_along_axis(descending, last_kept, axis=0) * (1 - _ROUNDING)
    count = jax.vmap(lambda column, value: jnp.searchsorted(-column, -value, side="right"), in_axes=1, out_axes=1)(
        descending, smallest_kept
    )
    largest_left_out = jnp.take_along_axis(jnp.pad(descending, ((0, 1), (0, 0))), count, axis=0)
    return largest_left_out * (1 + _ROUNDING / 2), count


def _decay_rates(model: LanguageModel, place: int) -> int:
    """Decay rates of a channel's state in the layers at one place of the pattern."""

    def of_first(blocks):
        block = jax.tree.map(lambda stacked: stacked[0], blocks)
        return block.mixer.selection(jnp.zeros((1, 1, model.config.width), block.compute_dtype)).A

    A = jax.eval_shape(of_first, model.blocks[place])
    return 1 if A.ndim == 1 else A.shape[-1]


def _statistics(selection: Selection, clamp: float | None):
    """Fields of LayerStatistics that are arrays, without the repeats."""
    # Few numbers: brought together on a mesh, to be sorted and looked up in without exchanges.
    delta, A = (sharding.reshard(array, (None,) * array.ndim) for array in (selection.delta, selection.A))
    channels = delta.shape[-1]
    if clamp is None:
        clamp = PUBLISHED_CLAMP if A.ndim == 1 else 0.0
    if clamp > 0:
        delta = jnp.minimum(delta, jnp.quantile(delta.reshape(-1, channels), 1 - clamp, axis=0))
    decay = log_decay(delta, A)
    samples = delta.reshape(-1, channels)
    # Where the rate is each token's own, equal steps decay the state unequally.
    of_samples = -decay.reshape(-1, channels) if A.ndim == _DIMS_OF_TOKENS_OWN else None
    added = samples if of_samples is None else of_samples
    are_largest = samples >= (1 - _ROUNDING) * jnp.max(samples, axis=0)
    longest_ratio = jnp.sum(added, axis=0) / jnp.sum(jnp.where(are_largest, added, 0), axis=0)
    ratios = length_ratios()
    return (
        jnp.mean(jnp.sum(decay, axis=1), axis=0),
        thresholds(samples, ratios, of_samples),
        *count_thresholds(samples, ratios, of_samples),
        longest_ratio,
    )


def _layers(arrays: dict[str, np.ndarray], place: int) -> LayerStatistics:
    fields: dict[str, Any] = {
        field.name: arrays[f"{field.name}_{place}"] for field in dataclasses.fields(LayerStatistics)
    }
    fields["decay_rates"] = int(fields["decay_rates"])
    return LayerStatistics(**fields)
