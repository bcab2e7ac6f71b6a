"""Times one call and checks what it computes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.hardware import Limits
from benchmarks.operators import Arrays, Direction, Operator, Shape
from benchmarks.suites import Case
from benchmarks.timing import MAX_CALLS, Timing, time_calls

_MIN_ROTATED_BYTES = 256e6
"""Inputs of all sets together: several times the 60 MB of an H200's cache."""
_MAX_CHECKED = 1 << 18
"""Tokens times channels that are compared with the reference; of a larger problem, a few channels."""
_CHECKED_CHANNELS = 8
MAX_ERROR: dict[Direction, float] = {"forward": 5e-3, "backward": 1e-2}
"""Of 16-bit inputs, as ‖out − ref‖ / ‖ref‖."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of a case, and what that means."""

    suite: str
    operator: str
    implementation: str
    direction: Direction
    shape: Shape
    timing: Timing
    bytes_per_second: float
    flops_per_second: float
    exponentials_per_second: float
    limit_seconds: float | None
    """Least time by what is counted; None where another unit than the counted ones does the work."""
    errors: dict[str, float]
    """By output: distance from the float64 reference over its norm; empty where there is no reference."""

    @property
    def seconds(self) -> float:
        return self.timing.median

    @property
    def is_right(self) -> bool:
        return all(error <= MAX_ERROR[self.direction] for error in self.errors.values())


def measure(case: Case, limits: Limits, *, samples: int, seed: int = 0) -> Measurement:
    """Measures a case on random inputs, which are the same for the same seed."""
    operator = case.operator
    set_bytes = _bytes(jax.eval_shape(lambda: operator.make(jax.random.key(0), case.shape)))
    count = max(2, math.ceil(_MIN_ROTATED_BYTES / set_bytes)) if jax.default_backend() == "gpu" else 2
    if count > MAX_CALLS:
        count = -(-count // MAX_CALLS) * MAX_CALLS
    make = jax.jit(lambda key: operator.make(key, case.shape))
    sets = [make(key) for key in jax.random.split(jax.random.key(seed), count)]

    forward = functools.partial(operator.call, implementation=case.implementation)
    if case.direction == "forward":
        function: Callable[..., Any] = forward
        calls = [(arrays,) for arrays in sets]
        dy = None
    else:
        function = _apply
        calls, dy = _backward_calls(forward, sets)
    timing = time_calls(function, calls, samples=samples)

    errors = {}
    if operator.has_reference:
        outputs = jax.jit(function)(*calls[0])
        outputs = {"y": outputs} if case.direction == "forward" else outputs[0]
        errors = _errors(operator, sets[0], dy, outputs)
    return _judge(case, case.implementation, timing, limits, errors)


def measure_peer(case: Case, limits: Limits, *, samples: int) -> list[Measurement]:
    """Measures the same call of a CUDA package, where one is installed."""
    package = peers.package(case.operator)
    if package is None:
        return []
    return [_judge(case, package, peers.time_peer(case, samples=samples), limits, {})]


def _judge(case: Case, implementation: str, timing: Timing, limits: Limits, errors: dict[str, float]) -> Measurement:
    costs = case.operator.costs(case.shape, case.direction)
    return Measurement(
        case.suite,
        case.operator.name,
        implementation,
        case.direction,
        case.shape,
        timing,
        costs.bytes / timing.median,
        costs.flops / timing.median,
        costs.exponentials / timing.median,
        limits.seconds(costs) if case.operator.has_reference else None,
        errors,
    )


def _bytes(arrays: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _apply(transpose: Callable[[jax.Array], Any], dy: jax.Array) -> Any:
    return transpose(dy)


def _backward_calls(forward: Callable[..., jax.Array], sets: list[Arrays]) -> tuple[list[Any], jax.Array]:
    """Runs the forward passes; returns what the backward ones start from, and the first output's gradient."""
    run = jax.jit(functools.partial(jax.vjp, forward))
    calls = []
    for i, arrays in enumerate(sets):
        y, transpose = run(arrays)
        calls.append((transpose, jax.random.normal(jax.random.key(i), y.shape, y.dtype)))
    return calls, calls[0][1]


def _errors(operator: Operator, arrays: Arrays, dy: jax.Array | None, outputs: Arrays) -> dict[str, float]:
    """Compares outputs, or gradients where there is ``dy``, with the reference in float64 on a CPU.

    Of a large problem only the first row's first channels or heads are compared, and no gradients that are sums over
    others.
    """
    sizes = operator.sizes(arrays)
    kept = {}
    if arrays["x"].size > _MAX_CHECKED:
        few_channels = max(1, _CHECKED_CHANNELS // sizes.get("head_dim", 1))
        kept = {dim: n for dim, n in {"batch": 1, operator.independent_dim: few_channels}.items() if n < sizes[dim]}

    def cut(array: jax.Array, dims: tuple[str, ...]) -> np.ndarray:
        return np.asarray(array[tuple(slice(kept.get(dim)) for dim in dims)]).astype(np.float64)

    few = {name: cut(array, operator.dims[name]) for name, array in arrays.items()}
    reference = functools.partial(operator.call, implementation="reference")
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        few = jax.tree.map(jnp.asarray, few)
        if dy is None:
            wanted = {"y": jax.jit(reference)(few)}
        else:
            backward = jax.jit(lambda arrays, dy: jax.vjp(reference, arrays)[1](dy)[0])
            wanted = backward(few, jnp.asarray(cut(dy, operator.output_dims)))
        wanted = {name: np.asarray(array) for name, array in wanted.items()}
    errors = {}
    for name, want in wanted.items():
        dims = operator.dims.get(name, operator.output_dims)
        if set(kept) <= set(dims):
            difference = np.linalg.norm(cut(outputs[name], dims) - want)
            errors[name] = float(difference / np.linalg.norm(want))
    return errors
