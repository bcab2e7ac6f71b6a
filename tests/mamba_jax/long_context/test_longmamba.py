import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.generation import Sampling, generate
from mamba_jax.long_context.attach import with_extenders, without_extenders
from mamba_jax.long_context.calibration import calibrate, length_ratios
from mamba_jax.long_context.diagnostics import collect
from mamba_jax.long_context.longmamba import LongMambaConfig, apply_longmamba, chosen_channels, interpolated
from mamba_jax.long_context.scaling import ScalingConfig, apply_scaling
from mamba_jax.long_context.token_filter import TokenFilter
from mamba_jax.mixers.mamba2 import Mamba2Config
from tests.mamba_jax.long_context.models import TRAINING_LENGTH, language_model, tokens
from tests.mamba_jax.reading import read

# Small models do not decay to 1e-30 in two dozen tokens; this splits their channels in two.
THRESHOLD = 1e-2
LENGTH = 4 * TRAINING_LENGTH
STREAMING = LongMambaConfig(THRESHOLD)
WHOLE = LongMambaConfig(THRESHOLD, length=LENGTH)
RESCALED = LongMambaConfig(THRESHOLD, rescale=True)
CONFIGS = pytest.mark.parametrize("config", [STREAMING, WHOLE, RESCALED], ids=["streaming", "whole", "rescaled"])


@pytest.fixture(scope="module", params=["M", "2", "3"], ids=["mamba1", "mamba2", "mamba3"])
def model(request):
    return language_model(pattern=request.param)


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, tokens(0, 8, TRAINING_LENGTH), clamp=0.0)


@pytest.fixture(scope="module")
def mamba1():
    return language_model()


@pytest.fixture(scope="module")
def mamba1_calibration(mamba1):
    return calibrate(mamba1, tokens(0, 8, TRAINING_LENGTH))


def frozen(model, sequence) -> np.ndarray:
    """Marks (layer, batch, token, channel) left out."""
    return np.stack([selection.delta == 0 for selection in collect(model, sequence).values()])


def frozen_share_by_layer(model, sequence) -> np.ndarray:
    return np.array([np.mean(selection.delta == 0) for selection in collect(model, sequence).values()])


@pytest.mark.parametrize(
    ("config", "cuts"),
    [
        (STREAMING, (1,)),
        (STREAMING, (30, 50)),
        (STREAMING, tuple(range(8, LENGTH, 8))),
        (WHOLE, (30, 50)),
        (RESCALED, (30, 50)),
    ],
    ids=["streaming 1", "streaming 3", "streaming 12", "whole 3", "rescaled 3"],
)
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


