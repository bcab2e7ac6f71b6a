"""How far an operator's values and gradients are from its definition in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.operators import Arrays


class Drawing:
    """Draws the inputs of a check, the same ones in every run."""

    def __init__(self, dtype: str = "bfloat16") -> None:
        self.dtype = dtype
        self._random = np.random.default_rng(0)

    def tokens(self, *dims: int) -> jax.Array:
        """Standard normal, of the dtype that the tokens have."""
        return jnp.asarray(self._random.normal(size=dims), self.dtype)

    def floats(self, *dims: int) -> jax.Array:
        """Standard normal in float32."""
        return jnp.asarray(self._random.normal(size=dims), jnp.float32)

    def decay_rates(self, *dims: int) -> jax.Array:
        """From -exp(-8) to -exp(3) in float32, log-uniform."""
        return jnp.asarray(-np.exp(self._random.uniform(-8, 3, size=dims)), jnp.float32)

    def segment_ids(self, batch: int, length: int) -> jax.Array:
        """Up to four documents a sequence."""
        return jnp.asarray(np.sort(self._random.integers(0, 4, size=(batch, length))), jnp.int32)


def values_and_gradients(
    run: Callable[..., tuple[jax.Array, ...]], inputs: Any, dy: jax.Array, dfinal_state: jax.Array, **options: Any
) -> Arrays:
    """Returns "y" and "final_state", and under "dNAME" the gradient of every floating-point input.

    Args:
        run: an implementation, ``run(inputs, **options) -> (y, final_state, ...)``.
        inputs: the operator's NamedTuple.
        dy: cotangent of y.
        dfinal_state: of the final state.
        options: of the implementation.
    """
    arrays = {
        name: array
        for name, array in inputs._asdict().items()
        if array is not None and jnp.issubdtype(array.dtype, jnp.floating)
    }
    (y, final_state), vjp = jax.vjp(lambda a: run(inputs._replace(**a), **options)[:2], arrays)
    (gradients,) = vjp((dy, dfinal_state))
    return {"y": y, "final_state": final_state} | {f"d{name}": array for name, array in gradients.items()}


def relative_errors(
    run: Callable[..., Mapping[str, jax.Array]], definition: Callable[..., Mapping[str, jax.Array]], *arguments: Any
) -> dict[str, float]:
    """Compares results with those of the definition in float64, each relative to the norm of the whole array.

    Args:
        run: ``run(*arguments) -> results`` by name.
        definition: the same.
        arguments: arrays, or trees of them.

    Raises:
        RuntimeError: two runs differ.
    """
    run = jax.jit(run)
    got, again = run(*arguments), run(*arguments)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, arguments)
        expected = jax.jit(definition)(*wide)
    errors = {}
    for name, value in expected.items():
        if not (got[name] == again[name]).all():
            raise RuntimeError(f"{name} differs from run to run")
        difference = np.asarray(got[name], np.float64) - np.asarray(value)
        errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(value))
    return errors


def print_errors(
    label: str,
    implementation: Callable[..., tuple[jax.Array, ...]],
    definition: Callable[..., tuple[jax.Array, ...]],
    inputs: Any,
    cotangents: tuple[jax.Array, jax.Array],
    **options: Any,
) -> None:
    """Prints the relative errors of an operator's ``values_and_gradients``."""
    errors = relative_errors(
        functools.partial(values_and_gradients, implementation, **options),
        functools.partial(values_and_gradients, definition, **options),
        inputs,
        *cotangents,
    )
    print(label, " ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
