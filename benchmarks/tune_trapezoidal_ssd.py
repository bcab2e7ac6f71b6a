"""Times the trapezoidal SSD operator beside ``ssd`` at the same shapes, in one run on one GPU.

Run on the GPU::

    python benchmarks/tune_trapezoidal_ssd.py --check --whole large medium long

How the calls are timed: ``benchmarks/tuning.py``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accuracy import Drawing, print_errors
from benchmarks.operators import OPERATORS, Arrays
from benchmarks.tune_ssd import DIMS, SHAPES
from benchmarks.tuning import Sizes, Variant, draw, run_script, without_dy
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import mosaic_gpu, reference
from pallas_kernels.trapezoidal_ssd.inputs import Inputs

OPTIONS = {"delta_softplus": True, "norm_epsilon": 1e-5, "chunk_size": None}


def main() -> None:
    run_script(__doc__, SHAPES, {"whole": "both operators"}, _variants, _arrays, check, seconds=150)


def _variants(options: argparse.Namespace) -> Iterator[Variant]:
    for name in options.whole:
        for operator, call in (("ssd", _ssd), ("trapezoidal_ssd", _trapezoidal_ssd)):
            for label, run in (("forward", call), ("forward and backward", functools.partial(_gradient, call))):
                yield Variant("whole", SHAPES[name], f"{operator} {label}", run, comparable=False)


def _arrays(shape: Sizes, seed: int) -> Arrays:
    """Inputs of the operator's, among which are those of ``ssd``."""
    dims = dict(zip(DIMS, shape, strict=True))
    return draw("trapezoidal_ssd", dims | {"rank": 1, "pairs": dims["state"] // 4}, seed)


def _ssd(a: Arrays) -> jax.Array:
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


def _trapezoidal_ssd(a: Arrays) -> jax.Array:
    return OPERATORS["trapezoidal_ssd"].call(without_dy(a), implementation="mosaic_gpu")


def _gradient(call: Callable[..., Any], a: Arrays) -> Any:
    return jax.vjp(call, without_dy(a))[1](a["dy"])


def check() -> None:
    """Compares values and gradients with the reference in float64 and prints the relative errors."""
    for shape, rank in (
        ((2, 1000, 16, 64, 1, 128), 1),
        ((1, 333, 6, 32, 2, 16), 4),
        ((1, 65, 8, 128, 1, 64), 3),
        ((2, 64, 4, 64, 4, 192), 1),
        ((1, 4097, 24, 64, 1, 128), 1),
    ):
        batch, length, heads, head_dim, groups, state = shape
        drawing = Drawing()
        inputs = Inputs(
            x=drawing.tokens(batch, length, heads, head_dim),
            delta=drawing.tokens(batch, length, heads),
            A=-jnp.exp(2 * drawing.floats(batch, length, heads)),
            B=drawing.tokens(batch, length, groups, rank, state),
            C=drawing.tokens(batch, length, groups, rank, state),
            lambda_=jax.nn.sigmoid(drawing.floats(batch, length, heads)),
            theta=drawing.floats(batch, length, state // 4),
            z=drawing.tokens(batch, length, heads, head_dim),
            D=drawing.floats(heads, head_dim),
            delta_bias=drawing.floats(heads) - 3,
            B_bias=drawing.floats(heads, rank, state),
            C_bias=drawing.floats(heads, rank, state),
            mimo_x=drawing.floats(heads, rank, head_dim) if rank > 1 else None,
            mimo_z=drawing.floats(heads, rank, head_dim) if rank > 1 else None,
            mimo_o=drawing.floats(heads, rank, head_dim) if rank > 1 else None,
            norm_weight=None,
            segment_ids=drawing.segment_ids(batch, length),
            initial_ssm=drawing.floats(batch, heads, head_dim, state),
            initial_B=drawing.floats(batch, heads, rank, state),
            initial_x=drawing.floats(batch, heads, head_dim),
        )
        dy, dfinal_state = drawing.tokens(batch, length, heads, head_dim), drawing.floats(batch, heads, head_dim, state)
        label, run, definition = f"{shape!s:28} {rank}", mosaic_gpu.trapezoidal_ssd, reference.trapezoidal_ssd
        print_errors(label, run, definition, inputs, (dy, dfinal_state), **OPTIONS)


if __name__ == "__main__":
    main()