def test_layers_of_several_kinds_are_extended_together():
    model, sequence = language_model(pattern="M23", repeats=1), tokens(1, 1, LENGTH)
    extended = apply_longmamba(model, calibrate(model, tokens(0, 4, TRAINING_LENGTH)), LongMambaConfig(THRESHOLD))
    assert frozen_share_by_layer(extended, sequence).min() > 0
    whole, _ = read(extended, sequence)
    first, state = read(extended, sequence[:, :40])
    second, _ = read(extended, sequence[:, 40:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=2e-5)


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


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("length", [None, TRAINING_LENGTH])
def test_up_to_the_training_length_logits_are_bit_identical(model, calibration, length, rescale):
    extended = apply_longmamba(model, calibration, LongMambaConfig(THRESHOLD, length=length, rescale=rescale))
    sequence = tokens(5, 3, TRAINING_LENGTH)
    np.testing.assert_array_equal(read(extended, sequence)[0], read(model, sequence)[0])


@CONFIGS
def test_beyond_the_training_length_logits_change(model, calibration, config):
    extended, sequence = apply_longmamba(model, calibration, config), tokens(6, 2, LENGTH)
    assert not np.allclose(read(extended, sequence)[0][:, -1], read(model, sequence)[0][:, -1], atol=1e-3)


@pytest.mark.parametrize("channels", ["global", "local", "random"])
def test_only_chosen_channels_leave_out_tokens(model, calibration, channels):
    config = LongMambaConfig(THRESHOLD, channels=channels, seed=1)
    sequence = tokens(7, 2, 8 * TRAINING_LENGTH)
    left_out = frozen(apply_longmamba(model, calibration, config), sequence)
    are_global = calibration.places[0].log_decay > np.log(THRESHOLD)
    assert 0 < are_global.sum() < are_global.size
    chosen = left_out.any(axis=(1, 2))
    if channels == "random":
        np.testing.assert_array_equal(chosen.sum(axis=1), are_global.sum(axis=1))
        assert not np.array_equal(chosen, are_global)
    else:
        np.testing.assert_array_equal(chosen, are_global if channels == "global" else ~are_global)
    assert not frozen(model, sequence).any()


@pytest.mark.parametrize(("pattern", "threshold"), [("M", 1e-30), ("2", 5e-2), ("3", 5e-2)])
def test_thresholds_are_those_published_for_the_kind_of_layer(pattern, threshold):
    model = language_model(pattern=pattern)
    calibration = calibrate(model, tokens(0, 2, TRAINING_LENGTH))
    decays = np.log(threshold) + np.linspace(-1, 1, calibration.places[0].log_decay.size)
    log_decay = decays.reshape(calibration.places[0].log_decay.shape).astype(np.float32)
    calibration.places[0] = dataclasses.replace(calibration.places[0], log_decay=log_decay)
    np.testing.assert_array_equal(chosen_channels(calibration)[0], log_decay > np.log(threshold))


def thresholds_after_softplus(model) -> np.ndarray:
    """The filter's thresholds g as step sizes, (repeats, spans, channels)."""
    return np.asarray(jax.nn.softplus(model.blocks[0].mixer.extender.thresholds))


def test_one_threshold_is_that_of_the_length(mamba1, mamba1_calibration):
    table, entry = mamba1_calibration.places[0].thresholds, 13
    config = LongMambaConfig(1e-30, length=round(TRAINING_LENGTH * 2 ** (entry / 8)))
    weight = 8 * np.log2(config.length / TRAINING_LENGTH) - entry
    assert abs(weight) < 0.3
    low, high = sorted((entry, entry + int(np.sign(weight))))
    expected = table[:, entry] + abs(weight) * (table[:, low + high - entry] - table[:, entry])
    actual = thresholds_after_softplus(apply_longmamba(mamba1, mamba1_calibration, config))[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_rescaled_as_many_tokens_are_left_as_in_training_with_its_mean(mamba1, mamba1_calibration):
    config = LongMambaConfig(1e-30, length=2 * TRAINING_LENGTH, rescale=True)
    extended = apply_longmamba(mamba1, mamba1_calibration, config)
    delta = np.asarray(collect(mamba1, tokens(0, 8, TRAINING_LENGTH))[0].delta, np.float64).reshape(-1, 24)
    kept = delta > thresholds_after_softplus(extended)[0, 0] * (1 + 1e-5)
    np.testing.assert_allclose(kept.mean(axis=0), 0.5, atol=0.03)  # equal steps are kept together
    scaled = np.asarray(extended.blocks[0].mixer.extender.scales)[0, 0] * np.where(kept, delta, 0)
    np.testing.assert_allclose(scaled.sum(axis=0) / kept.sum(axis=0), delta.mean(axis=0), rtol=1e-3)


@pytest.mark.parametrize(("length", "rounded"), [(99, 96), (119, 120), (25, TRAINING_LENGTH)])
def test_the_table_rounds_the_length_to_its_step(mamba1, mamba1_calibration, length, rounded):
    by_table, exact = (
        thresholds_after_softplus(apply_longmamba(mamba1, mamba1_calibration, config))
        for config in (LongMambaConfig(1e-30, length=length, table_step=24), LongMambaConfig(1e-30, length=rounded))
    )
    np.testing.assert_array_equal(by_table, exact)


def test_between_measured_lengths_tables_are_linear_in_the_logarithm():
    ratios = length_ratios()
    table = np.broadcast_to((3 + 2 * np.log2(ratios))[None, :, None], (1, len(ratios), 2))
    wanted = np.array([1.0, 1.03, 700.0, ratios[-1], 1e9])
    expected = 3 + 2 * np.log2(np.minimum(wanted, ratios[-1]))
    np.testing.assert_allclose(interpolated(table, wanted)[0], np.stack([expected] * 2, axis=1), rtol=1e-9)


def test_only_the_layers_that_forget_least_leave_out_tokens():
    model = language_model(pattern="MM", repeats=2, seed=4)
    calibration = calibrate(model, tokens(0, 4, TRAINING_LENGTH))
    decay = np.stack([np.exp(calibration.places[layer % 2].log_decay[layer // 2]).mean() for layer in range(4)])
    for layers in (1, 3):
        extended = apply_longmamba(model, calibration, LongMambaConfig(1e-6, layers=layers))
        changed = frozen(extended, tokens(8, 1, LENGTH)).any(axis=(1, 2, 3))
        assert set(np.flatnonzero(changed)) == set(np.argsort(decay)[-layers:])


def test_a_calibration_of_another_model_is_refused(mamba1_calibration):
    with pytest.raises(ValueError, match="the calibration is of checkpoint"):
        apply_longmamba(language_model(seed=9), mamba1_calibration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": TRAINING_LENGTH - 1}, "LongMamba.length = 23 cannot be used: at least the training length"),
        ({"layers": 3}, "LongMamba.layers = 3 cannot be used: the model has 2"),
        ({"layers": 0}, "LongMamba.layers = 0 cannot be used"),
        ({"decay_threshold": 1.0}, "LongMamba.decay_threshold = 1.0 cannot be used"),
        ({"channels": "some"}, "LongMamba.channels = 'some' cannot be used: one of global, local, random"),
        ({"table_step": 1000}, "LongMamba.table_step = 1000 cannot be used: at least 1, and only with"),
        ({"table_step": 0, "length": 99}, "LongMamba.table_step = 0 cannot be used"),
    ],
)
def test_settings_that_cannot_be_used_are_named(mamba1, mamba1_calibration, settings, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        apply_longmamba(mamba1, mamba1_calibration, LongMambaConfig(**settings))


def test_layers_that_step_at_every_token_are_refused():
    model = language_model(pattern="2", **{"2": Mamba2Config(state_size=3, head_dim=2, delta_limit_min=1e-3)})
    with pytest.raises(
        ValueError, match=r"layer 0 of the pattern '2' steps its state by at least 0\.001 at each token"
    ):
        apply_longmamba(model, calibrate(model, tokens(0, 2, TRAINING_LENGTH)))
    with pytest.raises(ValueError, match=r"steps its state by at least 0\.001"):
        apply_scaling(model, ScalingConfig(delta=0.5))


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
        with_extenders(model, {0: TokenFilter(np.ones((2, 1, 24)))})
