"""Times the gated norm's kernels with other numbers of blocks and of tokens in shared memory, beside XLA's form.

Run on the GPU to tune for::

    python -m benchmarks.tune_gated_rms_norm --forward large medium long --backward large medium long

How it is timed: ``benchmarks/tuning.py``. The limit is the time that XLA's sum of x and z takes forward, and two sums
of x, z and dy backward: the same bytes, and hardly any work.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from benchmarks.operators import Arrays
from benchmarks.tuning import Sizes, Variant, draw, tune, without_dy
from pallas_kernels.gated_rms_norm import mosaic_gpu, xla
from pallas_kernels.gated_rms_norm.inputs import Inputs

DIMS = ("batch", "length", "heads", "head_dim")
SHAPES = {
    "large": (8, 2048, 80, 64),
    "medium": (8, 2048, 24, 64),
    "long": (1, 131072, 24, 64),
    "short": (1, 2048, 24, 64),
    "wide": (8, 2048, 128, 64),
}
BLOCKS = ("_FORWARD_BLOCKS", "_BACKWARD_BLOCKS")
BLOCKS_PER_SM = (4, 2, 3, 6, 8, 12)
STAGES = (2, 3, 4)
MULTIPROCESSORS = 132
LIMITS = {
    "forward": lambda arrays: arrays["x"] + arrays["z"],
    "backward": lambda arrays: (arrays["x"] + arrays["dy"], arrays["z"] + arrays["x"] * arrays["dy"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", nargs="*", choices=SHAPES, default=(), help="shapes to time the forward pass at")
    parser.add_argument("--backward", nargs="*", choices=SHAPES, default=(), help="shapes to time the backward pass at")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new variants after this time")
    options = parser.parse_args()
    tune(_variants(options), _arrays, time.monotonic() + options.seconds, LIMITS)


def _variants(options: argparse.Namespace) -> Iterator[Variant]:
    for title, names in (("forward", options.forward), ("backward", options.backward)):
        for name in names:
            run = functools.partial(_run, title)
            yield Variant(title, SHAPES[name], "xla", functools.partial(run, xla))
            for stages, blocks in itertools.product(STAGES, BLOCKS_PER_SM):
                kernels = _with_constants(functools.partial(run, mosaic_gpu), stages, blocks)
                yield Variant(title, SHAPES[name], f"stages {stages} blocks {blocks}", kernels)


def _arrays(shape: Sizes, seed: int) -> Arrays:
    return draw("gated_rms_norm", dict(zip(DIMS, shape, strict=True)), seed)


def _run(title: str, implementation: Any, arrays: Arrays) -> Any:
    norm = functools.partial(implementation.gated_rms_norm, groups=1, epsilon=1e-5)
    inputs = Inputs(**without_dy(arrays))
    if title == "forward":
        return norm(inputs)
    # The forward pass is not needed for the gradients of these inputs: the compiler leaves it out.
    return jax.vjp(norm, inputs)[1]((arrays["dy"],))


def _with_constants(run: Callable[[Arrays], Any], stages: int, blocks: int) -> Callable[[Arrays], Any]:
    """The kernels read them when they are traced, which JAX would not do twice by itself."""

    def run_with_constants(arrays: Arrays) -> Any:
        jax.clear_caches()
        with mock.patch.multiple(mosaic_gpu, _STAGES=stages, **dict.fromkeys(BLOCKS, blocks * MULTIPROCESSORS)):
            return run(arrays)

    return run_with_constants


if __name__ == "__main__":
    main()
