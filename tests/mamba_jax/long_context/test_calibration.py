import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mamba_jax import sharding
from mamba_jax.long_context.calibration import (
    Calibration,
    calibrate,
    count_thresholds,
    length_ratios,
    sample_sequences,
    thresholds,
)
from mamba_jax.long_context.diagnostics import collect
from mamba_jax.long_context.scaling import ScalingConfig, apply_scaling
from tests.mamba_jax.long_context.models import TRAINING_LENGTH, language_model, on_mesh, tokens
from tests.mamba_jax.meshes import mesh


@pytest.fixture(scope="module", params=["M", "2", "3"], ids=["mamba1", "mamba2", "mamba3"])
def model(request):
    return language_model(pattern=request.param)


@pytest.fixture(scope="module")
def sequences():
    return tokens(0, 5, TRAINING_LENGTH)


@pytest.fixture(scope="module")
def calibration(model, sequences):
    return calibrate(model, sequences, clamp=0.0, source="a text")


def assert_equal(actual: Calibration, expected: Calibration) -> None:
    for field in dataclasses.fields(Calibration):
        if field.name != "places":
            assert getattr(actual, field.name) == getattr(expected, field.name)
    for (place, a), (other, e) in zip(actual.places.items(), expected.places.items(), strict=True):
        assert place == other
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(e, field.name))


def mean_log_decay(delta, A) -> np.ndarray:
    """Eq. 14 over each sequence, (channels,); A of a layer, or of each token."""
    delta, A = np.asarray(delta, np.float64), np.asarray(A, np.float64)
    rates = A if A.ndim == 4 else A.reshape(len(A), -1)
    return np.log(np.exp(delta[..., None] * rates).mean(axis=-1)).sum(axis=1).mean(axis=0)


def skewed_steps(seed: int, samples: int, channels: int = 3) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(-3, 0.8, (samples, channels)))


def test_layers_without_a_delta_are_left_out_and_a_model_of_nothing_else_is_refused(sequences):
    class Copies(nnx.Module):
        def __call__(self, x, *, state, segment_ids):
            return x, None

    model = language_model(pattern="MM")
    model.blocks[0].mixer = Copies()
    assert list(calibrate(model, sequences).places) == [1]
    model.blocks[1].mixer = Copies()
    with pytest.raises(ValueError, match="model of pattern 'MM' has no layer with a delta to calibrate"):
        calibrate(model, sequences)


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


@pytest.mark.parametrize("ratio", [1.5, 4.0, 64.0])
def test_what_is_kept_decays_a_state_as_in_training_whatever_the_decay_rates(model, sequences, calibration, ratio):
    """Eq. 16: of S/L calibrated sequences the steps kept decay a state as one does, and without the least would not."""
    index = int(np.argmin(np.abs(length_ratios() - ratio)))
    places = calibration.places[0]
    for layer, selection in collect(model, sequences).items():
        delta, A = np.asarray(selection.delta, np.float64), np.asarray(selection.A, np.float64)
        # Of several rates any would do: each decays in proportion to delta.
        rates = A[..., 0] if A.ndim == 4 else A.reshape(len(A), -1)[:, 0]
        decay, kept = -delta * rates, delta > places.thresholds[layer, index]
        least = np.where(kept, delta, np.inf).min(axis=(0, 1))
        more_than_least = kept & (delta > least * (1 + 2e-5))
        of_training = decay.sum(axis=(0, 1)) / length_ratios()[index]
        assert np.all(np.sum(decay, axis=(0, 1), where=kept) > of_training * (1 - 1e-4))
        assert np.all(np.sum(decay, axis=(0, 1), where=more_than_least) < of_training * (1 + 1e-4))


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


def test_steps_above_the_count_threshold_are_as_many_as_in_training_and_scaled_to_its_mean():
    samples = skewed_steps(3, 400)
    ratios = np.array([1.0, 1.3, 7.0, 250.0, 1e9])
    g, scales = (np.asarray(table, np.float64) for table in count_thresholds(jnp.asarray(samples, jnp.float32), ratios))
    for channel, column in enumerate(samples.T.astype(np.float32).astype(np.float64)):
        for i, expected in enumerate([400, 308, 58, 2, 1]):  # 400 / ratio, rounded up
            kept = column[column > g[i, channel]]
            assert len(kept) == expected
            assert (scales[i, channel] * kept).mean() == pytest.approx(column.mean(), rel=1e-5)
    assert np.all(g[0] == 0)
    np.testing.assert_array_equal(scales[0], 1)  # exactly: nothing is to change up to the training length


