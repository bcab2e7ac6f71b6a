"""Times calls and checks what they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from benchmarks.hardware import Limits
from benchmarks.operators import Arrays, Direction, Shape
from benchmarks.prepare import FAILURES, Problem, Programs
from benchmarks.suites import Call, Case
from benchmarks.timing import Timing, time_program

MAX_ERROR: dict[Direction, float] = {"forward": 5e-3, "backward": 1e-2}
"""Of 16-bit inputs, as ‖out − ref‖ / ‖ref‖."""

_TERMS = {"delta_bias": "delta"}
"""Gradients that are sums of another's numbers, and what these are: a sum may cancel, though its terms err alike, so
its error is compared with their norm."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a case."""

    suite: str
    operator: str
    implementation: str
    direction: Direction
    shape: Shape

    @property
    def call(self) -> Call:
        """The case's."""
        return self.operator, self.implementation, self.direction, frozenset(self.shape.items())


@dataclasses.dataclass(frozen=True)
class Measurement(Result):
    """What was measured of a case, and what that means."""

    timing: Timing
    bytes_per_second: float
    flops_per_second: float
    exponentials_per_second: float
    limit_seconds: float
    """Least time by what is counted."""
    errors: dict[str, float]
    """By output: distance from the float64 reference over its norm, or, for the gradient of delta_bias, over that of
    the gradient of delta, which it sums; empty where there is no reference."""

    @property
    def seconds(self) -> float:
        return self.timing.median

    @property
    def is_right(self) -> bool:
        return all(error <= MAX_ERROR[self.direction] for error in self.errors.values())


@dataclasses.dataclass(frozen=True)
class Failure(Result):
    """Why a case has no measurement."""

    reason: str

    def __str__(self) -> str:
        shape = ", ".join(f"{dim} {size}" for dim, size in self.shape.items())
        return f"{self.operator} {self.direction} by {self.implementation}, {shape}: {self.reason}"


def measure(problem: Problem, limits: Limits, *, samples: int, seed: int) -> Iterator[Measurement | Failure]:
    """Measures a problem's cases on random inputs, which are the same for the same seed, in order."""
    inputs = None
    for case in problem.cases:
        try:
            if peers.is_peer(case.implementation):
                # Its tensors need the room.
                inputs = None
                timing, errors = peers.time_peer(case.operator.name, case.direction, case.shape, samples=samples), {}
            else:
                programs = problem.programs[case.implementation]
                if isinstance(programs, Exception):
                    yield fail(case, programs)
                    continue
                inputs = inputs or _Inputs.draw(problem, seed)
                timing, errors = _measure(problem, programs, inputs, samples=samples)
        except FAILURES as error:
            yield fail(case, error)
        else:
            yield _judge(case, timing, limits, errors)


def fail(case: Case, error: Exception) -> Failure:
    """Says why a case has no measurement."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return Failure(case.suite, case.operator.name, case.implementation, case.direction, case.shape, reason)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What all implementations of a problem are called with, and what they should return."""

    sets: list[Arrays]
    gradients: list[jax.Array] | None
    """Of the output, one for each set; None where the forward pass is timed."""
    expected: dict[str, np.ndarray]
    """Of the first set, cut; empty where there is no reference."""

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> _Inputs:
        sets = [problem.make(key) for key in jax.random.split(jax.random.key(seed), problem.sets)]
        gradients = None
        if problem.gradient is not None:
            gradients = [problem.gradient(jax.random.key(i)) for i in range(problem.sets)]
        return cls(sets, gradients, _expected(problem, sets[0], None if gradients is None else gradients[0]))


def _expected(problem: Problem, arrays: Arrays, dy: jax.Array | None) -> dict[str, np.ndarray]:
    if problem.reference is None:
        return {}
    operator = problem.cases[0].operator
    arguments: list[Any] = [{name: _cut(array, operator.dims[name], problem.kept) for name, array in arrays.items()}]
    if dy is not None:
        arguments.append(_cut(dy, operator.output_dims, problem.kept))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return {name: np.asarray(array) for name, array in problem.reference(*arguments).items()}


def _measure(problem: Problem, programs: Programs, inputs: _Inputs, *, samples: int) -> tuple[Timing, dict[str, float]]:
    if programs.forward is None or inputs.gradients is None:
        calls: list[tuple[Any, ...]] = [(arrays,) for arrays in inputs.sets]
    else:
        starts = [programs.forward(arrays) for arrays in inputs.sets]
        calls = list(zip(starts, inputs.gradients, strict=True))
    timing, outputs = time_program(programs.timed, calls, samples=samples)
    if inputs.gradients is None:
        outputs = {"y": outputs}
    return timing, _errors(problem, outputs, inputs.expected)


def _judge(case: Case, timing: Timing, limits: Limits, errors: dict[str, float]) -> Measurement:
    costs = case.operator.costs(case.shape, case.direction)
    return Measurement(
        case.suite,
        case.operator.name,
        case.implementation,
        case.direction,
        case.shape,
        timing,
        costs.bytes / timing.median,
        costs.flops / timing.median,
        costs.exponentials / timing.median,
        limits.seconds(costs),
        errors,
    )


def _errors(problem: Problem, outputs: Arrays, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Compares what was computed while timing with the reference, but for gradients that are sums over what was cut."""
    operator = problem.cases[0].operator
    errors = {}
    for name, want in expected.items():
        dims = operator.dims.get(name, operator.output_dims)
        if set(problem.kept) <= set(dims):
            difference = np.linalg.norm(_cut(outputs[name], dims, problem.kept) - want)
            errors[name] = float(difference / np.linalg.norm(expected[_TERMS.get(name, name)]))
    return errors


def _cut(array: jax.Array, dims: tuple[str, ...], kept: Mapping[str, int]) -> np.ndarray:
    return np.asarray(array[tuple(slice(kept.get(dim)) for dim in dims)]).astype(np.float64)
