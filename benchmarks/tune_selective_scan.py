"""Times the selective scan's kernels under many geometries, to choose those of ``mosaic_gpu/plan.py``.

Run on the GPU to tune for::

    python benchmarks/tune_selective_scan.py --check --forward --backward

Every variant is checked against the first one's result and timed by the profiler: the time its kernels are on the
device, the gaps between them included, median of several calls on inputs that do not fit in the L2 cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selective_scan import mosaic_gpu, reference
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.selective_scan.mosaic_gpu import backward, forward, parts, plan
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry
from pallas_kernels.selective_scan.mosaic_gpu.plan import Plan

SHAPES = {
    "large": (8, 2048, 5120, 16),
    "medium": (8, 2048, 1536, 16),
    "small": (1, 2048, 1536, 16),
    "long": (1, 131072, 1536, 16),
}
L2_BYTES = 60e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the reference in float64")
    parser.add_argument("--forward", nargs="*", choices=SHAPES, help="shapes to time the forward kernel at")
    parser.add_argument("--backward", nargs="*", choices=SHAPES, help="shapes to time the backward kernel at")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new variants after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.check:
        check()
    for name in options.forward or ():
        tune(f"forward {name}", SHAPES[name], forward_variants(SHAPES[name]), _run_forward, deadline)
    for name in options.backward or ():
        tune(f"backward {name}", SHAPES[name], backward_variants(SHAPES[name]), _run_backward, deadline)


def forward_variants(shape: tuple[int, ...]) -> Iterator[Plan]:
    """Plans worth timing forward."""
    yield from _variants(shape, plan.forward, steps=(16, 32), unroll=(4, 2))


def backward_variants(shape: tuple[int, ...]) -> Iterator[Plan]:
    """Plans worth timing backward."""
    yield from _variants(shape, plan.backward, steps=(16,), unroll=(2,))


def _variants(
    shape: tuple[int, ...], choose: Callable[..., Plan], steps: tuple[int, ...], unroll: tuple[int, ...]
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


def tune(
    title: str,
    shape: tuple[int, ...],
    variants: Iterator[Plan],
    make: Callable[[Plan], Callable[..., Any]],
    deadline: float,
) -> None:
    """Times all variants at one shape and prints a line for each."""
    print(f"== {title} {shape}", flush=True)
    sets = _input_sets(shape)
    expected = None
    for chosen in variants:
        g = chosen.geometry
        label = f"{g.warpgroups} x {g.tiles} tiles steps {g.steps} unroll {g.unroll} parts {chosen.num_parts}"
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            return
        try:
            run = jax.jit(make(chosen))
            start = time.monotonic()
            result = np.asarray(run(sets[0])[0], np.float32)
            seconds = time.monotonic() - start
            if expected is None:
                expected = result
            error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
            times = device_times(run, sets)
        except Exception as problem:
            print(f"{label:45} failed: {str(problem)[:150]!r}", flush=True)
            continue
        total = statistics.median(times.pop("span"))
        detail = " ".join(f"{name} {statistics.median(values):.3f}" for name, values in times.items())
        print(f"{label:45} {total:8.4f} ms  error {error:.1e}  compile {seconds:.1f} s  [{detail}]", flush=True)


def device_times(run: Callable[..., Any], sets: list[Any], repeats: int = 12) -> dict[str, list[float]]:
    """Milliseconds on the device: of each kernel by name, and "span" from a call's first kernel to its last."""
    for arrays in sets:
        jax.block_until_ready(run(arrays))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(repeats):
                jax.block_until_ready(run(sets[i % len(sets)]))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    events = sorted(
        (event.start_ns, event.end_ns, event.name)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    if len(events) % repeats:
        raise RuntimeError(f"{len(events)} kernels in {repeats} calls")
    count = len(events) // repeats
    times: dict[str, list[float]] = {"span": []}
    for i in range(repeats):
        call = events[i * count : (i + 1) * count]
        times["span"].append((call[-1][1] - call[0][0]) / 1e6)
        for start, end, name in call:
            if end - start > 1000:
                times.setdefault(name.removeprefix("selective_scan_")[:12], []).append((end - start) / 1e6)
    return times


def _input_sets(shape: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    batch, length, channels, _ = shape
    count = max(1, round(3 * L2_BYTES / (batch * length * channels * 2 * 4)))
    return [_arrays(shape, seed) for seed in range(min(count, 8))]


def _arrays(shape: tuple[int, ...], seed: int) -> dict[str, jax.Array]:
    batch, length, channels, state = shape
    keys = iter(jax.random.split(jax.random.key(seed), 12))

    def normal(*dims: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), dims, dtype)

    return {
        "x": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -16 * jax.random.uniform(next(keys), (channels, state)),
        "B": normal(batch, length, 1, state),
        "C": normal(batch, length, 1, state),
        "D": normal(channels, dtype=jnp.float32),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels, dtype=jnp.float32) - 4,
        "dy": normal(batch, length, channels),
    }


