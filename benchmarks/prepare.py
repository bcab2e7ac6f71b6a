"""Compiles what cases run, before any of it is timed.

It takes most of a benchmark's time, the selective scan out of XLA operations the longest, backward. XLA compiles
without Python's lock, so the programs of many cases are compiled side by side. Nothing compiles while the device is
timed, because the host's clock is part of the measurement. Compiling needs shapes only, no inputs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.operators import DTYPE, Arrays, Operator
from benchmarks.suites import Case
from benchmarks.timing import FEW_CALLS, MAX_CALLS, Program, compile_calls, whole_programs

_MIN_ROTATED_BYTES = 256e6
"""Inputs of all sets together: several times the 60 MB of an H200's cache."""
_MAX_CHECKED = 1 << 18
"""Tokens times channels that are compared with the reference; of a larger problem, a few channels."""
_CHECKED_CHANNELS = 8
_CHECKED_TOKENS = 16
_REFERENCE_CHUNK = 256
_PROGRESS_SECONDS = 20

# JAX's own, of which lacking memory is one, UnsupportedError, and what cuDNN's checks of its arguments raise.
FAILURES = (RuntimeError, ValueError)
"""What one case may fail with and the others go on."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What one implementation runs."""

    forward: Program | None
    """Makes of the inputs what a backward pass starts from; None where the forward pass is timed."""
    timed: Program


@dataclasses.dataclass(frozen=True)
class Problem:
    """Cases that differ in their implementations only: these get the same inputs and are held to the same result."""

    cases: tuple[Case, ...]
    sets: int
    """Sets of inputs, so many that none is in the device's cache when its turn comes."""
    make: Program
    """Draws the inputs from a random key."""
    gradient: Program | None
    """Draws the output's gradient from a random key, for the backward pass."""
    kept: dict[str, int]
    """Sizes, by dimension, that results are cut to before they are compared; dimensions not named are whole."""
    reference: Program | None
    """Computes the cut results from the cut inputs, and the cut gradient of the output, in float64 on a CPU."""
    programs: dict[str, Programs | Exception]
    """By implementation; the reason where it does not compile."""


def problems(cases: Sequence[Case]) -> list[tuple[Case, ...]]:
    """Groups cases that follow each other and differ in their implementations only."""
    return [
        tuple(group) for _, group in itertools.groupby(cases, lambda case: dataclasses.replace(case, implementation=""))
    ]


def prepare(cases: tuple[Case, ...]) -> Problem:
    """Compiles the programs of one problem's cases, but for those of CUDA packages.

    Raises:
        RuntimeError or ValueError: what all of them need does not compile.
    """
    operator, shape = cases[0].operator, cases[0].shape
    key = jax.random.key(0)
    make = jax.jit(lambda key: operator.make(key, shape)).lower(key).compile()
    arrays = make.out_info
    set_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    sets = max(2, math.ceil(_MIN_ROTATED_BYTES / set_bytes)) if jax.default_backend() == "gpu" else 2
    sets = whole_programs(sets)
    gradient = None
    if cases[0].direction == "backward":
        dims = [operator.sizes(arrays)[dim] for dim in operator.output_dims]
        gradient = jax.jit(lambda key: jax.random.normal(key, dims, DTYPE)).lower(key).compile()
    dy = None if gradient is None else gradient.out_info
    kept = _kept(operator, arrays)
    reference = _compile_reference(operator, arrays, dy, kept) if operator.has_reference else None
    own = [case.implementation for case in cases if not peers.is_peer(case.implementation)]
    programs = {name: _compile(name, operator, arrays, dy, sets) for name in own}
    return Problem(cases, sets, make, gradient, kept, reference, programs)


