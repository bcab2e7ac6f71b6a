"""Times variants of an operator's kernels beside each other, for the scripts that choose their plans and geometries.

Times are the profiler's: from a call's first kernel on the device to its last, the gaps between them included, median
of several calls on inputs that do not fit in the L2 cache.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.operators import OPERATORS, Arrays
from benchmarks.profiler import Kernel, kernels

Sizes = tuple[int, ...]
Make = Callable[[Sizes, int], Arrays]

L2_BYTES = 60e6
"""Somewhat more than a Hopper GPU has."""
_MOST_SETS = 8
_COMPILED_AHEAD = 8
_NAME_LENGTH = 24
"""Enough to tell XLA's fusions apart."""
_AFFIXES = re.compile(rf"^(?:{'|'.join(OPERATORS)})_|_mosaic_gpu_kernel$")


class Variant(NamedTuple):
    """One thing to time."""

    title: str
    """Stands above all variants that are timed beside each other."""
    shape: Sizes
    label: str
    run: Callable[[Arrays], Any]
    """Traced by ``jax.jit``."""
    comparable: bool = True
    """Whether its first result should be that of the first variant under the same title and shape."""


def draw(operator: str, dims: Mapping[str, int], seed: int) -> Arrays:
    """Draws an operator's inputs, and "dy", the gradient of its output."""
    arrays = OPERATORS[operator].make(jax.random.key(seed), dims)
    x = arrays["x"]
    return arrays | {"dy": jax.random.normal(jax.random.key(seed + 1), x.shape, x.dtype)}


def without_dy(arrays: Arrays) -> Arrays:
    """What ``draw`` has drawn as inputs."""
    return {name: array for name, array in arrays.items() if name != "dy"}


