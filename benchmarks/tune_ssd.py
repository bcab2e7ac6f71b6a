"""Times the SSD operator's kernels under many plans, to choose those of ``mosaic_gpu/plan.py``.

Run on the GPU to tune for::

    python benchmarks/tune_ssd.py --check --forward --backward

Every variant's result is compared with the first one's, and it is timed by the profiler: the time its kernels are on
the device, the gaps between them included, median of several calls on inputs that do not fit in the L2 cache.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tune_selective_scan import L2_BYTES, device_times, relative_errors
from pallas_kernels.ssd import mosaic_gpu, reference
from pallas_kernels.ssd.inputs import Inputs
from pallas_kernels.ssd.mosaic_gpu import plan
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK
from pallas_kernels.ssd.mosaic_gpu.call import Call
from pallas_kernels.ssd.mosaic_gpu.plan import Plan

SHAPES = {
    "large": (8, 2048, 80, 64, 1, 128),
    "medium": (8, 2048, 24, 64, 1, 128),
    "long": (1, 131072, 24, 64, 1, 128),
}
"""(batch, length, heads, head_dim, groups, state)"""
OPTIONS = {"delta_softplus": True, "delta_limit": (0.0, math.inf), "chunk_size": None}

Shape = tuple[int, int, int, int, int, int]


class Variant(NamedTuple):
    """One thing to time."""

    title: str
    shape: Shape
    label: str
    run: Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the reference in float64")
    parser.add_argument("--whole", nargs="*", choices=SHAPES, help="shapes to time the operator at, as it is called")
    parser.add_argument("--forward", nargs="*", choices=SHAPES, help="shapes to time the forward pass's plans at")
    parser.add_argument("--backward", nargs="*", choices=SHAPES, help="shapes to time the backward pass's plans at")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new variants after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.check:
        check()
    variants = []
    for name in options.whole or ():
        variants += [Variant("whole", SHAPES[name], label, run) for label, run in _WHOLE.items()]
    for kind, names, plans, make in (
        ("forward", options.forward, forward_plans, _run_forward),
        ("backward", options.backward, backward_plans, _run_backward),
    ):
        for name in names or ():
            for chosen in plans(SHAPES[name]):
                label = " ".join(f"{field} {value}" for field, value in dataclasses.asdict(chosen).items())
                variants.append(Variant(kind, SHAPES[name], label, make(chosen)))
    tune(variants, deadline, _arrays)


def _default(shape: Shape) -> Plan:
    batch, length, heads, _, groups, state = shape
    return plan.choose(batch, length // CHUNK, heads, groups, state)


def forward_plans(shape: Shape) -> Iterator[Plan]:
    """Plans worth timing forward."""
    default = _default(shape)
    for walk in [(2, 3), (2, 2), (1, 3)]:
        yield dataclasses.replace(default, forward=walk)
    if default.parts == 1:
        return
    for parts, walk in [(11, (1, 4)), (22, (2, 3)), (22, (3, 3))]:
        yield dataclasses.replace(default, parts=parts, states=walk)


def backward_plans(shape: Shape) -> Iterator[Plan]:
    """Plans worth timing backward."""
    default = _default(shape)
    for walk in [(3, 3), (2, 3), (1, 4)]:
        yield dataclasses.replace(default, states=walk)
    for stages, splits in [(3, 1), (2, 2)]:
        yield dataclasses.replace(default, stages=stages, splits=splits)
    if default.parts > 1:
        for parts, walk in [(11, (1, 4)), (22, (2, 3)), (22, (3, 3))]:
            yield dataclasses.replace(default, parts=parts, states=walk)


def tune(variants: list[Variant], deadline: float, make: Callable[[Shape, int], dict[str, jax.Array]]) -> None:
    """Compiles all variants, many at a time, then times one after the other and prints a line for each.

    Args:
        variants: what to time.
        deadline: by ``time.monotonic``, after which no new ones are started.
        make: ``make(shape, seed)`` draws what a variant's function is called with.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = []
        for variant in variants:
            # Tracing is done one after the other: it is Python's.
            try:
                lowered = jax.jit(variant.run).lower(jax.eval_shape(lambda shape=variant.shape: make(shape, 0)))
            except Exception as problem:
                compiled.append(problem)
            else:
                compiled.append(pool.submit(lowered.compile))
        shown, expected = None, None
        for variant, program in zip(variants, compiled, strict=True):
            if time.monotonic() > deadline:
                print("out of time", flush=True)
                pool.shutdown(wait=False, cancel_futures=True)
                return
            if (variant.title, variant.shape) != shown:
                print(f"== {variant.title} {variant.shape}", flush=True)
                if shown is None or variant.shape != shown[1]:
                    sets = _input_sets(variant.shape, make)
                shown, expected = (variant.title, variant.shape), None
            try:
                if isinstance(program, Exception):
                    raise program
                run = program.result()
                result = np.asarray(jax.tree.leaves(run(sets[0]))[0], np.float32)
                times = device_times(run, sets)
            except Exception as problem:
                print(f"{variant.label:75} failed: {str(problem)[:150]!r}", flush=True)
                continue
            remark = ""
            if variant.title != "whole":
                expected = result if expected is None else expected
                remark = f"differs by {np.linalg.norm(result - expected) / np.linalg.norm(expected):.0e}"
            _print_times(variant.label, times, remark)


