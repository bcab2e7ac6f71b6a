"""Times geometries of the causal convolution's kernels on one GPU: python -m benchmarks.tune_causal_conv1d

For every shape a table: milliseconds forward and backward, and the share of the copy bandwidth, which is measured first.
Results are checked against XLA's.
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import time_calls
from pallas_kernels.causal_conv1d import mosaic_gpu, xla
from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.causal_conv1d.mosaic_gpu import geometry

SHAPES = [(8, 2048, 5120), (8, 2048, 1536), (1, 2048, 1536), (1, 131072, 1536)]


def make_inputs(shape: tuple[int, int, int], count: int, segments: bool) -> list[tuple[Inputs, jax.Array]]:
    batch, length, channels = shape
    ids = jnp.asarray(np.cumsum(np.random.default_rng().random((batch, length)) < 0.003, axis=1), jnp.int32)
    sets = []
    for key in jax.random.split(jax.random.key(np.random.default_rng().integers(1 << 30)), count):
        keys = jax.random.split(key, 4)
        x, dy = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:2])
        weight, bias = jax.random.normal(keys[2], (4, channels)), jax.random.normal(keys[3], (channels,))
        sets.append((Inputs(x, weight, bias, ids if segments else None), dy))
    return sets


def forward(inputs: Inputs, dy: jax.Array, module=mosaic_gpu) -> jax.Array:
    return module.causal_conv1d(inputs, activation="silu")[0]


def backward(inputs: Inputs, dy: jax.Array, module=mosaic_gpu) -> tuple[jax.Array, ...]:
    run = lambda x, weight, bias: forward(inputs._replace(x=x, weight=weight, bias=bias), dy, module)  # noqa: E731
    return jax.vjp(run, inputs.x, inputs.weight, inputs.bias)[1](dy)


def error(got: object, want: object) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    norm = lambda a: float(jnp.linalg.norm(jnp.asarray(a, jnp.float32)))  # noqa: E731
    return max(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", action="store_true")
    parser.add_argument("--shapes", type=int, default=1)
    parser.add_argument("--vectors", type=int, nargs="*", default=[8])
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--stages", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--chunks", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--unrolls", type=int, nargs="*", default=[4])
    parser.add_argument("--passes", nargs="*", default=["forward", "backward"])
    args = parser.parse_args()
    for shape in SHAPES[: args.shapes]:
        sets = make_inputs(shape, max(2, int(300e6 / (4 * np.prod(shape)))), args.segments)
        copy = time_calls(lambda inputs, dy: -inputs.x, sets, samples=7).median
        size = 2 * np.prod(shape)
        print(f"{shape}: copy {1e3 * copy:.4f} ms, {2 * size / copy / 1e12:.2f} TB/s", flush=True)
        for name, function, factor in (("forward", forward, 1), ("backward", backward, 1.5)):
            if name not in args.passes:
                continue
            want = jax.jit(lambda i, d, f=function: f(i, d, xla))(*sets[0])
            choose = getattr(geometry, name)
            default = choose(*shape, 4, 2)
            variants = [default] + [
                geometry.Geometry(v, t, min(s, c), c, u)
                for v, t, s, c, u in itertools.product(args.vectors, args.steps, args.stages, args.chunks, args.unrolls)
                if t >= u
            ]
            for g in dict.fromkeys(variants):
                setattr(geometry, name, lambda *_, g=g: g)
                mosaic_gpu._forward.cache_clear(), mosaic_gpu._backward.cache_clear()
                try:
                    wrong = error(jax.jit(lambda i, d, f=function: f(i, d))(*sets[0]), want)
                    ms = 1e3 * time_calls(lambda i, d, f=function: f(i, d), sets, samples=7).median
                except Exception as failure:
                    print(f"  {name} {g}: {type(failure).__name__} {str(failure)[:200]}")
                    continue
                mark = " default" if g == default else ""
                line = f"v{g.vector} T{g.steps} s{g.stages} c{g.chunks} u{g.unroll}"
                print(
                    f"  {name:8} {line:18} {ms:.4f} ms {ms / 1e3 / copy / factor:.3f}x error {wrong:.1e}{mark}",
                    flush=True,
                )
            setattr(geometry, name, choose)
            module = xla
            ms = 1e3 * time_calls(lambda i, d, f=function: f(i, d, module), sets, samples=5).median
            print(f"  {name:8} xla {ms:.4f} ms", flush=True)


if __name__ == "__main__":
    main()
