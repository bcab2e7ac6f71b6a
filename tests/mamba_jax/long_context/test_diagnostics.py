import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.long_context import diagnostics
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from tests.mamba_jax.long_context.models import language_model, tokens

LENGTH, CHANNELS, STATE = 37, 6, 4


def scan_inputs(*, groups: int | None = None, scalar_A: bool = False, seed: int = 0):
    """Delta, A, B and C in float64, some tokens frozen."""
    random = np.random.default_rng(seed)
    delta = np.exp(random.normal(-2, 1, (LENGTH, CHANNELS))) * (random.random((LENGTH, CHANNELS)) > 0.2)
    A = -np.exp(random.normal(0, 1, (CHANNELS,) if scalar_A else (CHANNELS, STATE)))
    B, C = random.normal(size=(2, LENGTH, *([] if groups is None else [groups]), STATE))
    return delta, A, B, C


def in_float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def attention_by_products(delta, A, B, C):
    """Eq. 11, decay factor by decay factor: alpha[channel, i, j] in float64."""
    A = np.broadcast_to(A.reshape(CHANNELS, -1), (CHANNELS, STATE))
    alpha = np.zeros((CHANNELS, LENGTH, LENGTH))
    for c in range(CHANNELS):
        B_c, C_c = (m if m.ndim == 2 else m[:, c * m.shape[1] // CHANNELS] for m in (B, C))
        for i in range(LENGTH):
            for j in range(i + 1):
                decay = np.prod([np.exp(delta[k, c] * A[c]) for k in range(j + 1, i + 1)], axis=0)
                alpha[c, i, j] = np.sum(C_c[i] * decay * delta[j, c] * B_c[j])
    return alpha


KINDS = pytest.mark.parametrize(
    "kind", [{}, {"groups": 2}, {"groups": 3, "scalar_A": True}], ids=["shared", "grouped", "scalar A"]
)


@KINDS
def test_hidden_attention_equals_its_definition(kind):
    inputs = scan_inputs(**kind)
    channels = np.array([4, 0, 3])
    actual = jax.jit(diagnostics.hidden_attention)(*in_float32(*inputs), jnp.asarray(channels))
    expected = attention_by_products(*inputs)[channels]
    np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())


def test_rows_of_hidden_attention_times_x_are_the_output_of_the_scan():
    delta, A, B, C = in_float32(*scan_inputs(seed=1))
    x = jax.random.normal(jax.random.key(0), (LENGTH, CHANNELS))
    attention = diagnostics.hidden_attention(delta, A, B, C, jnp.arange(CHANNELS))
    y = selective_scan(x[None], delta[None], A, B[None], C[None], implementation="reference")[0]
    np.testing.assert_allclose(jnp.einsum("cij,jc->ic", attention, x), y, atol=1e-5)


def test_rows_of_hidden_attention_times_x_are_the_output_of_heads_too():
    delta, A, B, C = in_float32(*scan_inputs(groups=3, scalar_A=True, seed=4))
    x = jax.random.normal(jax.random.key(1), (LENGTH, CHANNELS, 5))
    attention = diagnostics.hidden_attention(delta, A, B, C, jnp.arange(CHANNELS))
    y = ssd(x[None], delta[None], A, B[None], C[None], implementation="reference")[0]
    np.testing.assert_allclose(jnp.einsum("hij,jhd->ihd", attention, x), y, atol=1e-5)


@KINDS
def test_the_last_row_is_that_of_the_whole_attention(kind):
    inputs = scan_inputs(seed=2, **kind)
    expected = attention_by_products(*inputs)[:, -1].T
    actual = jax.jit(diagnostics.last_row_of_attention)(*in_float32(*inputs))
    np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())


@KINDS
def test_the_effective_receptive_field_equals_the_quadratic_formula(kind):
    inputs = scan_inputs(seed=3, **kind)
    weight = np.abs(attention_by_products(*inputs)[:, -1])
    normalised = weight / weight.sum(axis=1, keepdims=True)
    expected = np.sum(normalised * (LENGTH - 1 - np.arange(LENGTH)), axis=1)
    actual = jax.jit(diagnostics.effective_receptive_field)(*in_float32(*inputs))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_a_channel_that_keeps_everything_sees_half_the_sequence_back():
    ones = jnp.ones((101, 1))
    erf = diagnostics.effective_receptive_field(ones, jnp.full((1, 1), -1e-12), ones, ones)
    np.testing.assert_allclose(erf, [50], rtol=1e-5)