def _print_times(label: str, times: dict[str, list[float]], remark: str) -> None:
    total = statistics.median(times.pop("span"))
    detail = " ".join(f"{name} {statistics.median(values):.3f}" for name, values in times.items())
    print(f"{label:75} {total:8.4f} ms  {remark}  [{detail}]", flush=True)


def _whole_forward(arrays: dict[str, jax.Array]) -> Any:
    return mosaic_gpu.ssd(Inputs(**{name: array for name, array in arrays.items() if name != "dy"}), **OPTIONS)


def _whole_gradient(arrays: dict[str, jax.Array]) -> Any:
    inputs = {name: array for name, array in arrays.items() if name != "dy"}
    _, vjp = jax.vjp(lambda inputs: mosaic_gpu.ssd(Inputs(**inputs), **OPTIONS)[0], inputs)
    return vjp(arrays["dy"])


_WHOLE = {"forward": _whole_forward, "forward and backward": _whole_gradient}


def _input_sets(shape: Shape, make: Callable[[Shape, int], dict[str, jax.Array]]) -> list[dict[str, jax.Array]]:
    batch, length, heads, head_dim, _, _ = shape
    count = max(1, round(3 * L2_BYTES / (batch * length * heads * head_dim * 2 * 2)))
    return [make(shape, seed) for seed in range(min(count, 8))]


@functools.partial(jax.jit, static_argnums=0)
def _arrays(shape: Shape, seed: int) -> dict[str, jax.Array]:
    batch, length, heads, head_dim, groups, state = shape
    keys = iter(jax.random.split(jax.random.key(seed), 12))

    def normal(*dims: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), dims, dtype)

    return {
        "x": normal(batch, length, heads, head_dim),
        "delta": normal(batch, length, heads),
        "A": -jax.random.uniform(next(keys), (heads,), minval=1.0, maxval=16.0),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": jnp.broadcast_to(normal(heads, 1, dtype=jnp.float32), (heads, head_dim)),
        "delta_bias": normal(heads, dtype=jnp.float32) - 4,
        "dy": normal(batch, length, heads, head_dim),
    }


def _canonical(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays that the passes take."""
    inputs = Inputs(**{name: array for name, array in arrays.items() if name != "dy"})
    delta = inputs.step_sizes(delta_softplus=True, delta_limit=(0.0, math.inf))
    kept = {name: arrays[name] for name in ("x", "B", "C", "D")}
    return kept | {"delta": delta, "log_decay": delta * inputs.A}


def _run_forward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        arrays = _canonical(arrays)
        results = mosaic_gpu.forward_pass(Call(arrays, chosen), arrays, save_states=False)
        return results["y"], results["final_state"]

    return run


def _run_backward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
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
    with jax.enable_x64(True):
        for shape in (
            (2, 1000, 16, 64, 1, 128),
            (1, 333, 6, 32, 2, 16),
            (1, 65, 8, 128, 1, 64),
            (2, 64, 4, 64, 4, 256),
            (1, 4097, 24, 64, 1, 128),
        ):
            errors = _errors(shape)
            print(f"{shape!s:28}", " ".join(f"{k} {v:.1e}" for k, v in errors.items()), flush=True)


def _errors(shape: Shape) -> dict[str, float]:
    batch, length, heads, head_dim, groups, state = shape
    random = np.random.default_rng(0)

    def tokens(*dims: int) -> jax.Array:
        return jnp.asarray(random.normal(size=dims)).astype(jnp.bfloat16)

    inputs = Inputs(
        x=tokens(batch, length, heads, head_dim),
        delta=tokens(batch, length, heads),
        A=jnp.asarray(-np.exp(random.uniform(-8, 3, size=heads)), jnp.float32),
        B=tokens(batch, length, groups, state),
        C=tokens(batch, length, groups, state),
        D=jnp.asarray(random.normal(size=(heads, head_dim)), jnp.float32),
        z=tokens(batch, length, heads, head_dim),
        delta_bias=jnp.asarray(random.normal(size=heads) - 3, jnp.float32),
        segment_ids=jnp.asarray(np.sort(random.integers(0, 4, size=(batch, length))), jnp.int32),
        initial_state=jnp.asarray(random.normal(size=(batch, heads, head_dim, state)), jnp.float32),
    )
    dy = tokens(batch, length, heads, head_dim)
    dstate = jnp.asarray(random.normal(size=(batch, heads, head_dim, state)), jnp.float32)

    def gradients(run: Callable[..., Any], inputs: Inputs, dy: jax.Array, dstate: jax.Array) -> dict[str, jax.Array]:
        arrays = {name: array for name, array in inputs._asdict().items() if name != "segment_ids"}
        (y, final), vjp = jax.vjp(lambda a: run(inputs._replace(**a), **OPTIONS), arrays)
        return {"y": y, "final_state": final, **{f"d{k}": v for k, v in vjp((dy, dstate))[0].items()}}

    return relative_errors(
        functools.partial(gradients, mosaic_gpu.ssd),
        functools.partial(gradients, reference.ssd),
        (inputs, dy, dstate),
    )


if __name__ == "__main__":
    main()
