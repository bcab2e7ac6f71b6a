"""Operators on arrays sharded over batch, length and channels equal those on one device, gradients included."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from pallas_kernels.selective_scan import selective_scan, selective_scan_step
from pallas_kernels.sharding import map_shards
from pallas_kernels.ssd import ssd, ssd_step
from pallas_kernels.trapezoidal_ssd import State, trapezoidal_ssd

SPECS = {
    "batch": P("data", None, None),
    "channels": P(None, None, "tensor"),
    "length": P(None, "sequence", None),
    "length over two axes": P(None, ("data", "sequence"), None),
    "everything": P("data", "sequence", "tensor"),
}


@pytest.fixture
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, JAX sees {len(jax.devices())}")
    return jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Explicit,) * 3)


def replicated(array):
    return array if jax.typeof(array).sharding.mesh.empty else jax.sharding.reshard(array, P())


def outputs_and_gradients(operator, inputs, segment_ids):
    """All outputs of an operator, and the gradients of a loss that weighs each of their elements differently."""

    def loss(inputs):
        outputs = operator(inputs, segment_ids)
        total = 0.0
        for output in outputs:
            output = replicated(output)
            weights = jnp.sin(1.0 + jnp.arange(output.size)).reshape(output.shape)
            total = total + jnp.sum(weights * output)
        return total, outputs

    return jax.jit(jax.grad(loss, has_aux=True))(inputs)


def assert_sharding_changes_nothing(operator, inputs, segment_ids, spec, mesh):
    """Shards x only; the operator has to bring everything else into place."""
    expected = outputs_and_gradients(operator, inputs, segment_ids)
    with jax.set_mesh(mesh):
        placed = jax.device_put(inputs, P()) | {"x": jax.device_put(inputs["x"], spec)}
        actual = outputs_and_gradients(operator, placed, jax.device_put(segment_ids, P()))
    y = actual[1][0]
    assert jax.typeof(y).sharding.spec == spec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


_generator = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_whatever_ran_before():
    global _generator
    _generator = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(_generator.normal(size=shape), jnp.float32)


def documents(length):
    """Segment ids of two rows: documents that begin and end inside the shards, at their borders, and span them."""
    return jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2, 3]], jnp.int32)[:, :length]


def scan_inputs(groups, channels=4):
    return {
        "x": random(2, 8, channels),
        "delta": random(2, 8, channels),
        "A": -jnp.exp(random(channels, 3)),
        "B": random(2, 8, groups, 3),
        "C": random(2, 8, groups, 3),
        "D": random(channels),
        "z": random(2, 8, channels),
        "delta_bias": random(channels),
        "initial_state": random(2, channels, 3),
    }


def scan(inputs, segment_ids):
    return selective_scan(**inputs, delta_softplus=True, segment_ids=segment_ids, return_final_state=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_selective_scan(spec, mesh):
    assert_sharding_changes_nothing(scan, scan_inputs(groups=1), documents(8), spec, mesh)


@pytest.mark.parametrize("groups", [2, 4])
def test_selective_scan_with_groups_and_one_document(groups, mesh):
    assert_sharding_changes_nothing(scan, scan_inputs(groups), None, SPECS["everything"], mesh)


def test_selective_scan_whose_groups_several_shards_need(mesh):
    spec = P(None, None, ("data", "tensor"))
    assert_sharding_changes_nothing(scan, scan_inputs(groups=2), None, spec, mesh)


def test_selective_scan_whose_groups_do_not_fit_the_shards(mesh):
    inputs = scan_inputs(groups=3, channels=6)
    assert_sharding_changes_nothing(scan, inputs, documents(8), P(None, None, "tensor"), mesh)


def ssd_inputs(groups, heads=4):
    return {
        "x": random(2, 8, heads, 3),
        "delta": random(2, 8, heads),
        "A": -jnp.exp(random(heads)),
        "B": random(2, 8, groups, 5),
        "C": random(2, 8, groups, 5),
        "D": random(heads),
        "z": random(2, 8, heads, 3),
        "delta_bias": random(heads),
        "initial_state": random(2, heads, 3, 5),
    }


def run_ssd(inputs, segment_ids):
    return ssd(**inputs, delta_softplus=True, segment_ids=segment_ids, return_final_state=True, chunk_size=3)


@pytest.mark.parametrize("dims", ["length over two axes", "everything"])
def test_ssd(dims, mesh):
    assert_sharding_changes_nothing(run_ssd, ssd_inputs(groups=1), documents(8), P(*SPECS[dims], None), mesh)


@pytest.mark.parametrize(("groups", "heads"), [(2, 4), (3, 6)])
def test_ssd_with_groups_and_one_document(groups, heads, mesh):
    spec = P("data", "sequence", "tensor", None)
    assert_sharding_changes_nothing(run_ssd, ssd_inputs(groups, heads), None, spec, mesh)


def trapezoidal_ssd_inputs(groups, heads=4, rank=2):
    return {
        "x": random(2, 8, heads, 3),
        "delta": random(2, 8, heads),
        "A": -jnp.exp(random(2, 8, heads)),
        "B": random(2, 8, groups, rank, 5),
        "C": random(2, 8, groups, rank, 5),
        "lambda_": jax.nn.sigmoid(random(2, 8, heads)),
        "theta": random(2, 8, 2),
        "D": random(heads),
        "z": random(2, 8, heads, 3),
        "delta_bias": random(heads),
        "B_bias": random(heads, rank, 5),
        "C_bias": random(heads, rank, 5),
        "mimo_x": random(heads, rank, 3),
        "mimo_z": random(heads, rank, 3),
        "mimo_o": random(heads, rank, 3),
        "norm_weight": random(heads, 3),
        "initial_state": State(random(2, heads, 3, 5), random(2, heads, rank, 5), random(2, heads, 3)),
    }


def run_trapezoidal_ssd(inputs, segment_ids):
    y, state = trapezoidal_ssd(
        **inputs, delta_softplus=True, segment_ids=segment_ids, return_final_state=True, chunk_size=3
    )
    return y, *state


@pytest.mark.parametrize("dims", ["length over two axes", "everything"])
def test_trapezoidal_ssd(dims, mesh):
    inputs = trapezoidal_ssd_inputs(groups=1)
    assert_sharding_changes_nothing(run_trapezoidal_ssd, inputs, documents(8), P(*SPECS[dims], None), mesh)


def test_trapezoidal_ssd_with_groups_and_one_document(mesh):
    spec = P("data", "sequence", "tensor", None)
    assert_sharding_changes_nothing(run_trapezoidal_ssd, trapezoidal_ssd_inputs(3, heads=6), None, spec, mesh)


def conv_inputs(length, width):
    return {
        "x": random(2, length, 4),
        "weight": random(width, 4),
        "bias": random(4),
        "initial_state": random(2, width - 1, 4),
    }


def convolve(inputs, segment_ids):
    return causal_conv1d(**inputs, activation="silu", segment_ids=segment_ids, return_final_state=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_causal_conv1d(spec, mesh):
    assert_sharding_changes_nothing(convolve, conv_inputs(8, 4), documents(8), spec, mesh)


@pytest.mark.parametrize("segment_ids", [None, documents(4)], ids=["one document", "packed"])
def test_causal_conv1d_wider_than_two_shards(segment_ids, mesh):
    spec = SPECS["length over two axes"]
    assert_sharding_changes_nothing(convolve, conv_inputs(4, 4), segment_ids, spec, mesh)


def test_steps_keep_the_sharding_of_the_token(mesh):
    spec = P("data", "tensor")
    x, delta, B = random(2, 4), random(2, 4), random(2, 3)
    increment = delta[..., None] * x[..., None] * B[:, None]
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, spec)
        y, state = selective_scan_step(jnp.zeros((2, 4, 3)), placed, delta, -jnp.ones((4, 3)), B, B)
        filtered, _ = causal_conv1d_step(jnp.zeros((2, 1, 4)), placed, jnp.ones((2, 4)))
    assert jax.typeof(y).sharding.spec == jax.typeof(filtered).sharding.spec == spec
    assert jax.typeof(state).sharding.spec == P("data", "tensor", None)
    np.testing.assert_allclose(state, increment, rtol=1e-5)
    np.testing.assert_allclose(filtered, x, rtol=1e-6)


def test_ssd_steps_keep_the_sharding_of_the_token(mesh):
    spec = P("data", "tensor", None)
    x, delta, B = random(2, 4, 3), random(2, 4), random(2, 1, 5)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, spec)
        y, state = ssd_step(jnp.zeros((2, 4, 3, 5)), placed, jnp.abs(delta), -jnp.ones(4), B, B)
    assert jax.typeof(y).sharding.spec == spec
    assert jax.typeof(state).sharding.spec == P("data", "tensor", None, None)
    np.testing.assert_allclose(state, jnp.abs(delta)[..., None, None] * x[..., None] * B[:, :, None], rtol=1e-5)


class Scaled(NamedTuple):
    x: jax.Array
    scale: jax.Array


@jax.custom_vjp
def kernel(inputs):
    return inputs.x * inputs.scale


kernel.defvjp(
    lambda inputs: (kernel(inputs), inputs),
    lambda inputs, dy: (Scaled(dy * inputs.scale, jnp.sum(dy * inputs.x, axis=(0, 1))),),
)


def test_gradients_of_what_devices_share_are_summed_over_them(mesh):
    inputs = Scaled(random(2, 8, 4), random(4))

    def energy(inputs):
        dims = {"x": ("batch", "length", "channels"), "scale": ("channels",)}
        (y,) = map_shards(lambda inputs, _: (kernel(inputs),), inputs, dims, (dims["x"],))
        return jnp.sum(y**2)

    with jax.set_mesh(mesh):
        placed = Scaled(jax.device_put(inputs.x, P("data", "sequence", "tensor")), jax.device_put(inputs.scale, P()))
        gradient = jax.grad(energy)(placed)
    np.testing.assert_allclose(gradient.scale, 2 * inputs.scale * jnp.sum(inputs.x**2, axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(gradient.x, 2 * inputs.scale**2 * inputs.x, rtol=1e-5)


def test_a_mesh_without_explicit_axes_changes_nothing():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    inputs = scan_inputs(groups=1)
    expected = scan(inputs, None)
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda inputs: scan(inputs, None))(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)
