import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.long_context.diagnostics import collect
from mamba_jax.long_context.scaling import Scaled, ScalingConfig, apply_scaling, inverse_softplus
from mamba_jax.mixers import Mamba1, Mamba2, Mamba3
from mamba_jax.mixers.mamba2 import Mamba2Config
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import trapezoidal_ssd
from tests.mamba_jax.long_context.models import LAYERS, language_model, tokens
from tests.mamba_jax.mixers.contract import apply, apply_by_step
from tests.mamba_jax.reading import read

WIDTH = 12


@pytest.fixture(scope="module", params=["M", "2", "3", "M23"])
def model(request):
    return language_model(pattern=request.param, repeats=1)


@pytest.fixture(scope="module")
def four_layers():
    return language_model(pattern="M2", repeats=2)


def test_every_step_of_the_first_layer_is_scaled(model):
    sequence = tokens(0, 2, 30)
    # Later layers see what the first makes of it: only its steps can be compared.
    expected = 0.125 * collect(model, sequence)[0].delta
    scaled = apply_scaling(model, ScalingConfig(delta=0.125))
    np.testing.assert_allclose(collect(scaled, sequence)[0].delta, expected, rtol=1e-4)


def test_scales_of_one_change_nothing(model):
    sequence = tokens(1, 2, 30)
    np.testing.assert_array_equal(read(apply_scaling(model, ScalingConfig()), sequence)[0], read(model, sequence)[0])


def test_tokens_one_by_one_are_scaled_as_a_whole_sequence(model):
    scaled, sequence = apply_scaling(model, ScalingConfig(delta=0.25, A=0.5)), tokens(2, 2, 9)
    expected, _ = read(scaled, sequence)
    step, state, logits = jax.jit(scaled.step), scaled.init_state(2), []
    for t in range(sequence.shape[1]):
        of_token, state = step(sequence[:, t], state)
        logits.append(of_token)
    np.testing.assert_allclose(np.stack(logits, axis=1), expected, atol=2e-5)


@jax.jit
def output_by_reference(mixer, u, A_scale: float):
    """What a mixer puts out if the A that it gives its operator's definition is multiplied."""
    if isinstance(mixer, Mamba3):
        inputs, _ = mixer._ssd_inputs(u, None)
        inputs["A"] = A_scale * inputs["A"]
        return mixer._project_out(trapezoidal_ssd(**inputs, **mixer._ssd_parameters(), implementation="reference"))
    seen = mixer.selection(u)
    arguments = seen.x, seen.delta, A_scale * seen.A, seen.B, seen.C, mixer.D[...]
    if isinstance(mixer, Mamba1):
        return mixer.out_proj(selective_scan(*arguments, mixer.in_proj(u)[..., 1, :], implementation="reference"))
    assert isinstance(mixer, Mamba2)
    return mixer._project_out(ssd(*arguments, implementation="reference"), mixer._project_in(u)[0])


def build(letter: str):
    mixer = LAYERS[letter].build(WIDTH, num_layers=2, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
    # Steps that are large enough for the decay to matter.
    mixer.dt_bias[...] += 3.0
    return mixer


@pytest.mark.parametrize("letter", "M23")
def test_a_scale_of_A_multiplies_the_decay_rates_of_the_recurrence_and_nothing_else(letter):
    u = jax.random.normal(jax.random.key(1), (2, 20, WIDTH))
    mixer = build(letter)
    expected, unscaled = (output_by_reference(mixer, u, scale) for scale in (0.3, 1.0))
    assert np.abs(expected - unscaled).max() > 1e-2 * np.abs(expected).max()
    mixer.extender = Scaled(np.ones((), np.float32), np.asarray(0.3, np.float32))
    whole, final = apply(mixer, u)
    first, state = apply(mixer, u[:, :10], mixer.init_state(2))
    second, by_chunks = apply(mixer, u[:, 10:], state)
    by_steps, after_steps = apply_by_step(mixer, u, mixer.init_state(2))
    for y in (whole, jnp.concatenate([first, second], axis=1), by_steps):
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    for state in (by_chunks, after_steps):
        jax.tree.map(lambda actual, wanted: np.testing.assert_allclose(actual, wanted, atol=1e-5), state, final)


def test_factors_of_a_tuple_are_those_of_the_layers_from_the_bottom(four_layers):
    sequence = tokens(3, 1, 9)
    original = collect(four_layers, sequence)
    # The first two layers stay as they are, so that the third sees what it did.
    delta, A = (1.0, 1.0, 0.5, 0.25), (1.0, 1.0, 0.3, 0.4)
    scaled = collect(apply_scaling(four_layers, ScalingConfig(delta, A)), sequence)
    for layer, selection in scaled.items():
        np.testing.assert_allclose(selection.A, A[layer] * original[layer].A, rtol=1e-6)
    for layer in (0, 1, 2):
        np.testing.assert_allclose(scaled[layer].delta, delta[layer] * original[layer].delta, rtol=1e-4)


def test_decay_alone_can_be_scaled_where_steps_have_a_lower_limit():
    floored = language_model(pattern="2", **{"2": Mamba2Config(state_size=3, head_dim=2, delta_limit_min=1e-3)})
    apply_scaling(floored, ScalingConfig(A=0.5))
    with pytest.raises(ValueError, match="so none can be left out"):
        apply_scaling(floored, ScalingConfig(delta=(0.5, 1.0)))


def test_the_inverse_of_softplus_goes_back_from_tiny_and_large_values():
    y = jnp.array([1e-30, 1e-8, 1e-3, 0.7, 5.0, 80.0])
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(y)), y, rtol=2e-5)
    assert np.isfinite(inverse_softplus(jnp.zeros(1)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), (), (0.5, 0.0)])
@pytest.mark.parametrize("name", ["delta", "A"])
def test_scales_that_cannot_be_used_are_named(name, scale):
    with pytest.raises(ValueError, match=rf"Scaling\.{name} = "):
        ScalingConfig(**{name: scale})


def test_more_factors_than_layers_are_a_mistake(four_layers):
    with pytest.raises(ValueError, match=r"Scaling\.A = .* cannot be used: one number, or a tuple of 4"):
        apply_scaling(four_layers, ScalingConfig(A=(0.5,) * 5))
