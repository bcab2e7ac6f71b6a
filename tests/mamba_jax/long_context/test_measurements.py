import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.long_context import diagnostics, figures, measurements
from mamba_jax.long_context.calibration import calibrate
from mamba_jax.long_context.longmamba import LongMambaConfig, apply_longmamba
from tests.mamba_jax.long_context.models import TRAINING_LENGTH, language_model, tokens

LENGTH = 4 * TRAINING_LENGTH
# Layers 0 and 2 are Mamba-1, 1 and 3 Mamba-2.
LAYERS = (2, 3)
CONFIG = LongMambaConfig(decay_threshold=1e-2)


@pytest.fixture(scope="module")
def model():
    return language_model(pattern="M2", repeats=2)


@pytest.fixture(scope="module")
def sequence():
    return tokens(1, 1, LENGTH)


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, tokens(0, 4, TRAINING_LENGTH), clamp=0.0)


@pytest.fixture(scope="module")
def layers(model, calibration):
    return measurements.layers_of(model, calibration, CONFIG)


def steps(model, sequence, layer):
    """Delta, A, B and C of a layer in float64, A by channel and state."""
    selection = diagnostics.collect(model, sequence)[layer]
    delta, B, C = (np.asarray(array[0], np.float64) for array in (selection.delta, selection.B, selection.C))
    A = np.asarray(selection.A, np.float64).reshape(delta.shape[1], -1)
    return delta, np.broadcast_to(A, (delta.shape[1], B.shape[-1])), B, C


