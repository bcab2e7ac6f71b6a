"""The causal convolution against SciPy's, and the laws that any correct one obeys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.causal_conv1d import causal_conv1d, causal_conv1d_step

IMPLEMENTATIONS = ("reference", "xla")


def filtered(x, weight, bias, initial_state=None, activation=None):
    """The convolution of whole, unpacked sequences, by SciPy in float64."""
    past = np.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2])) if initial_state is None else initial_state
    tokens = np.concatenate([past, x], axis=1)
    y = np.stack(
        [scipy.signal.oaconvolve(tokens[..., c], weight[None, ::-1, c], "valid", axes=1) for c in range(x.shape[2])],
        axis=-1,
    )
    y = y + bias
    return y / (1 + np.exp(-y)) if activation == "silu" else y


def make_inputs(batch=2, length=10, channels=3, width=4):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(batch, length, channels)),
        "weight": rng.normal(size=(width, channels)),
        "bias": rng.normal(size=channels),
        "initial_state": rng.normal(size=(batch, width - 1, channels)),
    }


def cast(inputs, dtype):
    return {name: jnp.asarray(value, dtype) for name, value in inputs.items()}


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def convolve(inputs, segment_ids=None, **options):
    return causal_conv1d(**inputs, segment_ids=segment_ids, return_final_state=True, **options)


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(inputs, segment_ids, implementation):
    def energy(inputs):
        y, state = convolve(inputs, segment_ids, activation="silu", implementation=implementation)
        return jnp.sum(y**2) + jnp.sum(jnp.sin(state))

    return jax.grad(energy)(inputs)


def relative_error(actual, expected):
    actual, expected = (np.asarray(value, float) for value in (actual, expected))
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


@settings(max_examples=20)
@given(
    sizes=st.tuples(*(st.integers(1, largest) for largest in (3, 12, 5, 6))),
    activation=st.sampled_from([None, "silu"]),
    with_state=st.booleans(),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_equals_scipy_at_any_size(sizes, activation, with_state, implementation):
    inputs = make_inputs(*sizes)
    if not with_state:
        inputs["initial_state"] = None
    given_inputs = {name: None if value is None else jnp.asarray(value) for name, value in inputs.items()}
    y, state = convolve(given_inputs, activation=activation, implementation=implementation)
    assert relative_error(y, filtered(**inputs, activation=activation)) < 1e-5
    past = np.zeros((sizes[0], sizes[3] - 1, sizes[2])) if not with_state else inputs["initial_state"]
    everything = np.concatenate([past, inputs["x"]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(state, everything[:, sizes[1] :])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_do_not_see_each_other(implementation):
    inputs = make_inputs(batch=1, length=12)
    lengths = [3, 1, 5, 2, 1]
    segment_ids = jnp.asarray(np.repeat([4, 9, 4, 5, 4], lengths))[None]
    y, state = convolve(cast(inputs, jnp.float32), segment_ids, implementation=implementation)
    documents = np.split(inputs["x"], np.cumsum(lengths)[:-1], axis=1)
    expected = [
        filtered(document, inputs["weight"], inputs["bias"], inputs["initial_state"] if i == 0 else None)
        for i, document in enumerate(documents)
    ]
    np.testing.assert_allclose(y, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[:, :2], 0)
    np.testing.assert_allclose(state[:, 2], inputs["x"][:, -1], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [1, 2, 7, 13])
def test_two_parts_with_the_state_between_equal_the_whole(cut, implementation):
    inputs = cast(make_inputs(length=14), jnp.float32)
    segment_ids = np.cumsum(np.random.default_rng(0).random((2, 14)) < 0.3, axis=1)
    segment_ids[:, cut] = segment_ids[:, cut - 1]
    segment_ids = jnp.asarray(segment_ids)
    run = functools.partial(convolve, activation="silu", implementation=implementation)
    y, final_state = run(inputs, segment_ids)
    y_1, state = run(inputs | {"x": inputs["x"][:, :cut]}, segment_ids[:, :cut])
    y_2, state = run(inputs | {"x": inputs["x"][:, cut:], "initial_state": state}, segment_ids[:, cut:])
    np.testing.assert_allclose(jnp.concatenate([y_1, y_2], axis=1), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state, final_state)


def test_steps_equal_the_sequence():
    inputs = cast(make_inputs(), jnp.float32)
    y, final_state = convolve(inputs, activation="silu")
    state = inputs["initial_state"]
    for t in range(y.shape[1]):
        y_t, state = causal_conv1d_step(state, inputs["x"][:, t], inputs["weight"], inputs["bias"], activation="silu")
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state, final_state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_the_slopes_of_scipys_convolution(implementation):
    inputs = make_inputs()

    def energy(**inputs):
        y = filtered(**inputs, activation="silu")
        return np.sum(y**2) + np.sum(np.sin(inputs["x"][:, -3:]))

    with jax.enable_x64(True):
        gradient = gradients(cast(inputs, jnp.float64), None, implementation)
    for name, value in inputs.items():
        direction = np.random.default_rng(1).normal(size=value.shape)
        ahead, behind = (energy(**inputs | {name: value + step * direction}) for step in (1e-6, -1e-6))
        assert np.sum(np.asarray(gradient[name]) * direction) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.bfloat16, 1e-2), (jnp.float16, 1e-2)])
def test_low_precision_inputs_round_only_the_output(dtype, tolerance):
    inputs = cast(make_inputs(length=40, channels=8), dtype)
    exact = {name: np.asarray(value, float) for name, value in inputs.items()}
    segment_ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 40)) < 0.2, axis=1))
    y, state = convolve(inputs, activation="silu")
    assert y.dtype == state.dtype == dtype
    assert relative_error(y, filtered(**exact, activation="silu")) < tolerance / 2
    gradient = gradients(inputs, segment_ids, "xla")
    with jax.enable_x64(True):
        expected = gradients(cast(exact, jnp.float64), segment_ids, "reference")
    for name in inputs:
        assert relative_error(gradient[name], expected[name]) < tolerance, name


def test_mistakes_name_the_argument_and_what_would_fit(no_shape_checks):
    inputs = cast(make_inputs(), jnp.float32)
    for wrong, message in [
        ({"x": inputs["x"][0]}, r"x must be \(batch, length, channels\), got shape \(10, 3\)"),
        ({"x": inputs["x"][:, :0]}, "x has no elements"),
        ({"weight": inputs["weight"].T}, r"weight must be \(width, channels\) with channels 3 as in x"),
        ({"bias": jnp.ones(2)}, "bias must be .* with channels 3"),
        ({"activation": "gelu"}, r"activation must be one of \(None, 'silu'\), got 'gelu'"),
        ({"segment_ids": jnp.ones((2, 9), int)}, "segment_ids must be .* with length 10 as in x"),
        ({"initial_state": jnp.ones((2, 4, 3))}, "initial_state must be .* with width - 1 3 as in weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**(inputs | wrong))