def test_a_channel_that_attends_to_nothing_has_no_receptive_field():
    delta, A, B, C = in_float32(*scan_inputs())
    erf = diagnostics.effective_receptive_field(delta.at[:, 2].set(0), A, B, C)
    assert erf[2] == 0
    assert np.all(np.asarray(erf)[[0, 1, 3, 4, 5]] > 0)


def test_tiny_weights_have_the_receptive_field_of_large_ones():
    delta, A, B, C = in_float32(*scan_inputs())
    expected = diagnostics.effective_receptive_field(delta, A, B, C)
    np.testing.assert_allclose(diagnostics.effective_receptive_field(delta, A, B, 1e-28 * C), expected, rtol=1e-3)


def test_the_receptive_field_needs_memory_for_the_length_and_not_for_the_states():
    def compiled(length):
        delta, matrix = jax.ShapeDtypeStruct((length, 32), jnp.float32), jax.ShapeDtypeStruct((length, 16), jnp.float32)
        A = jax.ShapeDtypeStruct((32, 16), jnp.float32)
        return jax.jit(diagnostics.effective_receptive_field).lower(delta, A, matrix, matrix).compile()

    temporary = [compiled(length).memory_analysis().temp_size_in_bytes for length in (1024, 4096)]
    assert temporary[1] < 4.5 * temporary[0]
    assert temporary[1] < 4096 * 32 * 16 * 4  # the states of all tokens


@pytest.mark.parametrize("scalar_A", [False, True])
def test_cumulative_decay_is_the_product_of_the_mean_decays(scalar_A):
    delta, A, _, _ = scan_inputs(scalar_A=scalar_A, seed=4)
    factors = np.exp(delta[..., None] * A.reshape(CHANNELS, -1)).mean(axis=-1)
    expected = np.log(np.cumprod(factors, axis=0))
    np.testing.assert_allclose(diagnostics.log_cumulative_decay(*in_float32(delta, A)), expected, rtol=1e-5, atol=1e-6)


def test_decays_below_the_smallest_float32_are_told_apart():
    delta = jnp.ones((100, 2))
    last = diagnostics.log_cumulative_decay(delta, -jnp.array([0.91, 0.93]))[-1]
    np.testing.assert_allclose(last, [-91, -93], rtol=1e-5)
    np.testing.assert_array_equal(diagnostics.is_global(last, 1e-40), [True, False])  # ln 1e-40 = -92.1


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1e-3])
def test_a_threshold_that_is_no_decay_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold = "):
        diagnostics.is_global(np.zeros((1, 2)), threshold)


def test_frozen_share_counts_steps_of_zero():
    delta = jnp.array([[0.0, 1.0], [2.0, 1e-30], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(diagnostics.frozen_share(delta), [0.75, 0.25])


def test_collected_selections_are_what_each_layer_scans():
    model = language_model(pattern="MM", repeats=2)
    sequence = tokens(0, 2, 9)
    selections = diagnostics.collect(model, sequence)
    assert list(selections) == [0, 1, 2, 3]
    # Layer by layer, by hand: the output of the model's own mixers from what was collected.
    x = model._embed(sequence)
    for layer, selection in selections.items():
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer // 2], model.blocks[layer % 2])
        mixer, u = block.mixer, block.normalise(x)
        z = mixer.in_proj(u)[..., 1, :]
        y = selective_scan(
            selection.x, selection.delta, selection.A, selection.B, selection.C, mixer.D[...], z, implementation="xla"
        )
        out = mixer.out_proj(y)
        np.testing.assert_allclose(out, mixer(u)[0], rtol=1e-4, atol=1e-5)
        x = x + out


def test_measures_are_taken_in_each_layer():
    model, sequence = language_model(), tokens(1, 2, 9)
    selections = diagnostics.collect(model, sequence)
    measured = diagnostics.collect(model, sequence, lambda s: jnp.mean(s.delta))
    for layer, mean in measured.items():
        assert float(mean) == pytest.approx(float(jnp.mean(selections[layer].delta)), rel=1e-5)
