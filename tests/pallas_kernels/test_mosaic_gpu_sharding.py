"""The kernels of all operators inside ``jax.shard_map``, lowered for CUDA: the interpreter cannot run them there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.causal_conv1d import mosaic_gpu as conv_kernels
from pallas_kernels.selective_scan import mosaic_gpu as scan_kernels
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import mosaic_gpu as ssd_kernels
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import trapezoidal_ssd

BOTH = ("y", "final_state")
ONE = [((2, 1, 2), ("y",)), ((2, 1, 2), ("final_state",))]
"""Sizes of a mesh, and the results that a loss depends on: in training the output alone."""


@pytest.fixture(autouse=True)
def _pretend_to_have_the_hardware(monkeypatch):
    for kernels in (conv_kernels, scan_kernels, ssd_kernels):
        monkeypatch.setattr(kernels, "missing_hardware", lambda *_: None)


def total(used, y, final_state):
    """Sum of the results of these names."""
    return sum(jnp.sum({"y": y, "final_state": final_state}[name].astype(jnp.float32)) for name in used)


@pytest.mark.parametrize(("sizes", "used"), [((1, 1, 1), BOTH), ((2, 1, 2), BOTH), ((1, 2, 1), BOTH), *ONE])
def test_a_layer_and_its_gradients_lower_on_a_mesh(sizes, used):
    axes = ("data", "sequence", "tensor")
    token, matrix = P(*axes), P("data", "sequence", None)
    shapes_and_specs = {
        "x": ((4, 64, 256), token),
        "delta": ((4, 64, 256), token),
        "z": ((4, 64, 256), token),
        "A": ((256, 16), P("tensor", None)),
        "B": ((4, 64, 16), matrix),
        "C": ((4, 64, 16), matrix),
        "weight": ((4, 256), P(None, "tensor")),
    }

    def loss(arrays, segment_ids):
        x = causal_conv1d(
            arrays["x"], arrays["weight"], activation="silu", segment_ids=segment_ids, implementation="mosaic_gpu"
        )
        matrices = (arrays[name] for name in ("delta", "A", "B", "C"))
        y, state = selective_scan(
            x,
            *matrices,
            None,
            arrays["z"],
            segment_ids=segment_ids,
            return_final_state=True,
            implementation="mosaic_gpu",
        )
        return total(used, y, state)

    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * 3)):
        arrays = {name: jnp.zeros(shape, out_sharding=spec) for name, (shape, spec) in shapes_and_specs.items()}
        segment_ids = jnp.zeros((4, 64), jnp.int32, out_sharding=P("data", "sequence"))
        traced = jax.jit(jax.value_and_grad(loss)).trace(arrays, segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4


@pytest.mark.parametrize(("sizes", "used"), [((1, 1, 1), BOTH), ((2, 1, 2), BOTH), ((1, 2, 1), BOTH), *ONE])
def test_ssd_and_its_gradients_lower_on_a_mesh(sizes, used):
    axes = ("data", "sequence", "tensor")
    matrix = P("data", "sequence", None, None)
    shapes_and_specs = {
        "x": ((4, 1024, 4, 64), P(*axes, None)),
        "delta": ((4, 1024, 4), P(*axes)),
        "A": ((4,), P("tensor")),
        "B": ((4, 1024, 1, 64), matrix),
        "C": ((4, 1024, 1, 64), matrix),
        "D": ((4,), P("tensor")),
    }

    def loss(arrays, segment_ids):
        y, state = ssd(**arrays, segment_ids=segment_ids, return_final_state=True, implementation="mosaic_gpu")
        return total(used, y, state)

    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * 3)):
        arrays = {
            name: jnp.zeros(shape, jnp.float32 if name in ("A", "D") else jnp.bfloat16, out_sharding=spec)
            for name, (shape, spec) in shapes_and_specs.items()
        }
        segment_ids = jnp.zeros((4, 1024), jnp.int32, out_sharding=P("data", "sequence"))
        traced = jax.jit(jax.value_and_grad(loss)).trace(arrays, segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4


@pytest.mark.parametrize(("sizes", "used"), [((2, 1, 2), BOTH), ((1, 2, 1), BOTH), *ONE])
def test_trapezoidal_ssd_and_its_gradients_lower_on_a_mesh(sizes, used):
    axes = ("data", "sequence", "tensor")
    matrix = P("data", "sequence", None, None, None)
    shapes_and_specs = {
        "x": ((4, 256, 4, 64), P(*axes, None)),
        **dict.fromkeys(("delta", "A", "lambda_"), ((4, 256, 4), P(*axes))),
        **dict.fromkeys(("B", "C"), ((4, 256, 1, 2, 64), matrix)),
        "theta": ((4, 256, 16), P("data", "sequence", None)),
        "D": ((4,), P("tensor")),
        **dict.fromkeys(("B_bias", "C_bias"), ((4, 2, 64), P("tensor", None, None))),
    }

    def loss(arrays, segment_ids):
        options = {"return_final_state": True, "implementation": "mosaic_gpu"}
        y, state = trapezoidal_ssd(**arrays, segment_ids=segment_ids, **options)
        return total(used, y, state.ssm)

    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * 3)):
        arrays = {
            name: jnp.zeros(shape, jnp.float32 if len(shape) < 4 else jnp.bfloat16, out_sharding=spec)
            for name, (shape, spec) in shapes_and_specs.items()
        }
        segment_ids = jnp.zeros((4, 256), jnp.int32, out_sharding=P("data", "sequence"))
        traced = jax.jit(jax.value_and_grad(loss)).trace(arrays, segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4
