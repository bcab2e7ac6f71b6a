"""Measures a trained model's step sizes on the text it was trained on, for LongMamba."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mamba_jax.long_context import calibration as calibrations
from mamba_jax.long_context.calibration import Calibration
from mamba_jax.long_context.longmamba import chosen_channels
from mamba_jax.models.language_model import LanguageModel
from train.checkpoint import TrainedModel, load_for_inference
from train.data import pipeline
from train.data.tokens import Tokens
from train.errors import UsageError, UserError


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
    step, model = trained.restore(jax.eval_shape(lambda: trained.experiment.model.build(nnx.Rngs(0))))
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

    Arguments and errors are those of ``run``.
    """
    data = trained.experiment.data
    corpus = pipeline.load(data)
    corpus.require_vocabulary(trained.experiment.model.vocab_size)
    length = data.sequence_length if length is None else length
    sequences = _sample(corpus.train, length=length, count=count, seed=seed)
    try:
        return calibrations.calibrate(model, sequences, clamp=clamp, source=corpus.train.fingerprint)
    except ValueError as error:
        raise UserError(str(error)) from None


def _sample(tokens: Tokens, *, length: int, count: int, seed: int) -> np.ndarray:
    """Sequences from a split, (count, length)."""
    try:
        starts = calibrations.sample_starts(len(tokens.ids), length=length, count=count, seed=seed)
    except ValueError as error:
        raise UsageError(f"--length {length} --count {count}: {error}") from None
    return np.stack([tokens.read(start, start + length) for start in starts])


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
