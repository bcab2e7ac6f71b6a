"""Times the causal convolution's kernels under many geometries, to choose those of ``mosaic_gpu/geometry.py``.

Run on the GPU to tune for::

    python benchmarks/tune_causal_conv1d.py --forward --backward

Every variant's result is compared with the first one's; how it is timed: ``benchmarks/tuning.py``. The limit is the
time that a copy of x takes forward, and XLA's sum of x and dy backward: the same bytes, and hardly any work.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.operators import Arrays
from benchmarks.tuning import Sizes, Variant, draw, tune, without_dy
from pallas_kernels.causal_conv1d import mosaic_gpu
from pallas_kernels.causal_conv1d.mosaic_gpu import geometry, kernels
from pallas_kernels.causal_conv1d.mosaic_gpu.geometry import Geometry

DIMS = ("batch", "length", "channels")
SHAPE = (8, 2048, 5120)
WIDTH = 4
LIMITS = {"forward": lambda arrays: jnp.copy(arrays["x"]), "backward": lambda arrays: arrays["x"] + arrays["dy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward", action="store_true", help="time the forward kernel")
    parser.add_argument("--backward", action="store_true", help="time the backward kernel")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, help="batch, length, channels")
    parser.add_argument("--all", action="store_true", help="time all geometries, not only those in use")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new variants after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    tune(_variants(options), _arrays, deadline, LIMITS)


def _variants(options: argparse.Namespace) -> Iterator[Variant]:
    shape = tuple(options.shape)
    for kind, wanted, choose, make in (
        ("forward", options.forward, geometry.forward, _run_forward),
        ("backward", options.backward, geometry.backward, _run_backward),
    ):
        for g in _geometries(shape, choose, options.all) if wanted else ():
            label = f"vector {g.vector} steps {g.steps} stages {g.stages} chunks {g.chunks} unroll {g.unroll}"
            yield Variant(kind, shape, label, make(g))


def _geometries(shape: Sizes, choose: Callable[[int, int, int], Geometry], every: bool) -> Iterator[Geometry]:
    """The geometry in use, and then others."""
    yield choose(*shape)
    if not every:
        return
    for vector, stretch, steps, stages in itertools.product((4, 8), (128, 64, 32, 256), (8, 4, 16), (4, 3)):
        yield Geometry(vector, steps, stages, stretch // steps, unroll=min(steps, 8))


def _arrays(shape: Sizes, seed: int) -> Arrays:
    return draw("causal_conv1d", dict(zip(DIMS, shape, strict=True)) | {"width": WIDTH}, seed)


def _run_forward(chosen: Geometry) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        p, padded = mosaic_gpu._prepare(without_dy(arrays), True, lambda *_: chosen)
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
