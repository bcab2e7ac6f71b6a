"""Times the SSD operator's kernels under many plans, to choose those of ``mosaic_gpu/plan.py``.

Run on the GPU to tune for::

    python benchmarks/tune_ssd.py --check --forward large --backward large

Every plan's result is compared with the first one's; how it is timed: ``benchmarks/tuning.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accuracy import Drawing, print_errors
from benchmarks.operators import Arrays
from benchmarks.tuning import Sizes, Variant, draw, run_script, without_dy
from pallas_kernels.ssd import mosaic_gpu, reference
from pallas_kernels.ssd.inputs import Inputs
from pallas_kernels.ssd.mosaic_gpu import plan
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK
from pallas_kernels.ssd.mosaic_gpu.call import Call
from pallas_kernels.ssd.mosaic_gpu.plan import Plan

DIMS = ("batch", "length", "heads", "head_dim", "groups", "state")
SHAPES = {
    "large": (8, 2048, 80, 64, 1, 128),
    "medium": (8, 2048, 24, 64, 1, 128),
    "long": (1, 131072, 24, 64, 1, 128),
    "wide": (8, 2048, 24, 64, 1, 256),
}
OPTIONS = {"delta_softplus": True, "delta_limit": (0.0, math.inf), "chunk_size": None}


def main() -> None:
    timed = {
        "whole": "the operator, as it is called,",
        "forward": "the forward pass's plans",
        "backward": "the backward pass's plans",
    }
    run_script(__doc__, SHAPES, timed, _variants, _arrays, check)


def _variants(options: argparse.Namespace) -> Iterator[Variant]:
    for name in options.whole:
        for label, run in _WHOLE.items():
            yield Variant("whole", SHAPES[name], label, run, comparable=False)
    for kind, names, plans, make in (
        ("forward", options.forward, forward_plans, _run_forward),
        ("backward", options.backward, backward_plans, _run_backward),
    ):
        for name in names:
            for chosen in plans(SHAPES[name]):
                label = " ".join(f"{field} {value}" for field, value in dataclasses.asdict(chosen).items())
                yield Variant(kind, SHAPES[name], label, make(chosen))


def _default(shape: Sizes) -> Plan:
    batch, length, heads, _, groups, state = shape
    return plan.choose(batch, length // CHUNK, heads, groups, state)


def forward_plans(shape: Sizes) -> Iterator[Plan]:
    """Plans worth timing forward."""
    default = _default(shape)
    for walk in [(2, 3), (2, 2), (1, 3)]:
        yield dataclasses.replace(default, forward=walk)
    if default.parts == 1:
        return
    for parts, walk in [(11, (1, 4)), (22, (2, 3)), (22, (3, 3))]:
        yield dataclasses.replace(default, parts=parts, states=walk)


def backward_plans(shape: Sizes) -> Iterator[Plan]:
    """Plans worth timing backward."""
    default = _default(shape)
    for walk in [(3, 3), (2, 3), (1, 4)]:
        yield dataclasses.replace(default, states=walk)
    for stages, splits in [(3, 1), (2, 2)]:
        yield dataclasses.replace(default, stages=stages, splits=splits)
    if default.parts > 1:
        for parts, walk in [(11, (1, 4)), (22, (2, 3)), (22, (3, 3))]:
            yield dataclasses.replace(default, parts=parts, states=walk)


def _whole_forward(arrays: Arrays) -> Any:
    return mosaic_gpu.ssd(Inputs(**without_dy(arrays)), **OPTIONS)


def _whole_gradient(arrays: Arrays) -> Any:
    _, vjp = jax.vjp(lambda inputs: mosaic_gpu.ssd(Inputs(**inputs), **OPTIONS)[0], without_dy(arrays))
    return vjp(arrays["dy"])


_WHOLE = {"forward": _whole_forward, "forward and backward": _whole_gradient}


def _arrays(shape: Sizes, seed: int) -> Arrays:
    arrays = draw("ssd", dict(zip(DIMS, shape, strict=True)), seed)
    return arrays | {"D": jnp.broadcast_to(arrays["D"][:, None], arrays["x"].shape[2:])}


def _canonical(arrays: Arrays) -> Arrays:
    """The arrays that the passes take."""
    inputs = Inputs(**without_dy(arrays))
    delta = inputs.step_sizes(delta_softplus=True, delta_limit=(0.0, math.inf))
    kept = {name: arrays[name] for name in ("x", "B", "C", "D")}
    return kept | {"delta": delta, "log_decay": delta * inputs.A}


def _run_forward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        arrays = _canonical(arrays)
        results = mosaic_gpu.forward_pass(Call(arrays, chosen), arrays, save_states=False)
        return results["y"], results["final_state"]

    return run


def _run_backward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: Arrays) -> tuple[jax.Array, ...]:
        dy, arrays = arrays["dy"], _canonical(arrays)
        call = Call(arrays, chosen)
        problem = call.problem(chosen.states)
        # What the states are does not matter for the time.
        states = problem.states_type(jnp.bfloat16)
        arrays["states"] = jnp.full(states.shape, 0.01, states.dtype)
        arrays["dfinal_state"] = jnp.zeros((*arrays["x"].shape[::2], *arrays["x"].shape[3:], arrays["B"].shape[3]))
        results = mosaic_gpu.backward_pass(call, arrays | {"dy": dy})
        return results.pop("delta"), *results.values()

    return run


def check() -> None:
    """Compares values and gradients with the reference in float64 and prints the relative errors."""
    for shape in (
        (2, 1000, 16, 64, 1, 128),
        (1, 333, 6, 32, 2, 16),
        (1, 65, 8, 128, 1, 64),
        (2, 64, 4, 64, 4, 256),
        (1, 4097, 24, 64, 1, 128),
    ):
        batch, length, heads, head_dim, groups, state = shape
        drawing = Drawing()
        inputs = Inputs(
            x=drawing.tokens(batch, length, heads, head_dim),
            delta=drawing.tokens(batch, length, heads),
            A=drawing.decay_rates(heads),
            B=drawing.tokens(batch, length, groups, state),
            C=drawing.tokens(batch, length, groups, state),
            D=drawing.floats(heads, head_dim),
            z=drawing.tokens(batch, length, heads, head_dim),
            delta_bias=drawing.floats(heads) - 3,
            segment_ids=drawing.segment_ids(batch, length),
            initial_state=drawing.floats(batch, heads, head_dim, state),
        )
        dy, dfinal_state = drawing.tokens(batch, length, heads, head_dim), drawing.floats(batch, heads, head_dim, state)
        print_errors(f"{shape!s:28}", mosaic_gpu.ssd, reference.ssd, inputs, (dy, dfinal_state), **OPTIONS)


if __name__ == "__main__":
    main()
