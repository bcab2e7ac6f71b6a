"""Times the selective scan's kernels under many geometries, to choose those of ``mosaic_gpu/plan.py``.

Run on the GPU to tune for::

    python benchmarks/tune_selective_scan.py --check --forward large --backward large

Every variant's result is compared with the first one's; how it is timed: ``benchmarks/tuning.py``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accuracy import Drawing, print_errors
from benchmarks.operators import Arrays
from benchmarks.tuning import Sizes, Variant, draw, run_script, without_dy
from pallas_kernels.selective_scan import mosaic_gpu, reference
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.selective_scan.mosaic_gpu import backward, forward, parts, plan
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry
from pallas_kernels.selective_scan.mosaic_gpu.plan import Plan

DIMS = ("batch", "length", "channels", "state")
SHAPES = {
    "large": (8, 2048, 5120, 16),
    "medium": (8, 2048, 1536, 16),
    "small": (1, 2048, 1536, 16),
    "long": (1, 131072, 1536, 16),
}


def main() -> None:
    timed = {"forward": "the forward kernel", "backward": "the backward kernel"}
    run_script(__doc__, SHAPES, timed, _variants, _arrays, check)


def _variants(options: argparse.Namespace) -> Iterator[Variant]:
    for kind, names, plans, make in (
        ("forward", options.forward, forward_plans, _run_forward),
        ("backward", options.backward, backward_plans, _run_backward),
    ):
        for name in names:
            for chosen in plans(SHAPES[name]):
                g = chosen.geometry
                label = f"{g.warpgroups} x {g.tiles} tiles steps {g.steps} unroll {g.unroll} parts {chosen.num_parts}"
                yield Variant(f"{kind} {name}", SHAPES[name], label, make(chosen))


def forward_plans(shape: Sizes) -> Iterator[Plan]:
    """Plans worth timing forward."""
    yield from _plans(shape, plan.forward, steps=(16, 32), unroll=(4, 2))


def backward_plans(shape: Sizes) -> Iterator[Plan]:
    """Plans worth timing backward."""
    yield from _plans(shape, plan.backward, steps=(16,), unroll=(2,))


def _plans(
    shape: Sizes, choose: Callable[..., Plan], steps: tuple[int, ...], unroll: tuple[int, ...]
) -> Iterator[Plan]:
    """The plan in use, and then all that shared memory may have room for."""
    batch, length, channels, state = shape
    yield choose(batch, length, channels, 1, state, 2)
    for options in itertools.product((2, 1, 3, 4, 5), (1, 2, 3, 4, 5, 6), steps, unroll):
        geometry = Geometry(state, **dict(zip(("tiles", "warpgroups", "steps", "unroll"), options, strict=True)))
        if channels % geometry.block_channels:
            continue
        num_blocks = batch * channels // geometry.block_channels
        for num_parts in _part_counts(num_blocks * geometry.warpgroups, length // geometry.steps):
            yield Plan(geometry, num_parts)


def _part_counts(num_blocks: int, num_chunks: int) -> list[int]:
    if num_blocks >= 96:
        return [1]
    return sorted({min(num_chunks // 2, max(1, 132 * waves // num_blocks)) for waves in (1, 2, 3, 4)})


def _arrays(shape: Sizes, seed: int) -> Arrays:
    arrays = draw("selective_scan", dict(zip(DIMS, shape, strict=True)), seed)
    return arrays | {name: arrays[name][:, :, None] for name in ("B", "C")}


def _run_forward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        p, padded = mosaic_gpu._prepare(without_dy(arrays), True, lambda *_: chosen)
        if p.num_parts > 1:
            padded |= parts.summarize(p, padded, reverse=False)
        results = forward.scan(p, padded, save_states=False)
        return results["y"], results["final_state"]

    return run


def _run_backward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        p, padded = mosaic_gpu._prepare(arrays, True, lambda *_: chosen)
        # What the states are does not matter for the time.
        states = p.state_type(p.num_chunks)
        padded["states"] = jnp.full(states.shape, 0.01, states.dtype)
        padded["dfinal_state"] = jnp.zeros(p.state_type().shape)
        if p.num_parts > 1:
            padded |= parts.summarize(p, padded, reverse=True)
        results = backward.scan(p, padded)
        return results.pop("ddelta"), *results.values()

    return run


def check() -> None:
    """Compares values and gradients with the reference in float64 and prints the relative errors."""
    for dtype, shape, groups in (
        ("float32", (2, 1000, 256, 16), 1),
        ("bfloat16", (2, 1000, 256, 16), 1),
        ("float16", (1, 333, 130, 16), 2),
        ("float32", (1, 65, 8, 1), 1),
        ("float32", (1, 2, 130, 64), 1),
        ("bfloat16", (2, 64, 256, 128), 1),
        ("bfloat16", (1, 257, 64, 256), 1),
        ("float32", (1, 2048, 96, 8), 3),
    ):
        batch, length, channels, state = shape
        drawing = Drawing(dtype)
        inputs = Inputs(
            x=drawing.tokens(batch, length, channels),
            delta=drawing.tokens(batch, length, channels),
            A=drawing.decay_rates(channels, state),
            B=drawing.tokens(batch, length, groups, state),
            C=drawing.tokens(batch, length, groups, state),
            D=drawing.floats(channels),
            z=drawing.tokens(batch, length, channels),
            delta_bias=drawing.floats(channels) - 3,
            segment_ids=drawing.segment_ids(batch, length),
            initial_state=drawing.floats(batch, channels, state),
        )
        dy, dfinal_state = drawing.tokens(batch, length, channels), drawing.floats(batch, channels, state)
        label, run, definition = f"{dtype:9} {shape!s:22}", mosaic_gpu.selective_scan, reference.selective_scan
        print_errors(label, run, definition, inputs, (dy, dfinal_state), delta_softplus=True)


if __name__ == "__main__":
    main()
