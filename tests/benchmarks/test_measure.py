"""Measurements: what is timed is also checked."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import prepare as prepare_module
from benchmarks.hardware import Limits
from benchmarks.measure import Failure, Measurement, _errors, measure
from benchmarks.operators import OPERATORS, Costs, Operator
from benchmarks.prepare import prepare
from benchmarks.suites import Case
from benchmarks.timing import time_program

SHAPES = {
    "selective_scan": {"batch": 2, "length": 16, "channels": 24, "state": 4},
    "ssd": {"batch": 2, "length": 16, "heads": 16, "head_dim": 4, "groups": 1, "state": 4},
    "trapezoidal_ssd": {
        "batch": 2,
        "length": 16,
        "heads": 16,
        "head_dim": 4,
        "groups": 1,
        "rank": 2,
        "state": 4,
        "pairs": 1,
    },
    "causal_conv1d": {"batch": 2, "length": 16, "channels": 24, "width": 4},
    "gated_rms_norm": {"batch": 2, "length": 16, "heads": 4, "head_dim": 8},
}
LIMITS = Limits("a device", bytes=1e9, flops=None, exponentials=None)


def case(operator: Operator, direction: str) -> Case:
    return Case("shapes", operator, "xla", direction, SHAPES[operator.name])  # type: ignore[arg-type]


def with_factor(operator: Operator, factor: float) -> Operator:
    """An operator whose implementations, but not its reference, are off by a factor."""

    def call(arrays: dict[str, jax.Array], *, implementation: str) -> jax.Array:
        y = operator.call(arrays, implementation=implementation)
        return y if implementation == "reference" else y * factor

    return dataclasses.replace(operator, call=call)


def measured(case: Case) -> Measurement:
    (result,) = measure(prepare((case,)), LIMITS, samples=2, seed=0)
    assert isinstance(result, Measurement)
    return result


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", OPERATORS)
class TestErrors:
    def test_a_right_result_is_right_in_every_output(self, name, direction):
        measurement = measured(case(OPERATORS[name], direction))
        assert measurement.is_right
        assert set(measurement.errors) == ({"y"} if direction == "forward" else set(OPERATORS[name].dims))

    def test_a_wrong_one_is_found_in_a_few_channels_of_a_large_problem_too(self, name, direction, monkeypatch):
        monkeypatch.setattr(prepare_module, "_MAX_CHECKED", 1)
        right = measured(case(OPERATORS[name], direction))
        wrong = measured(case(with_factor(OPERATORS[name], 1.02), direction))
        assert right.is_right
        assert not wrong.is_right
        # The gradients of A, B, weight … are sums over what was left out.
        tokens = {"x", "delta", "z", "lambda_"} & set(OPERATORS[name].dims)
        if name == "trapezoidal_ssd":
            # Its rates are tokens'.
            tokens.add("A")
        assert set(right.errors) == ({"y"} if direction == "forward" else tokens)


def test_a_gradient_that_sums_terms_which_cancel_is_compared_with_the_terms():
    expected = {"delta": np.array([3.0, -3.0, 4.0, -4.0]).reshape(1, 4, 1), "delta_bias": np.zeros(1)}
    outputs = {"delta": jnp.asarray(expected["delta"]), "delta_bias": jnp.full(1, 0.1)}
    problem = types.SimpleNamespace(cases=[case(OPERATORS["ssd"], "backward")], kept={})
    errors = _errors(problem, outputs, expected)  # type: ignore[arg-type]
    assert errors["delta"] == 0
    assert errors["delta_bias"] == pytest.approx(0.1 / np.sqrt(50))


def test_what_is_compared_is_what_was_timed(monkeypatch):
    def time_and_spoil(*arguments, **options):
        timing, y = time_program(*arguments, **options)
        return timing, 1.02 * y

    monkeypatch.setattr("benchmarks.measure.time_program", time_and_spoil)
    assert not measured(case(OPERATORS["causal_conv1d"], "forward")).is_right


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_implementations_get_the_same_inputs_and_one_may_fail(direction):
    one = case(OPERATORS["causal_conv1d"], direction)
    names = ("mosaic_gpu", "xla", "reference")
    problem = prepare(tuple(dataclasses.replace(one, implementation=name) for name in names))
    made = []

    def make(key):
        made.append(problem.make(key))
        return made[-1]

    counted = dataclasses.replace(problem, make=make)  # type: ignore[arg-type]
    kernel, xla, reference = measure(counted, LIMITS, samples=2, seed=0)
    assert len(made) == problem.sets
    assert isinstance(kernel, Failure)
    assert "implementation='mosaic_gpu' cannot run this call" in kernel.reason
    assert isinstance(xla, Measurement)
    assert isinstance(reference, Measurement)
    assert xla.is_right
    assert reference.is_right
    assert xla.errors.keys() == reference.errors.keys()


def test_rates_are_costs_over_time():
    measurement = measured(case(OPERATORS["causal_conv1d"], "forward"))
    bytes_moved = 2 * 2 * 2 * 16 * 24  # x and y, two bytes a number
    np.testing.assert_allclose(measurement.bytes_per_second * measurement.seconds, bytes_moved)
    assert measurement.limit_seconds == bytes_moved / 1e9


def test_the_scarcest_resource_is_the_limit():
    limits = Limits("a device", bytes=10.0, flops=100.0, exponentials=1.0, products=1000.0)
    assert limits.seconds(Costs(bytes=20, flops=100, exponentials=1)) == 2
    assert limits.seconds(Costs(bytes=20, flops=300, exponentials=1)) == 3
    assert limits.seconds(Costs(bytes=20, flops=300, exponentials=4)) == 4
    assert limits.seconds(Costs(bytes=20, flops=30000, exponentials=1, products=2000)) == 2
    assert limits.seconds(Costs(bytes=20, flops=30000, exponentials=1, products=3000)) == 3
    assert Limits("another device", bytes=10.0).seconds(Costs(bytes=20, flops=300, exponentials=4)) == 2
