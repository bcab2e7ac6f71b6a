import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.long_context import diagnostics
from mamba_jax.mixers.mamba3 import Mamba3Config
from mamba_jax.mixers.selective import FROZEN, Selection
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import trapezoidal_ssd
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


def selection(delta, A, B, C, x=None) -> Selection:
    """A batch of one sequence, in float32."""
    x = np.zeros(delta.shape) if x is None else x
    x, delta, A, B, C = in_float32(x, delta, A, B, C)
    return Selection(x[None], delta[None], A, B[None], C[None])


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
    actual = jax.jit(diagnostics.hidden_attention)(selection(*inputs), jnp.asarray(channels))[0]
    expected = attention_by_products(*inputs)[channels]
    np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())


def test_rows_of_hidden_attention_times_x_are_the_output_of_the_scan():
    delta, A, B, C = in_float32(*scan_inputs(seed=1))
    x = jax.random.normal(jax.random.key(0), (LENGTH, CHANNELS))
    attention = diagnostics.hidden_attention(selection(delta, A, B, C), jnp.arange(CHANNELS))[0]
    y = selective_scan(x[None], delta[None], A, B[None], C[None], implementation="reference")[0]
    np.testing.assert_allclose(jnp.einsum("cij,jc->ic", attention, x), y, atol=1e-5)


def test_rows_of_hidden_attention_times_x_are_the_output_of_heads_too():
    delta, A, B, C = in_float32(*scan_inputs(groups=3, scalar_A=True, seed=4))
    x = jax.random.normal(jax.random.key(1), (LENGTH, CHANNELS, 5))
    attention = diagnostics.hidden_attention(selection(delta, A, B, C), jnp.arange(CHANNELS))[0]
    y = ssd(x[None], delta[None], A, B[None], C[None], implementation="reference")[0]
    np.testing.assert_allclose(jnp.einsum("hij,jhd->ihd", attention, x), y, atol=1e-5)


class ChangesSteps(nnx.Module):
    """An extender that leaves out about half of the tokens, and lets the others decay the state less."""

    A_scale = 0.5 * jnp.ones(())

    def __call__(self, delta, bias, position):
        return jnp.where(jnp.sin(7.0 * position[..., None] + jnp.arange(delta.shape[-1])) < 0, FROZEN, delta)


