"""Comparing an operator's results with others, whatever their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def exact(inputs: Any) -> Any:
    """Inputs of low precision, without further rounding, as NumPy's float64, or complex128 where they are complex."""
    return jax.tree.map(lambda value: np.asarray(value, complex if jnp.iscomplexobj(value) else float), inputs)


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected, real or complex."""
    actual, expected = (np.asarray(value).astype(complex) for value in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compares trees leaf by leaf, by their relative error."""
    for (path, leaf), truth in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(leaf, truth) < tolerance, jax.tree_util.keystr(path)


def weighted_sum(outputs: Any) -> Any:
    """A loss that weighs every number of a tree differently."""
    leaves = jax.tree.leaves(outputs)
    weights = (np.random.default_rng(seed).normal(size=leaf.shape) for seed, leaf in enumerate(leaves))
    return sum(jnp.sum(weight * leaf) for weight, leaf in zip(weights, leaves, strict=True))


def assert_works_under_vmap_scan_and_checkpoint(run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> None:
    """Compares y, and its gradient with respect to "x", with those of the plain call.

    Args:
        run: ``run(inputs) -> (y, state)``.
        inputs: by name.
    """

    def output(x: jax.Array) -> jax.Array:
        return run(inputs | {"x": x})[0]

    @jax.checkpoint
    def energy(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(output)(x[None]) ** 2)

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda total, _: (total + energy(x), None), 0.0, length=2)[0]

    expected, expected_gradient = jax.value_and_grad(lambda x: jnp.sum(output(x) ** 2))(inputs["x"])
    value, gradient = jax.value_and_grad(total)(inputs["x"])
    np.testing.assert_allclose(value, 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * expected_gradient, rtol=1e-4, atol=1e-5)