def attention(model, sequence, layer, channel):
    """Eq. 11 for a channel, (length, length)."""
    delta, A, B, C = steps(model, sequence, layer)
    if B.ndim == 3:
        B, C = (matrix[:, channel * matrix.shape[1] // len(A)] for matrix in (B, C))
    elapsed = np.cumsum(delta[:, channel])
    decay = np.exp(A[channel] * np.maximum(elapsed[:, None] - elapsed[None, :], 0)[..., None])
    return np.tril(np.einsum("in,ijn,jn->ij", C, decay, delta[:, channel, None] * B))


def test_layers_are_numbered_from_the_bottom(calibration, layers):
    assert list(layers.is_global) == [0, 1, 2, 3]
    for layer, is_global in layers.is_global.items():
        decay = calibration.places[layer % 2].log_decay[layer // 2]
        np.testing.assert_array_equal(is_global, decay > np.log(1e-2))
        np.testing.assert_allclose(layers.log10_decay[layer], decay / np.log(10), rtol=1e-6)
        assert layers.log10_threshold[layer] == -2


def test_picked_channels_are_local_then_global(layers):
    picked = layers.pick(2, local=3, globals_=2)
    np.testing.assert_array_equal(layers.is_global[2][picked], [False, False, False, True, True])
    assert len(set(picked.tolist())) == 5
    assert len(layers.pick(2, local=1000, globals_=0)) == np.sum(~layers.is_global[2])


@pytest.mark.parametrize("pixels", [LENGTH, 20])
def test_pixels_are_the_largest_weights_of_their_blocks(model, sequence, layers, pixels):
    channels = {layer: np.array([1, 5]) for layer in LAYERS}
    maps = measurements.attention_maps(model, sequence, layers, channels, pixels=pixels)
    block = -(-LENGTH // pixels)
    rows = np.minimum(np.arange(block - 1, LENGTH + block - 1, block), LENGTH - 1)
    for panel, (layer, channel) in enumerate((layer, channel) for layer in LAYERS for channel in (1, 5)):
        assert (maps.layer[panel], maps.channel[panel]) == (layer, channel)
        weights = np.abs(attention(model, sequence, layer, channel))
        field = weights[-1] @ np.arange(LENGTH - 1, -1, -1) / weights[-1].sum()
        assert maps.receptive_field[panel] == pytest.approx(field, rel=1e-3)
        padded = np.pad(weights[rows], ((0, 0), (0, len(rows) * block - LENGTH)))
        largest = padded.reshape(len(rows), len(rows), block).max(axis=-1)
        np.testing.assert_allclose(10 ** maps.log10_attention[panel], largest / largest.max(), atol=1e-4)


def test_receptive_fields_are_those_of_shorter_sequences(model, sequence, layers):
    fields = measurements.receptive_fields(model, sequence, layers, 3, np.array([0, 4]))
    assert (fields.length[0], fields.length[-1]) == (64, LENGTH)
    for i in (0, -1):
        for channel, field in zip((0, 4), fields.receptive_field[:, i], strict=True):
            weight = np.abs(attention(model, sequence[:, : fields.length[i]], 3, channel)[-1])
            expected = weight @ np.arange(len(weight) - 1, -1, -1) / weight.sum()
            assert field == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_decay_curves_are_products_of_decay_factors(model, calibration, sequence, layers, layer):
    channels = np.array([0, 3, 7])
    curves = measurements.decay_curves(model, calibration, CONFIG, sequence, layers, layer, channels)
    np.testing.assert_array_equal(curves.position, np.arange(1, LENGTH + 1))
    extended = apply_longmamba(model, calibration, LongMambaConfig(1e-2, length=LENGTH))
    for read, decay in ((model, curves.log10_original), (extended, curves.log10_extended)):
        delta, A, _, _ = steps(read, sequence, layer)
        expected = np.log10(np.cumprod(np.exp(delta[..., None] * A).mean(axis=-1), axis=0))[:, channels]
        np.testing.assert_allclose(decay, expected.T, rtol=1e-4, atol=1e-5)


def test_longmamba_changes_no_decay_at_the_training_length_and_slows_it_beyond(model, calibration, sequence, layers):
    channels = np.argsort(calibration.places[0].log_decay[1])[::-1][:4]
    decay = measurements.extended_decay(
        model, calibration, CONFIG, sequence, layers, 2, channels, [TRAINING_LENGTH, LENGTH]
    )
    np.testing.assert_array_equal(decay.log10_extended[0], decay.log10_original[0])
    assert np.all(decay.log10_extended[1, :, -1] > decay.log10_original[1, :, -1] / 2)
    assert decay.position[:, -1].tolist() == [TRAINING_LENGTH, LENGTH]


def test_the_filtered_share_is_that_of_the_global_channels(model, calibration, sequence):
    layers = measurements.layers_of(model, calibration, LongMambaConfig())
    share = measurements.filtered_share(model, calibration, LongMambaConfig(), sequence, layers, [LENGTH])
    for shares, config in ((share.whole, LongMambaConfig(length=LENGTH)), (share.streaming, LongMambaConfig())):
        selections = diagnostics.collect(apply_longmamba(model, calibration, config), sequence)
        for layer, selection in selections.items():
            left_out = np.mean(np.asarray(selection.delta[0]) == 0, axis=0)
            assert np.all(left_out[~layers.is_global[layer]] == 0)
            expected = np.quantile(left_out[layers.is_global[layer]], [0.25, 0.5, 0.75])
            np.testing.assert_allclose(shares[0, layer], expected, atol=1e-6)
    assert np.all(share.whole[0, :, 1] > share.streaming[0, :, 1])


def test_state_norms_are_those_of_the_recurrence(model, calibration, sequence):
    layers = measurements.layers_of(model, calibration, CONFIG)
    norms = measurements.state_norms(model, calibration, CONFIG, sequence, layers)
    np.testing.assert_array_equal(norms.position, np.arange(1, LENGTH + 1))
    for layer in LAYERS:
        x = np.asarray(diagnostics.collect(model, sequence)[layer].x[0], np.float64).reshape(LENGTH, -1)
        delta, A, B, _ = steps(model, sequence, layer)
        channels, per_channel = len(A), x.shape[1] // len(A)
        state = np.zeros((channels, per_channel, A.shape[1]))
        expected = []
        for t in range(LENGTH):
            B_t = B[t] if B.ndim == 2 else np.repeat(B[t], channels // B.shape[1], axis=0)[:, None]
            entering = delta[t, :, None, None] * x[t].reshape(channels, per_channel, 1) * B_t
            state = np.exp(delta[t, :, None] * A)[:, None] * state + entering
            expected.append(np.median(np.linalg.norm(state.reshape(channels, -1), axis=1)[layers.is_global[layer]]))
        np.testing.assert_allclose(norms.original[layer], expected, rtol=1e-3)
    trained_on = slice(0, TRAINING_LENGTH)
    np.testing.assert_allclose(norms.extended[:, trained_on], norms.original[:, trained_on], rtol=1e-5)
    assert not np.allclose(norms.extended[:, -1], norms.original[:, -1], rtol=1e-2)


def test_layers_whose_decay_rates_are_each_token_s_own_are_measured_like_others(sequence):
    model = language_model(pattern="M3", repeats=2)
    calibration = calibrate(model, tokens(0, 2, TRAINING_LENGTH))
    layers = measurements.layers_of(model, calibration, CONFIG)
    channels = np.array([0, 5])
    curves = measurements.decay_curves(model, calibration, CONFIG, sequence, layers, 3, channels)
    selection = diagnostics.collect(model, sequence)[3]
    delta, A = np.asarray(selection.delta[0], np.float64), np.asarray(selection.A[0, :, :, 0], np.float64)
    assert np.std(A, axis=0).min() > 1e-2  # each token has its own
    expected = np.log10(np.cumprod(np.exp(delta * A), axis=0))[:, channels]
    np.testing.assert_allclose(curves.log10_original, expected.T, rtol=1e-4, atol=1e-5)
    norms = measurements.state_norms(model, calibration, CONFIG, sequence, layers)
    assert norms.layer.tolist() == [0, 1, 2, 3]
    assert np.all(norms.original > 0)
    maps = measurements.attention_maps(model, sequence, layers, {3: channels}, pixels=LENGTH)
    weights = np.abs(diagnostics.hidden_attention(selection, jnp.asarray(channels))[0])
    largest = weights.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(10**maps.log10_attention, weights / largest, atol=1e-5)
    np.testing.assert_allclose(
        maps.receptive_field, diagnostics.effective_receptive_field(selection)[0, channels], rtol=1e-4
    )


def test_a_layer_that_is_not_there_is_named(model, sequence):
    with pytest.raises(ValueError, match="layer 4 cannot be looked into: choose one from 0 to 3"):
        diagnostics.selection_of_layer(model, sequence, 4)


def test_every_figure_says_what_its_axes_are(model, calibration, sequence, layers, tmp_path):
    channels = np.arange(8)
    maps = measurements.attention_maps(model, sequence, layers, {2: channels[:3]}, pixels=20)
    drawn = {
        "census": figures.census(layers),
        "maps": figures.attention_maps(maps, columns=2, title="Maps"),
        "fields": figures.receptive_fields(measurements.receptive_fields(model, sequence, layers, 2, channels)),
        "decay": figures.decay_curves(
            measurements.decay_curves(model, calibration, CONFIG, sequence, layers, 2, channels)
        ),
        "extended": figures.extended_decay(
            measurements.extended_decay(
                model, calibration, CONFIG, sequence, layers, 2, channels[:2], [TRAINING_LENGTH, LENGTH]
            )
        ),
        "share": figures.filtered_share(
            measurements.filtered_share(model, calibration, CONFIG, sequence, layers, [LENGTH])
        ),
        "norms": figures.state_norms(measurements.state_norms(model, calibration, CONFIG, sequence, layers)),
    }
    for name, figure in drawn.items():
        figures.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
        labels = [axes.get_xlabel() for axes in figure.axes] + [figure.get_supxlabel()]
        assert any(word in " ".join(labels) for word in ("token", "layer", "channels")), name
        assert figure.get_suptitle()
    assert all(float(tick).is_integer() for axes in drawn["share"].axes for tick in axes.get_xticks())  # layers
    assert len(drawn["maps"].axes) == 5  # three maps, an empty place, the colour bar
    assert len(list(tmp_path.iterdir())) == len(drawn)


def test_collected_and_single_selections_agree(model, sequence):
    every = diagnostics.collect(model, sequence)
    for layer in range(4):
        one = diagnostics.selection_of_layer(model, sequence, layer)
        for actual, expected in zip(jax.tree.leaves(one), jax.tree.leaves(every[layer]), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_attention_are_those_of_the_whole(model, sequence):
    selection = diagnostics.selection_of_layer(model, sequence, 1)
    channels, rows = jnp.array([2, 9]), jnp.array([0, 50, LENGTH - 1])
    whole = diagnostics.hidden_attention(selection, channels)
    of_rows = diagnostics.hidden_attention(selection, channels, rows)
    np.testing.assert_allclose(of_rows, whole[:, :, rows], rtol=1e-5, atol=1e-7)
