import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.long_context.calibration import (
    Calibration,
    calibrate,
    fingerprint,
    length_ratios,
    sample_sequences,
    thresholds,
)
from mamba_jax.long_context.delta_scaling import scale_delta
from mamba_jax.long_context.diagnostics import collect
from tests.mamba_jax.long_context.models import TRAINING_LENGTH, language_model, tokens


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def sequences():
    return tokens(0, 5, TRAINING_LENGTH)


@pytest.fixture(scope="module")
def calibration(model, sequences):
    return calibrate(model, sequences)


def assert_equal(actual: Calibration, expected: Calibration) -> None:
    for field in dataclasses.fields(Calibration):
        if field.name != "places":
            assert getattr(actual, field.name) == getattr(expected, field.name)
    for (place, a), (other, e) in zip(actual.places.items(), expected.places.items(), strict=True):
        assert place == other
        np.testing.assert_array_equal(a.log_decay, e.log_decay)
        np.testing.assert_array_equal(a.thresholds, e.thresholds)


def skewed_steps(seed: int, samples: int, channels: int = 3) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(-3, 0.8, (samples, channels)))


@pytest.mark.parametrize("ratio", [1.5, 4.0, 64.0])
def test_steps_above_the_threshold_sum_to_a_training_sequence_s(ratio):
    """Eq. 18 by brute force: sequences drawn from the calibrated distribution, filtered, and summed."""
    training_length, repeats = 500, 40
    samples = skewed_steps(0, 40 * training_length)
    g = np.asarray(thresholds(jnp.asarray(samples, jnp.float32), np.array([ratio])))[0]
    random = np.random.default_rng(1)
    for channel in range(samples.shape[1]):
        drawn = random.choice(samples[:, channel], (repeats, int(ratio * training_length)))
        kept = np.where(drawn > g[channel], drawn, 0).sum(axis=1)
        wanted = samples[:, channel].mean() * training_length
        assert kept.mean() == pytest.approx(wanted, abs=4 * kept.std() / np.sqrt(repeats) + 0.01 * wanted)


def test_kept_samples_are_the_fewest_largest_that_reach_the_share():
    samples = skewed_steps(2, 301)
    ratios = np.array([1.0, 1.3, 7.0, 250.0, 1e9])
    g = np.asarray(thresholds(jnp.asarray(samples, jnp.float32), ratios), np.float64)
    for channel, column in enumerate(samples.T.astype(np.float32).astype(np.float64)):
        for ratio, threshold in zip(ratios, g[:, channel], strict=True):
            kept = column[column > threshold]
            assert kept.sum() >= column.sum() / ratio * (1 - 1e-5)
            assert kept.sum() - kept.min() < column.sum() / ratio * (1 + 1e-5)
    assert np.all(g[0] < samples.min(axis=0))


def test_decay_and_thresholds_are_those_of_the_collected_steps(model, sequences, calibration):
    for layer, selection in collect(model, sequences).items():
        delta, A = np.asarray(selection.delta, np.float64), np.asarray(selection.A, np.float64)
        decay = np.log(np.exp(delta[..., None] * A).mean(axis=-1)).sum(axis=1).mean(axis=0)
        np.testing.assert_allclose(calibration.places[0].log_decay[layer], decay, rtol=1e-4)
        samples = jnp.asarray(selection.delta).reshape(-1, delta.shape[-1])
        np.testing.assert_allclose(
            calibration.places[0].thresholds[layer], thresholds(samples, length_ratios()), rtol=1e-5
        )


def test_no_token_is_left_out_at_the_training_length_and_more_with_every_length(calibration):
    table = calibration.places[0].thresholds
    assert length_ratios()[0] == 1
    assert np.all(table[:, 0] == 0)
    assert np.all(np.diff(table, axis=1) >= 0)
    assert np.all(table[:, -1] > table[:, 1])


def test_clamped_steps_are_at_most_those_of_the_share(model, sequences):
    clamped = calibrate(model, sequences, clamp=0.2)
    for layer, selection in collect(model, sequences).items():
        limit = np.quantile(np.asarray(selection.delta, np.float64).reshape(-1, selection.delta.shape[-1]), 0.8, axis=0)
        assert np.all(clamped.places[0].thresholds[layer] <= limit * (1 + 1e-5))
        delta, A = np.minimum(selection.delta, limit), np.asarray(selection.A, np.float64)
        decay = np.log(np.exp(delta[..., None] * A).mean(axis=-1)).sum(axis=1).mean(axis=0)
        np.testing.assert_allclose(clamped.places[0].log_decay[layer], decay, rtol=1e-4)


def test_the_same_model_and_tokens_give_the_same_calibration(model, sequences, calibration):
    assert_equal(calibrate(model, sequences), calibration)


def test_extenders_are_not_calibrated(model, sequences, calibration):
    assert_equal(calibrate(scale_delta(model, 0.1), sequences), calibration)


def test_a_file_keeps_everything(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.npz")
    assert_equal(Calibration.load(tmp_path / "calibration.npz"), calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.npz"]


def test_a_file_of_something_else_is_refused(tmp_path):
    for name, write in [
        ("text.npz", lambda path: path.write_text("not a zip file")),
        ("other.npz", lambda path: np.savez(path, weights=np.ones(3))),
    ]:
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is no calibration file"):
            Calibration.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "missing.npz")


def test_any_other_parameters_are_refused(model, calibration):
    calibration.require_model(model)
    leaves, structure = jax.tree.flatten(model)
    for i in range(len(leaves)):
        changed = [leaf.at[(0,) * leaf.ndim].add(1e-3) if i == j else leaf for j, leaf in enumerate(leaves)]
        with pytest.raises(ValueError, match="the calibration is of checkpoint"):
            calibration.require_model(jax.tree.unflatten(structure, changed))


def test_a_fingerprint_ignores_extenders(model):
    assert fingerprint(scale_delta(model, 0.5)) == fingerprint(model)


def test_the_seed_decides_the_sequences():
    stream = np.arange(1000)
    first, same, other = (sample_sequences(stream, length=50, count=4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    assert first.shape == (4, 50)
    assert np.all(np.diff(first, axis=1) == 1)
    np.testing.assert_array_equal(sample_sequences(stream[:50], length=50, count=2), np.tile(stream[:50], (2, 1)))


def test_too_little_to_calibrate_on_is_refused(model):
    with pytest.raises(ValueError, match="are empty"):
        calibrate(model, np.zeros((0, 10), np.int32))
    with pytest.raises(ValueError, match="49 tokens are too few for sequences of length 50"):
        sample_sequences(np.arange(49), length=50)
    with pytest.raises(ValueError, match="count = 0"):
        sample_sequences(np.arange(49), length=5, count=0)
    with pytest.raises(ValueError, match="clamp = 1"):
        calibrate(model, tokens(0, 1, 4), clamp=1.0)
