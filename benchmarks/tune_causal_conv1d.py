"""Times the causal convolution's kernels under many geometries, to choose those of ``mosaic_gpu/geometry.py``.

Run on the GPU to tune for::

    python benchmarks/tune_causal_conv1d.py --forward --backward

Every variant is checked against the first one's result and timed by the profiler: the time its kernels are on the
device, the gaps between them included, median of several calls on inputs that do not fit in the L2 cache. The limit is
the time that a copy of x takes forward, and XLA's sum of x and dy backward: the same bytes, and hardly any work.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tune_selective_scan import L2_BYTES, device_times
from pallas_kernels.batching import Arrays
from pallas_kernels.causal_conv1d import mosaic_gpu
from pallas_kernels.causal_conv1d.mosaic_gpu import geometry, kernels
from pallas_kernels.causal_conv1d.mosaic_gpu.geometry import Geometry

Shape = tuple[int, int, int]

SHAPE = (8, 2048, 5120)
WIDTH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward", action="store_true", help="time the forward kernel")
    parser.add_argument("--backward", action="store_true", help="time the backward kernel")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, help="batch, length, channels")
    parser.add_argument("--all", action="store_true", help="time all geometries, not only those in use")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new variants after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    shape = tuple(options.shape)
    sets = [_arrays(shape, seed) for seed in range(max(2, round(3 * L2_BYTES / (2 * 2 * np.prod(shape)))))]
    variants = lambda choose: _variants(shape, choose, options.all)  # noqa: E731
    if options.forward:
        copy = lambda arrays: (jnp.copy(arrays["x"]),)  # noqa: E731
        _tune("forward", shape, sets, copy, _run_forward, variants(geometry.forward), deadline)
    if options.backward:
        add = lambda arrays: (arrays["x"] + arrays["dy"],)  # noqa: E731
        _tune("backward", shape, sets, add, _run_backward, variants(geometry.backward), deadline)


def _variants(shape: Shape, choose: Callable[[int, int, int], Geometry], every: bool) -> Iterator[Geometry]:
    """The geometry in use, and then others."""
    yield choose(*shape)
    if not every:
        return
    for vector, stretch, steps, stages in itertools.product((4, 8), (128, 64, 32, 256), (8, 4, 16), (4, 3)):
        yield Geometry(vector, steps, stages, stretch // steps, unroll=min(steps, 8))


def _tune(
    title: str,
    shape: Shape,
    sets: list[Arrays],
    limit: Callable[..., Any],
    make: Callable[[Geometry], Callable[..., Any]],
    variants: Iterator[Geometry],
    deadline: float,
) -> None:
    """Times all variants and prints a line for each."""
    least = statistics.median(device_times(jax.jit(limit), sets)["span"])
    print(f"== {title} {shape}, limit {least:.4f} ms", flush=True)
    expected = None
    for g in variants:
        label = f"vector {g.vector} steps {g.steps} stages {g.stages} chunks {g.chunks} unroll {g.unroll}"
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            return
        try:
            run = jax.jit(make(g))
            result = np.asarray(run(sets[0])[0][:1], np.float32)
            if expected is None:
                expected = result
            error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
            times = device_times(run, sets)
        except Exception as problem:
            print(f"{label:50} failed: {str(problem)[:150]!r}", flush=True)
            continue
        total = statistics.median(times.pop("span"))
        detail = " ".join(f"{name} {statistics.median(values):.4f}" for name, values in times.items())
        print(f"{label:50} {total:8.4f} ms {total / least:6.3f}x  error {error:.1e}  [{detail}]", flush=True)


def _arrays(shape: Shape, seed: int) -> Arrays:
    x, dy, weight, bias = jax.random.split(jax.random.key(seed), 4)
    return {
        "x": jax.random.normal(x, shape, jnp.bfloat16),
        "dy": jax.random.normal(dy, shape, jnp.bfloat16),
        "weight": jax.random.normal(weight, (WIDTH, shape[2])),
        "bias": jax.random.normal(bias, shape[2:]),
    }


def _run_forward(chosen: Geometry) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        inputs = {name: array for name, array in arrays.items() if name != "dy"}
        p, padded = mosaic_gpu._prepare(inputs, True, lambda *_: chosen)
        return (kernels.forward(p, padded),)

    return run


def _run_backward(chosen: Geometry) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        p, padded = mosaic_gpu._prepare(arrays, True, lambda *_: chosen)
        results = kernels.backward(p, padded)
        return results["x"], jnp.sum(results["parameters"], axis=(0, 1))

    return run


if __name__ == "__main__":
    main()
