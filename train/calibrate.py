"""Measures a trained model's step sizes on the text it was trained on, for LongMamba."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer

from mamba_jax.long_context import calibration as calibrations
from mamba_jax.long_context import overlap
from mamba_jax.long_context.calibration import Calibration
from mamba_jax.long_context.longmamba import chosen_channels
from mamba_jax.models.language_model import LanguageModel
from train.checkpoint import TrainedModel, load_for_inference
from train.data import pipeline
from train.data.tokens import Corpus, Tokens
from train.errors import UsageError, UserError

_DRAWN_FOR_EACH = 8
"""Sequences drawn for each that is wanted, in case the held-out split has some of them too."""

_log = logging.getLogger(__name__)


def run(
    checkpoint: Path,
    out: Path,
    *,
    length: int | None = None,
    count: int = 10,
    seed: int = 0,
    clamp: float | None = None,
) -> Calibration:
    """Calibrates a checkpoint on its own training split, writes the result, and prints what was found in each layer.

    Args:
        checkpoint: a run's workdir, or the folder of one of its checkpoints.
        out: file to write, .npz.
        length: tokens of a sequence; None takes the run's training length.
        count: sequences.
        seed: decides which.
        clamp: see ``mamba_jax.long_context.calibration.calibrate``.

    Raises:
        UserError: checkpoint, data or file cannot be read or written, or the model has no layer to calibrate.
        UsageError: a number is out of its range.
    """
    trained = load_for_inference(checkpoint)
    step, model = trained.restore_model()
    calibration = calibrate(trained, model, length=length, count=count, seed=seed, clamp=clamp)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}.") from None
    print(
        f"calibrated step {step} on {count} sequences of {calibration.training_length:,} tokens of the training split "
        f"(seed {seed}): {out}"
    )
    print(_summary(calibration, len(model.config.pattern)))
    return calibration


def calibrate(
    trained: TrainedModel,
    model: LanguageModel,
    *,
    length: int | None = None,
    count: int = 10,
    seed: int = 0,
    clamp: float | None = None,
) -> Calibration:
    """Calibrates a model on the training split of the data its run was configured with; never on any other text.

    A sequence of which the held-out split has a good part too, as in a copy of a document, gives way to the next drawn.
    Arguments and errors are those of ``run``.
    """
    data = trained.experiment.data
    corpus = pipeline.load(data)
    corpus.require_vocabulary(trained.experiment.model.vocab_size)
    length = data.sequence_length if length is None else length
    sequences = _sample(corpus, length=length, count=count, seed=seed)
    separator = corpus.tokenizer.separator_id
    try:
        return calibrations.calibrate(
            model, sequences, clamp=clamp, source=corpus.train.fingerprint, separator=separator
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def load(path: Path, model: LanguageModel, checkpoint: Path) -> Calibration:
    """Reads a calibration of this model, which is from this checkpoint.

    Raises:
        UserError: the file cannot be read, is no calibration, or is of another model; says how one is made.
    """
    try:
        calibration = Calibration.load(path)
        calibration.require_model(model)
    except FileNotFoundError:
        raise UserError(f"--calibration {path}: there is no such file. {how_to_make(checkpoint)}") from None
    except OSError as error:
        raise UserError(f"--calibration {path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"--calibration {path}: {error} {how_to_make(checkpoint)}") from None
    return calibration


def how_to_make(checkpoint: Path) -> str:
    """The command that calibrates a checkpoint, as a sentence."""
    return f"Make it with: mamba-jax calibrate --checkpoint {checkpoint} --out calibration.npz"


def _sample(corpus: Corpus, *, length: int, count: int, seed: int) -> Integer[np.ndarray, "count length"]:
    """The first sequences drawn from the training split of which the held-out split has no good part."""
    tokens = corpus.train
    try:
        starts = calibrations.sample_starts(
            len(tokens.ids), length=length, count=max(count, _DRAWN_FOR_EACH * count), seed=seed
        )
    except ValueError as error:
        raise UsageError(f"--length {length} --count {count}: {error}") from None
    sequences = np.stack([tokens.read(start, start + length) for start in starts])
    is_held_out = _are_in(corpus.held_out, sequences)
    chosen = np.flatnonzero(~is_held_out)[:count]
    if len(chosen) < count:
        raise UserError(
            f"of {len(sequences)} sequences of {length} tokens drawn from the training split, the held-out split has a "
            f"good part of {is_held_out.sum()} too: the corpus repeats itself. Give a smaller --count, or make the "
            "corpus again without copies."
        )
    if left_out := is_held_out[: chosen[-1]].sum():
        _log.info("%d of the sequences drawn left out: the held-out split has a good part of each too", left_out)
    return sequences[chosen]


def _are_in(tokens: Tokens, sequences: Integer[np.ndarray, "count length"]) -> Bool[np.ndarray, " count"]:
    """Which sequences a split has a good part of."""
    length = sequences.shape[1]
    texts = [sequence[sequence != tokens.tokenizer.separator_id] for sequence in sequences]
    excerpts = overlap.excerpts(texts, length)
    found = overlap.found(np.concatenate(excerpts), tokens.iter_text(), length)
    return np.array([part.any() for part in np.split(found, np.cumsum([len(part) for part in excerpts])[:-1])])


def _summary(calibration: Calibration, places: int) -> str:
    """A line a layer: how many channels are global, and how long sequences may get before g stays as it is.

    Args:
        calibration: of a model.
        places: length of the model's pattern.
    """
    lines = ["layer  global channels     g(S) grows up to S = (median of the global channels)"]
    for place, mask in chosen_channels(calibration).items():
        for repeat, is_global in enumerate(mask):
            ratios = calibration.places[place].longest_ratio[repeat][is_global]
            longest = f"{round(np.median(ratios) * calibration.training_length):,} tokens" if ratios.size else "-"
            layer = repeat * places + place
            lines.append(f"{layer:5}  {is_global.sum():6,} of {is_global.size:<6,}     {longest}")
    return "\n".join([lines[0], *sorted(lines[1:], key=lambda line: int(line.split()[0]))])