def run_script(
    description: str | None,
    shapes: Mapping[str, Sizes],
    timed: Mapping[str, str],
    variants: Callable[[argparse.Namespace], Iterable[Variant]],
    make: Make,
    check: Callable[[], None],
    *,
    seconds: float = 240,
) -> None:
    """Runs a script that takes shapes by their names: parses the command line, checks results, times variants.

    Args:
        description: of the script.
        shapes: that can be named.
        timed: options that take names of shapes, each with what is timed at them.
        variants: returns what to time by the parsed options.
        make: as for ``tune``.
        check: prints errors.
        seconds: after which no new variants are timed, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="compare with the reference in float64")
    for name, what in timed.items():
        parser.add_argument(f"--{name}", nargs="*", choices=shapes, default=(), help=f"shapes to time {what} at")
    parser.add_argument("--seconds", type=float, default=seconds, help="stop starting new variants after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.check:
        check()
    tune(variants(options), make, deadline)


def tune(
    variants: Iterable[Variant],
    make: Make,
    deadline: float,
    limits: Mapping[str, Callable[[Arrays], Any]] | None = None,
) -> None:
    """Times one variant after the other and prints a line for each, while the next ones are compiled.

    Args:
        variants: what to time, those of one title and shape together.
        make: ``make(shape, seed)`` draws what a variant's function is called with.
        deadline: by ``time.monotonic``, after which no new ones are timed.
        limits: by title, a function of the same arrays that no variant is expected to be faster than.
    """
    with contextlib.closing(_compile_ahead(variants, make)) as programs:
        for (title, shape), group in itertools.groupby(programs, lambda pair: (pair[0].title, pair[0].shape)):
            sets = _input_sets(shape, make)
            limit = None
            if limits and title in limits:
                limit = statistics.median(device_times(jax.jit(limits[title]), sets)["span"])
            print(f"== {title} {shape}" + (f", limit {limit:.4f} ms" if limit else ""), flush=True)
            expected = None
            for variant, compiled in group:
                if time.monotonic() > deadline:
                    print("out of time", flush=True)
                    return
                try:
                    program, seconds = compiled.result()
                    result = _first_result(program, sets[0]) if variant.comparable else None
                    times = device_times(program, sets)
                except Exception as problem:
                    print(f"{variant.label:75} failed: {str(problem)[:150]!r}", flush=True)
                    continue
                expected = result if expected is None else expected
                difference = None if result is None or expected is None else _difference(result, expected)
                print(f"{variant.label:75} {_columns(times, limit, difference, seconds)}", flush=True)


def device_times(run: Callable[[Any], Any], sets: Sequence[Any], repeats: int = 12) -> dict[str, list[float]]:
    """Milliseconds on the device: of each kernel by name, and "span" from a call's first kernel to its last.

    Args:
        run: compiled before, or by its first call.
        sets: what it is called with, in turn.
        repeats: how many calls are timed.

    Raises:
        RuntimeError: calls did not run the same number of kernels.
    """
    for arrays in sets:
        jax.block_until_ready(run(arrays))

    def run_all() -> None:
        for i in range(repeats):
            jax.block_until_ready(run(sets[i % len(sets)]))

    return times_by_kernel(kernels(run_all), repeats)


def times_by_kernel(events: Sequence[Kernel], calls: int) -> dict[str, list[float]]:
    """Milliseconds of the kernels of several calls of one function, as ``device_times`` returns them.

    Kernels of less than a microsecond count in the span alone.
    """
    if not events or len(events) % calls:
        raise RuntimeError(f"{len(events)} kernels in {calls} calls")
    times: dict[str, list[float]] = {"span": []}
    for call in itertools.batched(events, len(events) // calls):
        times["span"].append((call[-1].end - call[0].start) / 1e6)
        for start, end, name in call:
            if end - start > 1000:
                times.setdefault(short_name(name), []).append((end - start) / 1e6)
    return times


def short_name(kernel: str) -> str:
    """A kernel's name without its operator's, and short enough for a column."""
    return _AFFIXES.sub("", kernel)[:_NAME_LENGTH]


def _compile_ahead(
    variants: Iterable[Variant], make: Make
) -> Generator[tuple[Variant, Future[tuple[jax.stages.Compiled, float]]]]:
    """Returns every variant with its program, and the seconds that compiling it took beside others."""
    pool = ThreadPoolExecutor(_COMPILED_AHEAD)
    waiting = collections.deque()
    try:
        for variant in variants:
            waiting.append((variant, _compile(pool, variant, make)))
            if len(waiting) > _COMPILED_AHEAD:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile(pool: ThreadPoolExecutor, variant: Variant, make: Make) -> Future[tuple[jax.stages.Compiled, float]]:
    # Tracing is done one after the other: it is Python's.
    try:
        lowered = jax.jit(variant.run).lower(jax.eval_shape(lambda: make(variant.shape, 0)))
    except Exception as problem:
        failed: Future[tuple[jax.stages.Compiled, float]] = Future()
        failed.set_exception(problem)
        return failed

    def compiled() -> tuple[jax.stages.Compiled, float]:
        began = time.monotonic()
        return lowered.compile(), time.monotonic() - began

    return pool.submit(compiled)


def _input_sets(shape: Sizes, make: Make) -> list[Arrays]:
    """Inputs that each have left the L2 cache when their turn comes again."""
    size = sum(array.size * array.dtype.itemsize for array in jax.eval_shape(lambda: make(shape, 0)).values())
    count = min(max(2, math.ceil(3 * L2_BYTES / size)), _MOST_SETS)
    return [jax.jit(make, static_argnums=0)(shape, seed) for seed in range(count)]


def _first_result(program: Callable[[Arrays], Any], arrays: Arrays) -> np.ndarray:
    return np.asarray(jax.tree.leaves(program(arrays))[0], np.float32)


def _difference(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def _columns(
    times: Mapping[str, Sequence[float]], limit: float | None, difference: float | None, compile_seconds: float
) -> str:
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = medians.pop("span")
    columns = [f"{total:8.4f} ms"]
    if limit is not None:
        columns.append(f"{total / limit:6.3f}x")
    if difference is not None:
        columns.append(f"differs by {difference:.1e}")
    columns.append(f"compile {compile_seconds:.1f} s")
    columns.append(f"[{' '.join(f'{name} {median:.4f}' for name, median in medians.items())}]")
    return "  ".join(columns)
