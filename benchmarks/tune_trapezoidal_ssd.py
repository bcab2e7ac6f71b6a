"""Times the trapezoidal SSD operator beside ``ssd`` at the same shapes, in one run on one GPU.

Run on the GPU::

    python benchmarks/tune_trapezoidal_ssd.py --check --whole large medium long

Times are the profiler's, as those of ``tune_ssd.py``: from a call's first kernel to its last, XLA's included.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tune_ssd
from benchmarks.operators import OPERATORS
from benchmarks.tune_selective_scan import relative_errors
from benchmarks.tune_ssd import SHAPES, Shape, Variant
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import mosaic_gpu, reference
from pallas_kernels.trapezoidal_ssd.inputs import Inputs

OPTIONS = {"delta_softplus": True, "norm_epsilon": 1e-5, "chunk_size": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the reference in float64")
    parser.add_argument("--whole", nargs="*", choices=SHAPES, help="shapes to time both operators at")
    parser.add_argument("--seconds", type=float, default=150, help="stop starting new variants after this time")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.check:
        check()
    variants = [
        Variant("whole", SHAPES[name], f"{operator} {label}", run)
        for name in options.whole or ()
        for operator, call in (("ssd", _ssd), ("trapezoidal_ssd", _trapezoidal_ssd))
        for label, run in (("forward", call), ("forward and backward", functools.partial(_gradient, call)))
    ]
    tune_ssd.tune(variants, deadline, arrays)


@functools.partial(jax.jit, static_argnums=0)
def arrays(shape: Shape, seed: int) -> dict[str, jax.Array]:
    """Inputs of the operator's, among which are those of ``ssd``."""
    dims = dict(zip(("batch", "length", "heads", "head_dim", "groups", "state"), shape, strict=True))
    operator = OPERATORS["trapezoidal_ssd"]
    made = operator.make(jax.random.key(seed), dims | {"rank": 1, "pairs": dims["state"] // 4})
    return made | {"dy": jax.random.normal(jax.random.key(seed + 1), made["x"].shape, made["x"].dtype)}


def _ssd(a: dict[str, jax.Array]) -> jax.Array:
    y = ssd(
        x=a["x"],
        delta=a["delta"],
        A=a["A"][0, 0].astype(jnp.float32),
        B=a["B"][:, :, :, 0],
        C=a["C"][:, :, :, 0],
        D=a["D"],
        delta_bias=a["delta_bias"],
        delta_softplus=True,
        implementation="mosaic_gpu",
    )
    assert isinstance(y, jax.Array)
    return y


def _trapezoidal_ssd(a: dict[str, jax.Array]) -> jax.Array:
    return OPERATORS["trapezoidal_ssd"].call({k: v for k, v in a.items() if k != "dy"}, implementation="mosaic_gpu")


def _gradient(call: Callable[..., Any], a: dict[str, jax.Array]) -> Any:
    inputs = {name: array for name, array in a.items() if name != "dy"}
    return jax.vjp(call, inputs)[1](a["dy"])


def check() -> None:
    """Compares values and gradients with the reference in float64 and prints the relative errors."""
    with jax.enable_x64(True):
        for shape, rank in (
            ((2, 1000, 16, 64, 1, 128), 1),
            ((1, 333, 6, 32, 2, 16), 4),
            ((1, 65, 8, 128, 1, 64), 3),
            ((2, 64, 4, 64, 4, 192), 1),
            ((1, 4097, 24, 64, 1, 128), 1),
        ):
            errors = _errors(shape, rank)
            print(f"{shape!s:28} {rank}", " ".join(f"{k} {v:.1e}" for k, v in errors.items()), flush=True)


def _errors(shape: Shape, rank: int) -> dict[str, float]:
    batch, length, heads, head_dim, groups, state = shape
    random = np.random.default_rng(0)

    def tokens(*dims: int) -> jax.Array:
        return jnp.asarray(random.normal(size=dims)).astype(jnp.bfloat16)

    def floats(*dims: int) -> jax.Array:
        return jnp.asarray(random.normal(size=dims), jnp.float32)

    inputs = Inputs(
        x=tokens(batch, length, heads, head_dim),
        delta=tokens(batch, length, heads),
        A=-jnp.exp(2 * floats(batch, length, heads)),
        B=tokens(batch, length, groups, rank, state),
        C=tokens(batch, length, groups, rank, state),
        lambda_=jax.nn.sigmoid(floats(batch, length, heads)),
        theta=floats(batch, length, state // 4),
        z=tokens(batch, length, heads, head_dim),
        D=floats(heads, head_dim),
        delta_bias=floats(heads) - 3,
        B_bias=floats(heads, rank, state),
        C_bias=floats(heads, rank, state),
        mimo_x=floats(heads, rank, head_dim) if rank > 1 else None,
        mimo_z=floats(heads, rank, head_dim) if rank > 1 else None,
        mimo_o=floats(heads, rank, head_dim) if rank > 1 else None,
        norm_weight=None,
        segment_ids=jnp.asarray(np.sort(random.integers(0, 4, size=(batch, length))), jnp.int32),
        initial_ssm=floats(batch, heads, head_dim, state),
        initial_B=floats(batch, heads, rank, state),
        initial_x=floats(batch, heads, head_dim),
    )
    cotangents = (tokens(batch, length, heads, head_dim), floats(batch, heads, head_dim, state))

    def gradients(run: Callable[..., Any], inputs: Inputs, dy: jax.Array, dstate: jax.Array) -> dict[str, jax.Array]:
        made = {name: a for name, a in inputs._asdict().items() if a is not None and name != "segment_ids"}
        (y, final), vjp = jax.vjp(lambda a: run(inputs._replace(**a), **OPTIONS)[:2], made)
        return {"y": y, "final_state": final, **{f"d{k}": v for k, v in vjp((dy, dstate))[0].items()}}

    return relative_errors(
        functools.partial(gradients, mosaic_gpu.trapezoidal_ssd),
        functools.partial(gradients, reference.trapezoidal_ssd),
        (inputs, *cotangents),
    )


if __name__ == "__main__":
    main()
