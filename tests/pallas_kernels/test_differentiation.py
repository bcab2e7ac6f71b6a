"""Operators made of two passes, compared with JAX's own derivative of the same formulas."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.differentiation import with_backward_pass


def definition(arrays):
    """y = a sin(x), for each channel, and its sum over the sequence, in float32."""
    x = arrays["x"].astype(jnp.float32)
    y = arrays.get("a", jnp.ones(x.shape[2])) * jnp.sin(x)
    return y.astype(arrays["x"].dtype), jnp.sum(y, axis=1)


def forward(arrays, *, save_states):
    y, final_state = definition(arrays)
    saved = {"cosine": jnp.cos(arrays["x"].astype(jnp.float32))} if save_states else {}
    return {"y": y, "final_state": final_state, **saved}


def backward(arrays):
    dy = arrays["dy"].astype(jnp.float32)
    if "dfinal_state" in arrays:
        dy = dy + arrays["dfinal_state"][:, None]
    gradients = {"x": arrays.get("a", 1.0) * arrays["cosine"] * dy}
    if "a" in arrays:
        gradients["a"] = jnp.sum(jnp.sin(arrays["x"].astype(jnp.float32)) * dy, axis=1)
    return gradients


operator = with_backward_pass(forward, backward, parameters=("a", "of other calls"))


def make_arrays(*, dtype=jnp.float32, count=None):
    random = np.random.default_rng(0)
    stack = () if count is None else (count,)
    return {
        "x": jnp.asarray(random.normal(size=(*stack, 2, 5, 3)), dtype),
        "a": jnp.asarray(random.normal(size=(*stack, 3)), dtype),
    }


def value_and_gradient(run, arrays):
    """Of a loss that depends on y and on the final state, each token with a weight of its own."""

    def loss(arrays):
        y, final_state = run(arrays)
        weights = jnp.arange(1, y.size + 1, dtype=jnp.float32).reshape(y.shape) / y.size
        return jnp.sum(weights * y) + jnp.sum(final_state**2)

    return jax.value_and_grad(loss)(arrays)


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.mark.parametrize("names", [("x", "a"), ("x",)], ids=str)
def test_gradients_are_those_of_the_definition(names):
    arrays = {name: array for name, array in make_arrays().items() if name in names}
    assert_close(value_and_gradient(operator, arrays), value_and_gradient(definition, arrays))


@pytest.mark.parametrize("used", ["y", "final_state"])
@pytest.mark.parametrize("batched", [False, True], ids=["once", "vmap"])
def test_one_of_the_results_need_not_be_used(used, batched):
    def gradient(run, arrays):
        place = ("y", "final_state").index(used)
        return jax.grad(lambda arrays: jnp.sum(run(arrays)[place] ** 2))(arrays)

    arrays = make_arrays(count=2 if batched else None)
    found, expected = (functools.partial(gradient, run) for run in (operator, definition))
    if batched:
        found, expected = jax.vmap(found), jax.vmap(expected)
    assert_close(found(arrays), expected(arrays))


def test_the_backward_pass_sees_no_zeros_in_the_place_of_a_final_state_that_is_not_used():
    seen = []

    def watched(arrays):
        seen.append("dfinal_state" in arrays)
        return backward(arrays)

    watched_operator = with_backward_pass(forward, watched, parameters=("a",))
    for results in (slice(1), slice(2)):
        jax.grad(lambda arrays, results=results: sum(map(jnp.sum, watched_operator(arrays)[results])))(make_arrays())
    assert seen == [False, True]


def test_gradients_have_the_dtypes_of_their_arrays():
    _, gradients = value_and_gradient(operator, make_arrays(dtype=jnp.bfloat16))
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients.values())


@pytest.mark.parametrize("shared", [("a",), ("x",), ()], ids=["a shared", "x shared", "none shared"])
def test_vmap_is_a_loop(shared):
    arrays = make_arrays(count=3) | {name: make_arrays()[name] for name in shared}
    axes = {name: None if name in shared else 0 for name in arrays}
    batched = jax.vmap(functools.partial(value_and_gradient, operator), in_axes=(axes,))(arrays)
    expected = jax.vmap(functools.partial(value_and_gradient, definition), in_axes=(axes,))(arrays)
    assert_close(batched, expected)


def test_what_the_backward_pass_wants_is_saved_only_for_it():
    arrays = make_arrays()
    calls = []

    def watched(arrays, *, save_states):
        calls.append(save_states)
        return forward(arrays, save_states=save_states)

    watched_operator = with_backward_pass(watched, backward, parameters=("a",))
    jax.jit(watched_operator).trace(arrays)
    assert set(calls) == {False}
    _, vjp = jax.eval_shape(lambda arrays: jax.vjp(watched_operator, arrays), arrays)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(vjp))
    assert sizes == [3, 30, 30], "x, a and the cosine of x, and nothing else"