def prepare_all(groups: Sequence[tuple[Case, ...]], on_progress: Callable[[int], None]) -> list[Problem | Exception]:
    """Compiles the programs of many problems side by side.

    Args:
        groups: the cases of a problem each.
        on_progress: is called with how many problems are compiled, every now and then.

    Returns:
        The problems, with an exception in the place of one where what all its cases need does not compile.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        futures = [pool.submit(_try, prepare, group) for group in groups]
        waiting = set(futures)
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, _PROGRESS_SECONDS, concurrent.futures.FIRST_EXCEPTION)
            for future in finished:
                future.result()
            if waiting:
                on_progress(len(futures) - len(waiting))
    finally:
        # After an interruption no thread begins what is left.
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def _try(compile: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return compile(*arguments)
    except FAILURES as error:
        return error


def _compile(implementation: str, operator: Operator, arrays: Any, dy: Any, sets: int) -> Programs | Exception:
    """Compiles an implementation's programs for inputs, and the output's gradient or None, of these shapes."""
    forward = functools.partial(operator.call, implementation=implementation)
    counts = {"sets": sets, "calls": FEW_CALLS if implementation == "xla" else MAX_CALLS}
    if dy is None:
        return _try(lambda: Programs(None, compile_calls(forward, (arrays,), **counts)))

    def compile_backward() -> Programs:
        start = jax.jit(lambda arrays: jax.vjp(forward, arrays)[1]).lower(arrays).compile()
        return Programs(start, compile_calls(_apply, (start.out_info, dy), **counts))

    return _try(compile_backward)


def _apply(transpose: Callable[[jax.Array], Any], dy: jax.Array) -> Any:
    return transpose(dy)[0]


def _kept(operator: Operator, arrays: Any) -> dict[str, int]:
    """Of a large problem, the first row and its first channels, heads or tokens."""
    if not operator.has_reference or math.prod(arrays["x"].shape) <= _MAX_CHECKED:
        return {}
    sizes = operator.sizes(arrays)
    few = _CHECKED_TOKENS
    if operator.independent_dim != "length":
        few = max(1, _CHECKED_CHANNELS // sizes.get("head_dim", 1))
    return {dim: n for dim, n in {"batch": 1, operator.independent_dim: few}.items() if n < sizes[dim]}


def _reference(operator: Operator, arrays: Arrays) -> jax.Array:
    """Runs an operator's reference in chunks: it keeps every state for the backward pass, here of one chunk at a time.

    Of 131,072 tokens with 64 × 128 numbers of state each they would be 8.6 GB.
    """
    call = functools.partial(operator.call, implementation="reference")
    batch, length, *_ = arrays["x"].shape
    if length % _REFERENCE_CHUNK or operator.independent_dim == "length":
        return call(arrays)
    tokens = {name: array for name, array in arrays.items() if "length" in operator.dims[name]}
    shared = {name: array for name, array in arrays.items() if name not in tokens}

    @jax.checkpoint
    def run(state: Any, chunk: Arrays) -> tuple[Any, jax.Array]:
        return call({**shared, **chunk}, initial_state=state, return_final_state=True)[::-1]

    def cut(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(batch, -1, _REFERENCE_CHUNK, *array.shape[2:]), 1, 0)

    _, state = jax.eval_shape(lambda: call(arrays, return_final_state=True))
    state = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), state)
    _, y = jax.lax.scan(run, state, jax.tree.map(cut, tokens))
    return jnp.moveaxis(y, 0, 1).reshape(arrays["x"].shape)


def _compile_reference(operator: Operator, arrays: Any, dy: Any, kept: dict[str, int]) -> Program:
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

    def cut(array: Any, dims: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        sizes = [kept.get(dim, size) for dim, size in zip(dims, array.shape, strict=True)]
        return jax.ShapeDtypeStruct(sizes, jnp.float64, sharding=cpu)

    reference = functools.partial(_reference, operator)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        few = {name: cut(array, operator.dims[name]) for name, array in arrays.items()}
        if dy is None:
            return jax.jit(lambda arrays: {"y": reference(arrays)}).lower(few).compile()
        backward = jax.jit(lambda arrays, dy: jax.vjp(reference, arrays)[1](dy)[0])
        return backward.lower(few, cut(dy, operator.output_dims)).compile()
