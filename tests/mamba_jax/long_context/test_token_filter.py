"""The filter by itself, on exponentially distributed step sizes, for which its thresholds are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import lambertw

from mamba_jax.long_context.longmamba import _last_positions
from mamba_jax.long_context.token_filter import TokenFilter
from mamba_jax.mixers.selective import FROZEN

TRAINING_LENGTH, CHANNELS = 512, 24
RATIOS = 2.0 ** (np.arange(12 * 16 + 1) / 16)


def filtered(filter_, delta, position=None):
    """Step sizes after the softplus, (length, channels)."""
    position = jnp.arange(1, len(delta) + 1) if position is None else position
    raw = jnp.log(jnp.expm1(jnp.asarray(delta)))
    bias = jnp.linspace(-1, 1, delta.shape[1])
    return jax.nn.softplus(filter_((raw - bias)[None], bias, position[None])[0] + bias)


def exponential_steps(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=(length, CHANNELS)).astype(np.float32)


def exact_thresholds(ratios: np.ndarray) -> np.ndarray:
    """For exponentially distributed steps of mean 1, the share (1 + g) exp(-g) of their sum is above g."""
    g = -lambertw(-1 / (ratios * np.e), k=-1).real - 1
    return np.broadcast_to(g[:, None], (len(g), CHANNELS)).clip(min=0)


def test_a_known_length_keeps_the_sum_of_a_training_sequence():
    filter_ = TokenFilter(exact_thresholds(np.array([16.0])))
    delta = exponential_steps(0, 16 * TRAINING_LENGTH)
    kept = np.asarray(filtered(filter_, delta))
    assert kept.sum(axis=0).mean() == pytest.approx(TRAINING_LENGTH, rel=0.03)
    np.testing.assert_allclose(kept[kept > 0], delta[kept > 0], rtol=1e-4)


def test_streaming_keeps_sums_that_grow_with_the_logarithm_of_the_length():
    filter_ = TokenFilter(exact_thresholds(RATIOS), last_positions=_last_positions(RATIOS, TRAINING_LENGTH))
    elapsed = np.cumsum(filtered(filter_, exponential_steps(1, 16 * TRAINING_LENGTH)), axis=0).mean(axis=1)
    for octave in (1, 2, 3, 4):
        expected = TRAINING_LENGTH * (1 + octave * np.log(2))
        assert elapsed[2**octave * TRAINING_LENGTH - 1] == pytest.approx(expected, rel=0.04)


def test_scales_give_as_many_tokens_as_in_training_their_mean():
    """Above g = ln(S/L) are L of S exponentially distributed steps, of mean 1 + g."""
    ratio = 16.0
    g = np.full((1, CHANNELS), np.log(ratio))
    filter_ = TokenFilter(g, scales=1 / (1 + g))
    delta = exponential_steps(2, int(ratio) * TRAINING_LENGTH)
    kept = np.asarray(filtered(filter_, delta))
    assert np.mean(np.sum(kept > 0, axis=0)) == pytest.approx(TRAINING_LENGTH, rel=0.03)
    assert kept[kept > 0].mean() == pytest.approx(1, rel=0.02)
    np.testing.assert_allclose(kept[kept > 0], delta[kept > 0] / (1 + np.log(ratio)), rtol=1e-4)


def test_each_threshold_holds_from_its_length_to_the_next():
    training_length = 100
    table = np.linspace(0, 3, len(RATIOS))[:, None]
    filter_ = TokenFilter(table, last_positions=_last_positions(RATIOS, training_length))
    for position in (1, 100, 101, 104, 105, 199, 200, 201, 409600, 2**31 - 1):
        entry = np.flatnonzero(np.ceil(training_length * RATIOS) <= max(position, 100))[-1]
        g = table[entry, 0]
        steps = np.array([[g * 0.999], [g * 1.001]] if g else [[1e-6], [1e-6]], np.float32)
        kept = np.asarray(filtered(filter_, steps, jnp.full((2,), position)))
        np.testing.assert_array_equal(kept[:, 0] > 0, [g == 0, True])


@pytest.mark.parametrize("before", [0, 75, 10_000])
@pytest.mark.parametrize("last_positions", [(64, 100, 133, 180, 212), (20, 30, 35, 60, 100)], ids=["wide", "narrow"])
def test_documents_that_begin_anywhere_have_the_thresholds_of_their_positions(before, last_positions):
    length = 384
    begins = np.isin(np.arange(length), (1, 7, 40, 41, 200))
    position = np.zeros(length, int)
    for index in range(length):
        position[index] = 1 if begins[index] else (position[index - 1] if index else before) + 1
    random = np.random.default_rng(3)
    table = random.exponential(size=(len(last_positions) + 1, CHANNELS))
    delta = exponential_steps(4, length)
    span = (position[:, None] > np.array(last_positions)).sum(axis=1)
    filter_ = TokenFilter(table, last_positions=last_positions, scales=1 + np.arange(6.0)[:, None] * np.ones(CHANNELS))
    kept = np.asarray(filtered(filter_, delta, jnp.asarray(position)))
    expected = np.where(delta > table[span], delta * (1 + span[:, None]), 0)
    np.testing.assert_allclose(kept, expected, rtol=2e-4)
    assert 0.1 < np.mean(kept > 0) < 0.9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_and_not_scaled_keeps_every_bit(dtype):
    delta = jax.random.normal(jax.random.key(0), (1, 200, 3), dtype)
    filter_ = TokenFilter(np.full((1, 3), 0.5), scales=np.array([[1.0, 1.0, 0.5]]))
    out = filter_(delta, jnp.array([0.1, -0.2, 0.3]), jnp.ones((1, 200), jnp.int32))
    assert out.dtype == dtype
    kept = np.asarray(out[..., :2] > -1e3)
    assert 0 < kept.mean() < 1
    np.testing.assert_array_equal(np.asarray(out[..., :2])[kept], np.asarray(delta[..., :2])[kept])


def test_a_step_that_equals_the_threshold_is_left_out():
    filter_ = TokenFilter(np.array([[0.3]]))
    at = filter_.thresholds[0, 0]
    raw = jnp.stack([at, jnp.nextafter(at, jnp.inf)])[None, :, None]
    out = filter_(raw, jnp.zeros(1), jnp.ones((1, 2), jnp.int32))
    np.testing.assert_array_equal(out[0, :, 0] == FROZEN, [True, False])
