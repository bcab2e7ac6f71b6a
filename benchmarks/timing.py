"""How long the device takes for a call.

A host clock around one call also measures Python, the dispatch, and the wait for the result. So programs of several
calls, each on inputs of its own, are put into the device's queue several times, and then twice as often: the difference
of the times, over the calls, is the device's time for one, for as long as the device is slower than the host. It counts
the gaps between kernels, as a user does, and is the same on every backend.

On a GPU the profiler's time of the kernels alone stands beside it. Where they differ by more than a few microseconds,
the host was the slower one, and a program that gives the device more to do at once would get the shorter time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import profiler

Program = jax.stages.Compiled
"""Takes a list of sets of arguments, and returns a list of results."""

_TARGET_SECONDS = 0.02
"""Time that a sample should take longer for its longer queue."""
MAX_CALLS = 16
"""Of one program: with hundreds, compiling would take longer than measuring."""
FEW_CALLS = 4
"""Of a program whose calls are as long as XLA's own forms of an operator: the host keeps up, and XLA compiles less."""
_MAX_QUEUED_BYTES = 16e9
"""Outputs of queued programs all have their memory at the same time."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and their quartiles."""

    median: float
    lower: float
    upper: float
    samples: int
    calls: int
    """Calls measured, all samples together."""
    kernels: float | None = None
    """Seconds of a call's kernels by the profiler, without the gaps between them; None where there is no GPU."""


def whole_programs(sets: int) -> int:
    """The least number of sets, no fewer than these, that programs of ``FEW_CALLS`` and ``MAX_CALLS`` can share."""
    for calls in (FEW_CALLS, MAX_CALLS):
        if sets > calls:
            sets = -(-sets // calls) * calls
    return sets


def compile_calls(
    function: Callable[..., Any], inputs: tuple[Any, ...], *, sets: int, calls: int = MAX_CALLS
) -> Program:
    """Compiles a function for ``time_program``; needs no device memory for inputs.

    Args:
        function: takes arrays and Nones, returns a tree of arrays.
        inputs: arguments of one call, or their shapes and dtypes.
        sets: how many such sets of arguments there will be. Of more than ``calls`` there must be a multiple.
        calls: most calls of the program.
    """
    # In a jit of its own it is traced and lowered once, however many the calls. XLA inlines it before all else.
    called = jax.jit(function)
    program = jax.jit(lambda group: [called(*inputs) for inputs in group])
    return program.lower([inputs] * min(sets, calls)).compile()


def time_program(program: Program, input_sets: Sequence[tuple[Any, ...]], *, samples: int) -> tuple[Timing, Any]:
    """Times a compiled program.

    Args:
        program: what ``compile_calls`` has made for as many sets.
        input_sets: arguments for one call each. Together they should be several times as large as the device's cache:
            one set after the other, each has left the cache when its turn comes again.
        samples: how many measurements to take the median of.

    Returns:
        The timing, and what the timed program computed from the first set.
    """
    groups = [list(group) for group in itertools.batched(input_sets, len(program.out_info))]

    def run(count: int) -> float:
        began = time.perf_counter()
        outputs = None
        for _ in range(count):
            for group in groups:
                outputs = program(group)
        jax.block_until_ready(outputs)
        return time.perf_counter() - began

    first = program(groups[0])[0]
    run(1)
    once = min(run(1) for _ in range(2))
    output_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.out_info))
    output_bytes *= len(groups)
    room = int(_MAX_QUEUED_BYTES / max(output_bytes, 1))
    queued = max(1, min(math.ceil(_TARGET_SECONDS / once), room // 2))
    calls = queued * len(input_sets)
    # On a busy host the longer queue can be the faster one; a time is never zero, though.
    times = sorted(max(run(2 * queued) - run(queued), 1e-9) / calls for _ in range(samples))
    lower, _, upper = statistics.quantiles(times, n=4) if samples > 1 else (times[0],) * 3
    kernels = None
    if jax.default_backend() == "gpu":
        kernels = sum(kernel.end - kernel.start for kernel in profiler.kernels(lambda: run(queued))) / 1e9 / calls
    return Timing(statistics.median(times), lower, upper, samples, samples * calls, kernels), first


def time_calls(function: Callable[..., Any], input_sets: Sequence[tuple[Any, ...]], *, samples: int = 15) -> Timing:
    """Compiles a function and times it; see ``compile_calls`` and ``time_program``."""
    program = compile_calls(function, input_sets[0], sets=len(input_sets))
    return time_program(program, input_sets, samples=samples)[0]
