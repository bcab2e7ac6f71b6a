"""Distances of values and gradients from their definition."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accuracy import Drawing, print_errors, relative_errors, values_and_gradients


class Inputs(NamedTuple):
    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    segment_ids: jax.Array


def product(inputs, *, power):
    y = inputs.x**power * inputs.weight
    return y, jnp.sum(y), jnp.zeros(3)


def inputs():
    drawing = Drawing("float32")
    return Inputs(drawing.tokens(2, 5), drawing.floats(5), None, drawing.segment_ids(2, 5))


def test_gradients_are_of_the_floating_point_inputs():
    x, weight, *_ = arrays = inputs()
    dy = Drawing().floats(2, 5)
    results = values_and_gradients(product, arrays, dy, jnp.float32(3), power=2)
    assert set(results) == {"y", "final_state", "dx", "dweight"}
    np.testing.assert_allclose(results["y"], x**2 * weight, rtol=1e-6)
    np.testing.assert_allclose(results["dx"], 2 * x * weight * (dy + 3), rtol=1e-5)
    np.testing.assert_allclose(results["dweight"], np.sum(x**2 * (dy + 3), axis=0), rtol=1e-5)


def test_an_error_is_relative_to_the_whole_array_in_float64():
    # 2**-30 is lost in float32, next to 1.
    a = jnp.array([1.0, 2.0**-30])
    errors = relative_errors(lambda a: {"sum": jnp.sum(a), "a": 1.25 * a}, lambda a: {"sum": a.sum(), "a": a}, a)
    assert errors["sum"] == pytest.approx(2.0**-30, rel=1e-6)
    assert errors["a"] == pytest.approx(0.25)


def test_results_that_change_from_run_to_run_are_refused():
    calls = itertools.count(1.0)

    def run(a):
        return {"y": a * jax.pure_callback(lambda: np.float32(next(calls)), jax.ShapeDtypeStruct((), jnp.float32))}

    with pytest.raises(RuntimeError, match="y differs from run to run"):
        relative_errors(run, lambda a: {"y": a}, jnp.ones(3))


def test_errors_are_printed_in_one_line(capsys):
    def half(inputs, **options):
        return tuple(0.5 * array for array in product(inputs, **options))

    print_errors("case", half, product, inputs(), (Drawing().floats(2, 5), jnp.float32(0)), power=2)
    assert capsys.readouterr().out == "case dweight 5.0e-01 dx 5.0e-01 final_state 5.0e-01 y 5.0e-01\n"


def test_what_is_drawn_is_the_same_in_every_run():
    one, two = (Drawing() for _ in range(2))
    np.testing.assert_array_equal(one.tokens(3, 4), two.tokens(3, 4))
    rates = np.log(-one.decay_rates(1000))
    assert rates.min() >= -8.001
    assert rates.max() <= 3.001
    assert abs(np.mean(rates) + 2.5) < 0.5
