"""Runs one small selective scan, forward and backward, for a checker of memory accesses to watch.

Run on the GPU, once for each tool::

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.mosaic_gpu import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warpgroups", type=int, default=2, help="warpgroups of a block, a divisor of two")
    parser.add_argument("--length", type=int, default=100)
    options = parser.parse_args()
    for name in ("forward", "backward"):
        setattr(plan, name, _with_warpgroups(getattr(plan, name), options.warpgroups))
    inputs, segment_ids = _inputs(1, options.length, 128, 16)

    def loss(inputs: dict[str, jax.Array]) -> jax.Array:
        y, state = selective_scan(
            **inputs,
            segment_ids=segment_ids,
            delta_softplus=True,
            return_final_state=True,
            implementation="mosaic_gpu",
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(jnp.sin(state))

    value, gradients = jax.jit(jax.value_and_grad(loss))(inputs)
    finite = all(bool(jnp.all(jnp.isfinite(array))) for array in jax.tree.leaves((value, gradients)))
    print(f"ran, {'all' if finite else 'NOT all'} results are finite")


def _with_warpgroups(choose: Any, warpgroups: int) -> Any:
    def chosen(*arguments: Any) -> plan.Plan:
        p = choose(*arguments)
        return dataclasses.replace(p, geometry=dataclasses.replace(p.geometry, warpgroups=warpgroups))

    return chosen


def _inputs(batch: int, length: int, channels: int, state: int) -> tuple[dict[str, jax.Array], jax.Array]:
    random = np.random.default_rng(0)

    def array(*dims: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(random.normal(size=dims), dtype)

    inputs = {
        "x": array(batch, length, channels),
        "delta": array(batch, length, channels),
        "A": -jnp.exp(array(channels, state, dtype=jnp.float32)),
        "B": array(batch, length, 1, state),
        "C": array(batch, length, 1, state),
        "D": array(channels, dtype=jnp.float32),
        "z": array(batch, length, channels),
        "delta_bias": array(channels, dtype=jnp.float32) - 3,
        "initial_state": array(batch, channels, state, dtype=jnp.float32),
    }
    return inputs, jnp.asarray(np.sort(random.integers(0, 3, size=(batch, length))), jnp.int32)


if __name__ == "__main__":
    main()