def test_equal_steps_are_kept_or_left_out_together():
    samples = jnp.repeat(jnp.array([[5.0], [3.0], [2.0], [1.0]]), jnp.array([1, 4, 3, 4]), axis=0)  # they sum to 27
    ratios = np.array([1.0, 27 / 23, 27 / 17, 27 / 5.1, 27 / 4.9, 99.0])
    np.testing.assert_allclose(thresholds(samples, ratios)[:, 0], [0, 1, 2, 2, 3, 3], rtol=1e-5)
    g, scales = count_thresholds(samples, np.array([1.0, 12 / 8, 12 / 5, 12 / 2, 12.0]))
    np.testing.assert_allclose(g[:, 0], [0, 1, 2, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(scales[:, 0], 27 / 12 / np.array([27 / 12, 23 / 8, 17 / 5, 17 / 5, 5]), rtol=1e-6)


def test_rounding_does_not_part_equal_steps():
    random = np.random.default_rng(0)
    values = np.repeat([5.0, 3.0, 2.0, 1.0], [10, 40, 30, 40])  # they sum to 270

    def rounded_differently():
        return jnp.asarray(values[:, None] * (1 + 2e-6 * random.uniform(-1, 1, (120, 50))), jnp.float32)

    ratios = 270 / np.array([225.0, 165.0, 51.0, 49.0])
    g = np.asarray(thresholds(rounded_differently(), ratios))
    kept = np.sum(np.asarray(rounded_differently())[:, None] > g, axis=0)
    np.testing.assert_array_equal(kept, np.broadcast_to(np.array([[80], [50], [50], [10]]), kept.shape))


def test_decay_and_thresholds_are_those_of_the_collected_steps(model, sequences, calibration):
    for layer, selection in collect(model, sequences).items():
        decay = mean_log_decay(selection.delta, selection.A)
        np.testing.assert_allclose(calibration.places[0].log_decay[layer], decay, rtol=1e-4)
        samples = jnp.asarray(selection.delta).reshape(-1, selection.delta.shape[-1])
        # Mamba-3's decay rates are each token's own.
        added = -(selection.delta * selection.A[..., 0]).reshape(samples.shape) if selection.A.ndim == 4 else None
        sample = samples, length_ratios(), added
        np.testing.assert_allclose(calibration.places[0].thresholds[layer], thresholds(*sample), rtol=1e-5)
        for name, table in zip(("count_thresholds", "count_scales"), count_thresholds(*sample), strict=True):
            np.testing.assert_allclose(getattr(calibration.places[0], name)[layer], table, rtol=1e-5)


def test_the_decay_rates_of_a_channel_are_counted(model, calibration):
    assert calibration.places[0].decay_rates == {"M": 3, "2": 1, "3": 1}[model.config.pattern]


def test_beyond_the_longest_ratio_thresholds_are_no_longer_told_apart(calibration):
    layers = calibration.places[0]
    longest = layers.longest_ratio[:, None]
    ratios = length_ratios()[None, :, None]
    last = layers.thresholds[:, -1:]
    beyond = np.broadcast_to(ratios > longest, layers.thresholds.shape)
    assert beyond.any()
    assert np.all((layers.thresholds == last)[beyond])
    before = np.broadcast_to(ratios < longest, layers.thresholds.shape)
    assert np.all((layers.thresholds < last)[before])


def test_no_token_is_left_out_at_the_training_length_and_more_with_every_length(calibration):
    table = calibration.places[0].thresholds
    assert length_ratios()[0] == 1
    assert np.all(table[:, 0] == 0)
    assert np.all(calibration.places[0].count_thresholds[:, 0] == 0)
    assert np.all(calibration.places[0].count_scales[:, 0] == 1)
    assert np.all(np.diff(table, axis=1) >= 0)
    assert np.all(table[:, -1] > table[:, 1])


def test_clamped_steps_are_at_most_those_of_the_share(model, sequences):
    clamped = calibrate(model, sequences, clamp=0.2)
    for layer, selection in collect(model, sequences).items():
        limit = np.quantile(np.asarray(selection.delta, np.float64).reshape(-1, selection.delta.shape[-1]), 0.8, axis=0)
        assert np.all(clamped.places[0].thresholds[layer] <= limit * (1 + 1e-5))
        decay = mean_log_decay(np.minimum(selection.delta, limit), selection.A)
        np.testing.assert_allclose(clamped.places[0].log_decay[layer], decay, rtol=1e-4)


def test_the_clamp_is_what_was_published_unless_given(model, sequences, calibration):
    published = {"M": 0.0, "2": 0.05, "3": 0.0}[model.config.pattern]
    default, given = calibrate(model, sequences), calibrate(model, sequences, clamp=published)
    np.testing.assert_array_equal(default.places[0].thresholds, given.places[0].thresholds)
    changed = not np.array_equal(default.places[0].thresholds, calibration.places[0].thresholds)
    assert changed == (published > 0)


def test_the_same_model_and_tokens_give_the_same_calibration(model, sequences, calibration):
    assert_equal(calibrate(model, sequences, clamp=0.0, source="a text"), calibration)


def test_a_sharded_model_is_calibrated_like_a_whole_one(model, sequences):
    batch = sequences[:4]
    expected = calibrate(model, batch)
    with jax.set_mesh(mesh(data=2, tensor=2)):
        actual = calibrate(on_mesh(model), jax.device_put(batch, P(sharding.BATCH, None)))
    assert actual.checkpoint == expected.checkpoint
    for field in dataclasses.fields(actual.places[0]):
        values = (getattr(calibration.places[0], field.name) for calibration in (actual, expected))
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)


def test_extenders_are_not_calibrated(model, sequences, calibration):
    assert_equal(
        calibrate(apply_scaling(model, ScalingConfig(delta=0.1)), sequences, clamp=0.0, source="a text"), calibration
    )


def test_text_that_was_calibrated_on_is_not_evaluated_on(calibration):
    calibration.require_unseen("another text", [])
    with pytest.raises(ValueError, match=r"measured on the very text to evaluate on \(a text\)"):
        calibration.require_unseen("a text", [])
    with pytest.raises(ValueError, match="does not say what text it was measured on"):
        dataclasses.replace(calibration, source=None).require_unseen("a text", [])


def test_text_with_a_part_of_what_was_calibrated_on_is_not_evaluated_on(model, sequences, calibration):
    other = np.asarray(tokens(1, 1, 200)[0])
    half = np.asarray(sequences[3, 5 : 5 + TRAINING_LENGTH // 2])
    calibration.require_unseen("another text", [other])
    with pytest.raises(ValueError, match=f"holds a part .* measured on .{TRAINING_LENGTH // 2} tokens"):
        calibration.require_unseen("another text", [other[:77], half[:3], half[3:], other[77:]])


def test_separators_do_not_hide_what_was_calibrated_on():
    model, documents = language_model(), np.asarray(tokens(0, 2, TRAINING_LENGTH)) % 30
    separated = np.insert(documents, [5, 14], 30, axis=1)
    calibration = calibrate(model, separated, source="a text", separator=30)
    with pytest.raises(ValueError, match="holds a part of what the calibration was"):
        calibration.require_unseen("another text", [documents[1, 3:16]])


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


def test_the_seed_decides_the_sequences():
    stream = np.arange(1000)
    first, same, other = (sample_sequences(stream, length=50, count=4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    assert first.shape == (4, 50)
    assert np.all(np.diff(first, axis=1) == 1)
    np.testing.assert_array_equal(sample_sequences(stream[:50], length=50, count=2), np.tile(stream[:50], (2, 1)))


def test_too_little_to_calibrate_on_is_refused():
    model = language_model()
    with pytest.raises(ValueError, match="are empty"):
        calibrate(model, np.zeros((0, 10), np.int32))
    with pytest.raises(ValueError, match="49 tokens are too few for sequences of length 50"):
        sample_sequences(np.arange(49), length=50)
    with pytest.raises(ValueError, match="count = 0"):
        sample_sequences(np.arange(49), length=5, count=0)
    with pytest.raises(ValueError, match="clamp = 1"):
        calibrate(model, tokens(0, 1, 4), clamp=1.0)
