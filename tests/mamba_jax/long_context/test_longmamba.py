import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.generation import Sampling, generate
from mamba_jax.long_context.attach import with_extenders, without_extenders
from mamba_jax.long_context.calibration import calibrate, length_ratios
from mamba_jax.long_context.diagnostics import collect
from mamba_jax.long_context.longmamba import LongMambaConfig, TokenFilter, apply_longmamba
from tests.mamba_jax.long_context.models import TRAINING_LENGTH, language_model, tokens

# Small models do not decay to 1e-30 in two dozen tokens; this splits their channels in two.
THRESHOLD = 1e-2
LENGTH = 4 * TRAINING_LENGTH
CONFIGS = pytest.mark.parametrize(
    "config",
    [LongMambaConfig(THRESHOLD), LongMambaConfig(THRESHOLD, length=LENGTH)],
    ids=["streaming", "whole"],
)


@jax.jit
def read(model, tokens, state=None, segment_ids=None):
    return model(tokens, state=state, segment_ids=segment_ids)


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, tokens(0, 8, TRAINING_LENGTH))


def frozen(model, sequence) -> np.ndarray:
    """Marks (layer, batch, token, channel) left out."""
    return np.stack([selection.delta == 0 for selection in collect(model, sequence).values()])


@CONFIGS
@pytest.mark.parametrize("cuts", [(1,), (TRAINING_LENGTH, 50), tuple(range(8, LENGTH, 8))])
def test_every_chunking_gives_the_same_logits(model, calibration, config, cuts):
    extended, sequence = apply_longmamba(model, calibration, config), tokens(1, 2, LENGTH)
    whole, final = read(extended, sequence)
    state, parts = None, []
    for chunk in jnp.split(sequence, cuts, axis=1):
        logits, state = read(extended, chunk, state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    for actual, expected in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@CONFIGS
def test_decoding_gives_the_logits_of_a_whole_prefill(model, calibration, config):
    extended, sequence = apply_longmamba(model, calibration, config), tokens(2, 2, LENGTH)
    whole, _ = read(extended, sequence)
    decode = jax.jit(
        lambda model, state, tokens: jax.lax.scan(lambda state, token: model.step(token, state)[::-1], state, tokens.T)
    )
    for prefilled in (0, 30):
        state = extended.init_state(2) if prefilled == 0 else read(extended, sequence[:, :prefilled])[1]
        _, decoded = decode(extended, state, sequence[:, prefilled:])
        np.testing.assert_allclose(jnp.swapaxes(decoded, 0, 1), whole[:, prefilled:], atol=2e-5)


def test_positions_restart_with_every_packed_document(model, calibration):
    extended, sequence = apply_longmamba(model, calibration, LongMambaConfig(THRESHOLD)), tokens(3, 2, LENGTH)
    first = 2 * TRAINING_LENGTH + 1
    segment_ids = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < first, 1, 2), sequence.shape)
    packed, state = read(extended, sequence, None, segment_ids)
    alone = [read(extended, part) for part in (sequence[:, :first], sequence[:, first:])]
    np.testing.assert_allclose(packed, jnp.concatenate([logits for logits, _ in alone], axis=1), atol=2e-5)
    np.testing.assert_array_equal(state[0].position, np.full((2, 2), LENGTH - first))


def test_prompts_of_different_lengths_are_continued_as_if_alone(model, calibration):
    extended = apply_longmamba(model, calibration, LongMambaConfig(THRESHOLD))
    prompts = [np.asarray(tokens(4, 1, length)[0]).tolist() for length in (5, 70)]
    together = generate(extended, prompts, max_new_tokens=6, sampling=Sampling(temperature=0.0))
    for prompt, continuation in zip(prompts, together, strict=True):
        sequence = jnp.asarray([prompt + continuation])
        logits, _ = read(extended, sequence)
        assert np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist() == continuation


@pytest.mark.parametrize("length", [None, TRAINING_LENGTH])
def test_up_to_the_training_length_logits_are_bit_identical(model, calibration, length):
    extended = apply_longmamba(model, calibration, LongMambaConfig(THRESHOLD, length=length))
    sequence = tokens(5, 3, TRAINING_LENGTH)
    np.testing.assert_array_equal(read(extended, sequence)[0], read(model, sequence)[0])


@CONFIGS
def test_beyond_the_training_length_logits_change(model, calibration, config):
    extended, sequence = apply_longmamba(model, calibration, config), tokens(6, 2, LENGTH)
    assert not np.allclose(read(extended, sequence)[0][:, -1], read(model, sequence)[0][:, -1], atol=1e-3)


@pytest.mark.parametrize("channels", ["global", "local", "random"])
def test_only_chosen_channels_leave_out_tokens(model, calibration, channels):
    config = LongMambaConfig(THRESHOLD, channels=channels)
    left_out = frozen(apply_longmamba(model, calibration, config), tokens(7, 2, 8 * TRAINING_LENGTH))
    are_global = calibration.places[0].log_decay > np.log(THRESHOLD)
    assert 0 < are_global.sum() < are_global.size
    chosen = left_out.any(axis=(1, 2))
    if channels == "random":
        np.testing.assert_array_equal(chosen.sum(axis=1), are_global.sum(axis=1))
        assert not np.array_equal(chosen, are_global)
    else:
        np.testing.assert_array_equal(chosen, are_global if channels == "global" else ~are_global)
    assert not frozen(model, tokens(7, 2, 8 * TRAINING_LENGTH)).any()