@pytest.fixture(scope="module", params=[(1, True), (2, False)], ids=["extended", "rank 2"])
def mamba3(request):
    """What the scan of a Mamba-3 layer sees of two sequences, and the arguments and parameters that say the same."""
    rank, extended = request.param
    config = Mamba3Config(state_size=6, head_dim=3, groups=2, rank=rank)
    mixer = config.build(6, num_layers=1, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
    leaves, structure = jax.tree.flatten(mixer)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.5 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    mixer = jax.tree.unflatten(structure, moved)
    if extended:
        mixer.extender = ChangesSteps()
    u = jax.random.normal(jax.random.key(2), (2, LENGTH, 6))
    parameters = mixer._ssd_parameters()
    # The linear part: no skip connection and no gate. Of each rank by itself.
    parameters |= {"D": None, "mimo_z": None, "implementation": "reference", "return_final_state": True}
    return mixer.selection(u), mixer._ssd_inputs(u, None)[0] | {"z": None}, parameters


def test_rows_of_hidden_attention_times_x_are_the_outputs_of_mamba_3(mamba3):
    seen, inputs, parameters = mamba3
    heads = seen.delta.shape[2]
    attention = jax.jit(diagnostics.hidden_attention)(seen, jnp.arange(heads))
    for rank in range(seen.rank):
        one_hot = jnp.zeros((heads, seen.rank, 3)).at[:, rank].set(1)
        y, _ = trapezoidal_ssd(**inputs, **parameters | {"mimo_o": one_hot})
        if seen.rank == 1:
            of_rank = jnp.einsum("bhij,bjhp->bihp", attention, seen.x)
        else:
            of_rank = jnp.einsum("bhijs,bjhsp->bihp", attention[..., rank, :], seen.x)
        np.testing.assert_allclose(of_rank, y, atol=2e-5 * np.abs(y).max())


def test_the_last_row_of_mamba_3_gives_its_receptive_field(mamba3):
    seen, _, _ = mamba3
    attention = np.asarray(diagnostics.hidden_attention(seen, jnp.arange(seen.delta.shape[2])), np.float64)
    last = np.moveaxis(attention[:, :, -1], 1, 2)
    np.testing.assert_allclose(diagnostics.last_row_of_attention(seen), last, atol=2e-6 * np.abs(last).max())
    weight = np.abs(last) if seen.rank == 1 else np.sqrt(np.sum(last**2, axis=(-2, -1)))
    expected = np.einsum("l,blh->bh", np.arange(LENGTH - 1, -1, -1), weight) / np.sum(weight, axis=1)
    np.testing.assert_allclose(diagnostics.effective_receptive_field(seen), expected, rtol=1e-4)


def test_norms_are_those_of_mamba_3_s_states_after_as_many_tokens(mamba3):
    seen, inputs, parameters = mamba3
    norms = jax.jit(diagnostics.state_norms, static_argnums=1)(seen, 9)
    for sample, length in enumerate((9, 18, 27, 36)):
        first = {name: None if array is None else array[:, :length] for name, array in inputs.items()}
        state = trapezoidal_ssd(**first, **parameters)[1].ssm
        expected = np.linalg.norm(np.asarray(state, np.float64), axis=(2, 3))
        np.testing.assert_allclose(norms[:, sample], expected, rtol=1e-4)


def test_the_first_tokens_are_seen_as_if_there_were_no_others(mamba3):
    seen, _, _ = mamba3
    attention = diagnostics.hidden_attention(seen, jnp.arange(3))
    of_first = diagnostics.hidden_attention(seen.until(11), jnp.arange(3))
    np.testing.assert_allclose(of_first, attention[:, :, :11, :11], rtol=1e-5, atol=1e-7)
    # The next token has added to what the last one of these entered the state with.
    last = diagnostics.last_row_of_attention(seen.until(11))[:, :, :3]
    np.testing.assert_allclose(last, jnp.moveaxis(attention[:, :, 10, :11], 1, 2), rtol=1e-4, atol=1e-6)


@KINDS
def test_the_last_row_is_that_of_the_whole_attention(kind):
    inputs = scan_inputs(seed=2, **kind)
    expected = attention_by_products(*inputs)[:, -1].T
    actual = jax.jit(diagnostics.last_row_of_attention)(selection(*inputs))[0]
    np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())


@KINDS
def test_the_effective_receptive_field_equals_the_quadratic_formula(kind):
    inputs = scan_inputs(seed=3, **kind)
    weight = np.abs(attention_by_products(*inputs)[:, -1])
    normalised = weight / weight.sum(axis=1, keepdims=True)
    expected = np.sum(normalised * (LENGTH - 1 - np.arange(LENGTH)), axis=1)
    actual = jax.jit(diagnostics.effective_receptive_field)(selection(*inputs))[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_a_channel_that_keeps_everything_sees_half_the_sequence_back():
    ones = jnp.ones((101, 1))
    erf = diagnostics.effective_receptive_field(selection(ones, jnp.full((1, 1), -1e-12), ones, ones))
    np.testing.assert_allclose(erf, [[50]], rtol=1e-5)


def test_a_channel_that_attends_to_nothing_has_no_receptive_field():
    delta, A, B, C = in_float32(*scan_inputs())
    erf = diagnostics.effective_receptive_field(selection(delta.at[:, 2].set(0), A, B, C))[0]
    assert erf[2] == 0
    assert np.all(np.asarray(erf)[[0, 1, 3, 4, 5]] > 0)


def test_tiny_weights_have_the_receptive_field_of_large_ones():
    delta, A, B, C = in_float32(*scan_inputs())
    expected = diagnostics.effective_receptive_field(selection(delta, A, B, C))
    tiny = diagnostics.effective_receptive_field(selection(delta, A, B, 1e-28 * C))
    np.testing.assert_allclose(tiny, expected, rtol=1e-3)


def test_the_receptive_field_needs_memory_for_the_length_and_not_for_the_states():
    def compiled(length):
        shapes = (1, length, 32), (1, length, 32), (32, 16), (1, length, 16), (1, length, 16)
        seen = Selection(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        return jax.jit(diagnostics.effective_receptive_field).lower(seen).compile()

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
    x = model.embed(sequence)
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
