import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.long_context.delta_scaling import inverse_softplus, scale_delta
from mamba_jax.long_context.diagnostics import collect
from tests.mamba_jax.long_context.models import language_model, tokens


@pytest.fixture(scope="module", params=["M", "2", "3", "M23"])
def model(request):
    return language_model(pattern=request.param, repeats=1)


def test_every_step_of_the_first_layer_is_scaled(model):
    sequence = tokens(0, 2, 30)
    # Later layers see what the first makes of it: only its steps can be compared.
    expected = 0.125 * collect(model, sequence)[0].delta
    np.testing.assert_allclose(collect(scale_delta(model, 0.125), sequence)[0].delta, expected, rtol=1e-4)


def test_a_scale_of_one_changes_nothing(model):
    sequence = tokens(1, 2, 30)
    np.testing.assert_allclose(scale_delta(model, 1.0)(sequence)[0], model(sequence)[0], atol=1e-5)


def test_tokens_one_by_one_are_scaled_as_a_whole_sequence(model):
    scaled, sequence = scale_delta(model, 0.25), tokens(2, 2, 9)
    expected, _ = scaled(sequence)
    state, logits = scaled.init_state(2), []
    for t in range(sequence.shape[1]):
        of_token, state = scaled.step(sequence[:, t], state)
        logits.append(of_token)
    np.testing.assert_allclose(np.stack(logits, axis=1), expected, atol=2e-5)


def test_the_inverse_of_softplus_goes_back_from_tiny_and_large_values():
    y = jnp.array([1e-30, 1e-8, 1e-3, 0.7, 5.0, 80.0])
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(y)), y, rtol=2e-5)
    assert np.isfinite(inverse_softplus(jnp.zeros(1)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_cannot_be_used_are_named(scale):
    with pytest.raises(ValueError, match="scale = "):
        scale_delta(language_model(), scale)