def test_only_the_layers_that_forget_least_leave_out_tokens():
    model = language_model(pattern="MM", repeats=2, seed=4)
    calibration = calibrate(model, tokens(0, 4, TRAINING_LENGTH))
    decay = np.stack([np.exp(calibration.places[layer % 2].log_decay[layer // 2]).mean() for layer in range(4)])
    for layers in (1, 3):
        extended = apply_longmamba(model, calibration, LongMambaConfig(1e-6, layers=layers))
        changed = frozen(extended, tokens(8, 1, LENGTH)).any(axis=(1, 2, 3))
        assert set(np.flatnonzero(changed)) == set(np.argsort(decay)[-layers:])


def filtered(filter_, delta, position=None):
    """Step sizes after the softplus of one layer and one sequence, (length, channels)."""
    layer = jax.tree.map(lambda leaf: leaf[0], filter_)
    position = jnp.arange(1, len(delta) + 1) if position is None else position
    raw = jnp.log(jnp.expm1(jnp.asarray(delta)))
    bias = jnp.linspace(-1, 1, delta.shape[1])
    return jax.nn.softplus(layer((raw - bias)[None], bias, position[None])[0] + bias)


def exponential_thresholds(channels: int) -> np.ndarray:
    """Closed form for exponentially distributed steps of mean 1: the share (1 + g) exp(-g) of their sum is above g."""
    from scipy.special import lambertw

    g = -lambertw(-1 / (length_ratios() * np.e), k=-1).real - 1
    return np.broadcast_to(g[:, None], (1, len(g), channels)).clip(min=0)


def test_a_known_length_keeps_the_sum_of_a_training_sequence():
    length, training_length, channels = 16 * 512, 512, 24
    filter_ = TokenFilter(exponential_thresholds(channels), training_length=training_length, length=length)
    delta = np.random.default_rng(0).exponential(size=(length, channels)).astype(np.float32)
    kept = np.asarray(filtered(filter_, delta))
    assert kept.sum(axis=0).mean() == pytest.approx(training_length, rel=0.03)
    np.testing.assert_allclose(kept[kept > 0], delta[kept > 0], rtol=1e-4)


def test_streaming_keeps_sums_that_grow_with_the_logarithm_of_the_length():
    length, training_length, channels = 16 * 512, 512, 24
    filter_ = TokenFilter(exponential_thresholds(channels), training_length=training_length)
    delta = np.random.default_rng(1).exponential(size=(length, channels)).astype(np.float32)
    elapsed = np.cumsum(filtered(filter_, delta), axis=0).mean(axis=1)
    for octave in (1, 2, 3, 4):
        expected = training_length * (1 + octave * np.log(2))
        assert elapsed[2**octave * training_length - 1] == pytest.approx(expected, rel=0.04)


def test_the_table_is_read_at_the_last_entry_not_beyond_the_position():
    ratios, training_length = length_ratios(), 100
    table = np.linspace(0, 3, len(ratios))[None, :, None]
    filter_ = TokenFilter(table, training_length=training_length)
    for position in (1, 100, 101, 104, 105, 199, 200, 201, 409600, 2**31 - 1):
        entry = np.flatnonzero(np.ceil(training_length * ratios) <= max(position, 100))[-1]
        g = table[0, entry, 0]
        steps = np.array([[g * 0.999], [g * 1.001]] if g else [[1e-6], [1e-6]], np.float32)
        kept = np.asarray(filtered(filter_, steps, jnp.full((2,), position)))
        np.testing.assert_array_equal(kept[:, 0] > 0, [g == 0, True])


def test_a_calibration_of_another_model_is_refused(calibration):
    with pytest.raises(ValueError, match="the calibration is of checkpoint"):
        apply_longmamba(language_model(seed=9), calibration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": TRAINING_LENGTH - 1}, "LongMamba.length = 23 cannot be used: at least the training length"),
        ({"layers": 3}, "LongMamba.layers = 3 cannot be used: the model has 2"),
        ({"layers": 0}, "LongMamba.layers = 0 cannot be used"),
        ({"decay_threshold": 1.0}, "LongMamba.decay_threshold = 1.0 cannot be used"),
        ({"channels": "some"}, "LongMamba.channels = 'some' cannot be used: one of global, local, random"),
    ],
)
def test_settings_that_cannot_be_used_are_named(model, calibration, settings, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        apply_longmamba(model, calibration, LongMambaConfig(**settings))


def test_an_extended_model_can_be_had_back(model, calibration):
    extended = apply_longmamba(model, calibration)
    back = without_extenders(extended)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert jax.tree.structure(extended) != jax.tree.structure(model)
    assert extended.embedding.weight[...] is model.embedding.weight[...]


def test_a_mixer_without_delta_is_refused():
    class Averages(nnx.Module):
        pass

    model = language_model()
    model.blocks[0].mixer = Averages()
    with pytest.raises(ValueError, match="layer 0 of the pattern 'M' has no delta"):
        with_extenders(model, {0: Averages()})