def _run_forward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        arrays = {name: array for name, array in arrays.items() if name != "dy"}
        p, padded = mosaic_gpu._prepare(arrays, True, lambda *_: chosen)
        if p.num_parts > 1:
            padded |= parts.summarize(p, padded, reverse=False)
        results = forward.scan(p, padded, save_states=False)
        return results["y"], results["final_state"]

    return run


def _run_backward(chosen: Plan) -> Callable[..., Any]:
    def run(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
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
    with jax.enable_x64(True):
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
            errors = _errors(dtype, shape, groups)
            print(f"{dtype:9} {shape!s:22}", " ".join(f"{k} {v:.1e}" for k, v in errors.items()), flush=True)


def _errors(dtype: str, shape: tuple[int, ...], groups: int) -> dict[str, float]:
    batch, length, channels, state = shape
    random = np.random.default_rng(0)

    def tokens(*dims: int) -> jax.Array:
        return jnp.asarray(random.normal(size=dims)).astype(dtype)

    inputs = Inputs(
        x=tokens(batch, length, channels),
        delta=tokens(batch, length, channels),
        A=jnp.asarray(-np.exp(random.uniform(-8, 3, size=(channels, state))), jnp.float32),
        B=tokens(batch, length, groups, state),
        C=tokens(batch, length, groups, state),
        D=jnp.asarray(random.normal(size=channels), jnp.float32),
        z=tokens(batch, length, channels),
        delta_bias=jnp.asarray(random.normal(size=channels) - 3, jnp.float32),
        segment_ids=jnp.asarray(np.sort(random.integers(0, 4, size=(batch, length))), jnp.int32),
        initial_state=jnp.asarray(random.normal(size=(batch, channels, state)), jnp.float32),
    )
    dy, dstate = tokens(batch, length, channels), jnp.asarray(random.normal(size=(batch, channels, state)), jnp.float32)

    def gradients(run: Callable[..., Any], inputs: Inputs, dy: jax.Array, dstate: jax.Array) -> dict[str, jax.Array]:
        arrays = {name: array for name, array in inputs._asdict().items() if name != "segment_ids"}
        (y, final), vjp = jax.vjp(lambda a: run(inputs._replace(**a), delta_softplus=True), arrays)
        return {"y": y, "final_state": final, **{f"d{k}": v for k, v in vjp((dy, dstate))[0].items()}}

    return relative_errors(
        functools.partial(gradients, mosaic_gpu.selective_scan),
        functools.partial(gradients, reference.selective_scan),
        (inputs, dy, dstate),
    )


def relative_errors(run: Callable[..., Any], definition: Callable[..., Any], arguments: Any) -> dict[str, float]:
    """Compares results with those of the definition in float64, each relative to the norm of the whole array.

    Args:
        run: ``run(*arguments) -> results`` by name.
        definition: the same.
        arguments: arrays, or trees of them.

    Raises:
        RuntimeError: two runs differ.
    """
    run = jax.jit(run)
    got, again = run(*arguments), run(*arguments)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, arguments)
    errors = {}
    for name, value in jax.jit(definition)(*wide).items():
        if not (got[name] == again[name]).all():
            raise RuntimeError(f"{name} differs from run to run")
        value = np.asarray(value, np.float64)
        errors[name] = float(np.linalg.norm(np.asarray(got[name], np.float64) - value) / np.linalg.norm(value))
    return errors


if __name__ == "__main__":
    main()
