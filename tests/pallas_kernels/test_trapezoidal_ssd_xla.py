"""What the XLA implementation of the trapezoidal SSD operator promises beyond its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.trapezoidal_ssd import rotation, trapezoidal_ssd


def temporary_bytes(*, head_dim, state):
    """Memory that a gradient needs besides its inputs and outputs, at 4 heads and a length of 2048 in chunks of 64."""

    def struct(*shape):
        return jax.ShapeDtypeStruct((1, 2048, *shape), jnp.float32)

    arrays = [struct(4, head_dim), struct(4), struct(4), struct(1, 1, state), struct(1, 1, state), struct(4), struct(1)]

    def energy(*arrays):
        return jnp.sum(trapezoidal_ssd(*arrays, implementation="xla", chunk_size=64) ** 2)

    compiled = jax.jit(jax.grad(energy, argnums=tuple(range(7)))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_states_of_all_tokens_are_never_in_memory():
    growth = temporary_bytes(head_dim=64, state=64) - temporary_bytes(head_dim=64, state=32)
    assert growth < 0.05 * (4 * 2048 * 4 * 64 * 32)


def test_matrices_of_all_heads_are_never_in_memory_together():
    growth = temporary_bytes(head_dim=1, state=1024) - temporary_bytes(head_dim=1, state=512)
    matrix = 4 * 2048 * 512
    # B and C of all heads would be 8 of these; their gradients, one head's each, and the states of 32 chunks are there.
    assert growth < 3 * matrix


def test_the_gradient_of_the_angles_of_a_long_chunk_does_not_drown_in_the_rounding_of_bfloat16():
    # A token is forgotten after some ten, so its angle concerns no more of them. Yet its gradient is a sum over all
    # later tokens, whose terms must cancel: 2.5 % would be left if the slopes were those of unrounded B and C.
    length = 1024
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(1, length, *shape)), jnp.bfloat16)

    x, B, C = normal(2, 4), normal(1, 1, 8), normal(1, 1, 8)
    ones = jnp.ones((1, length, 2))
    theta = jnp.asarray(rng.uniform(-1, 1, size=(1, length, 4)), jnp.float32)

    def gradient(x, B, C):
        def loss(theta):
            y = trapezoidal_ssd(x, 0.1 * ones, -ones, B, C, 0.5 * ones, theta, implementation="xla", chunk_size=length)
            return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y)

        return jax.grad(loss)(theta)

    expected = gradient(*(array.astype(jnp.float32) for array in (x, B, C)))
    assert np.linalg.norm(gradient(x, B, C) - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("add", [rotation.cumulative_angle, lambda terms: rotation.total_angle(terms)[:, None]])
def test_a_long_sum_of_angles_is_as_precise_as_its_terms(add):
    # In float32 a plain sum of these, up to 120,000 half-turns, would end up off by hundredths of a half-turn.
    terms = jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.0, size=(1, 131_072)), jnp.float32)
    expected = np.cumsum(np.asarray(terms, np.float64), axis=1)[0, -1]
    difference = np.asarray(add(terms), np.float64)[0, -1] - expected
    assert abs(difference - 2 * np.round(difference / 2)) < 1e-4


def test_sums_of_angles_have_the_slopes_of_sums():
    terms, weights = jnp.ones((2, 5, 3)), jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    slopes = jax.grad(lambda terms: jnp.sum(weights * rotation.cumulative_angle(terms)))(terms)
    np.testing.assert_allclose(slopes, np.cumsum(weights[:, ::-1], axis=1)[:, ::-1], rtol=1e-5, atol=1e-6)
    slopes = jax.grad(lambda terms: jnp.sum(weights[:, 0] * rotation.total_angle(terms)))(terms)
    np.testing.assert_allclose(slopes, np.broadcast_to(weights[:, :1], (2, 5, 3)))
