"""The selective scan's GPU kernels: interpreted on a CPU, lowered for CUDA, and run where there is a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import mosaic_gpu
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.selective_scan.mosaic_gpu import plan
from tests.pallas_kernels.kernel_results import (
    VALUES,
    assert_vmap_is_a_loop,
    assert_within,
    norms,
    run_kernels,
    values_and_gradients,
    widened,
)
from tests.pallas_kernels.random_arrays import RandomArrays

OPTIONAL = ("D", "z", "delta_bias", "segment_ids", "initial_state")
BENCHMARK_SHAPES = ((8, 2048, 5120, 16), (8, 2048, 1536, 16), (1, 2048, 1536, 16), (1, 131072, 1536, 16))


def make_inputs(batch, length, channels, state, *, groups=1, dtype="float32", optional=OPTIONAL, seed=0):
    """Random inputs, with decays from 1 - 1e-6 to less than 1e-30."""
    random = RandomArrays(seed, 0, dtype=dtype)
    extra = {
        "D": random.floats(channels),
        "z": random.tokens(batch, length, channels),
        "delta_bias": random.floats(channels) - 3,
        "segment_ids": random.segment_ids(batch, length),
        "initial_state": random.floats(batch, channels, state),
    }
    return Inputs(
        x=random.tokens(batch, length, channels),
        delta=random.tokens(batch, length, channels),
        A=random.decay_rates(channels, state, powers=(-9, 5)),
        B=random.tokens(batch, length, groups, state),
        C=random.tokens(batch, length, groups, state),
        **{name: array for name, array in extra.items() if name in optional},
    )


def definition(inputs, *, delta_softplus):
    """The scan as the paper writes it, in the precision of its inputs."""
    channels = inputs.x.shape[2]
    delta = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias
    delta = jnp.logaddexp(delta, 0.0) if delta_softplus else delta
    group = np.arange(channels) // (channels // inputs.B.shape[2])
    ids = inputs.segment_ids
    keep = jnp.ones(inputs.x.shape[:2]) if ids is None else jnp.diff(ids, axis=1, prepend=ids[:, :1]) == 0

    def step(h, token):
        x, delta, B, C, keep = token
        h = jnp.exp(delta[..., None] * inputs.A) * h * keep[:, None, None] + (delta * x)[..., None] * B[:, group]
        return h, jnp.sum(C[:, group] * h, axis=-1)

    h = inputs.initial_state
    h = jnp.zeros((len(inputs.x), *inputs.A.shape), inputs.x.dtype) if h is None else h
    tokens = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (inputs.x, delta, inputs.B, inputs.C, keep))
    h, y = jax.lax.scan(step, h, tokens)
    y = jnp.swapaxes(y, 0, 1)
    y = y if inputs.D is None else y + inputs.D * inputs.x
    return (y if inputs.z is None else y * inputs.z / (1 + jnp.exp(-inputs.z))), h


def cotangents(inputs):
    """Of both results; without a state before nothing depends on the one after either, as in training."""
    random = RandomArrays(1, dtype=inputs.x.dtype)
    dy = random.tokens(*inputs.x.shape)
    return dy, None if inputs.initial_state is None else random.floats(len(inputs.x), *inputs.A.shape)


def assert_right(inputs, delta_softplus=True, interpret=True):
    """Compares values and gradients with the definition in float64, to the bar of the design."""

    def compute(run):
        return functools.partial(values_and_gradients, run, delta_softplus=delta_softplus)

    results = run_kernels(compute(mosaic_gpu.selective_scan), inputs, cotangents(inputs), interpret=interpret)
    with jax.enable_x64(True):
        expected = jax.jit(compute(definition))(*widened((inputs, cotangents(inputs))))
    value_bar, gradient_bar = (5e-3, 1e-2) if inputs.x.dtype.itemsize == 2 else (1e-5, 1e-4)
    assert_within(lambda name: value_bar if name in VALUES else gradient_bar, results, expected, norms(expected))


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((2, 19, 40, 16), {}),
        ((1, 16, 6, 3), {"groups": 2, "optional": ("initial_state",)}),
        ((1, 16, 6, 3), {"optional": ()}),
        ((1, 1, 8, 1), {"optional": ("initial_state", "delta_bias")}),
        ((1, 18, 16, 64), {"dtype": "bfloat16"}),
    ],
    ids=["all features", "two groups", "bare", "one token", "bfloat16, wide state"],
)
def test_interpreted_kernels_compute_the_definition_and_its_gradient(dims, options):
    assert_right(make_inputs(*dims, **options))


def test_step_sizes_are_taken_as_they_are_without_the_softplus():
    inputs = make_inputs(1, 17, 8, 4, optional=("z",))
    assert_right(inputs._replace(delta=jnp.abs(inputs.delta) / 10), delta_softplus=False)


@pytest.fixture
def change_plans(monkeypatch):
    """Cuts both kernels into so many parts of the length, or gives their blocks so many warpgroups."""

    def change(num_parts: int = 1, warpgroups: int = 1) -> None:
        for name in ("forward", "backward"):
            monkeypatch.setattr(plan, name, functools.partial(changed, getattr(plan, name), num_parts, warpgroups))

    def changed(choose, num_parts, warpgroups, *arguments):
        geometry = dataclasses.replace(choose(*arguments).geometry, warpgroups=warpgroups)
        return plan.Plan(geometry, num_parts)

    return change


@pytest.mark.parametrize(("length", "num_parts"), [(40, 1), (70, 3)], ids=["whole", "in parts"])
def test_warpgroups_that_share_their_loads_compute_the_definition(length, num_parts, change_plans):
    change_plans(num_parts, warpgroups=2)
    assert_right(make_inputs(1, length, 128, 16, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("dims", "warpgroups"),
    [((8, 2048, 5120, 16), 5), ((8, 2048, 1536, 16), 3), ((8, 2048, 1568, 16), 1), ((1, 2048, 1536, 16), 1)],
    ids=str,
)
def test_warpgroups_keep_step_where_that_fills_the_gpu(dims, warpgroups):
    batch, length, channels, state = dims
    assert plan.forward(batch, length, channels, 1, state, 2).geometry.warpgroups == warpgroups


def test_parts_of_a_long_sequence_join_to_the_whole(change_plans):
    change_plans(num_parts=3)
    assert_right(make_inputs(1, 70, 32, 16, optional=("segment_ids", "initial_state")))


@pytest.mark.parametrize(
    ("dims", "forward_is_split", "backward_is_split"),
    [
        ((8, 2048, 5120, 16), False, False),
        ((8, 2048, 1536, 16), False, True),
        ((1, 2048, 1536, 16), True, True),
        ((1, 131072, 1536, 16), True, True),
        ((1, 16, 1536, 16), False, False),
    ],
    ids=str,
)
def test_a_long_sequence_of_few_channels_is_split_into_parts(dims, forward_is_split, backward_is_split):
    batch, length, channels, state = dims
    assert (plan.forward(batch, length, channels, 1, state, 2).num_parts > 1) == forward_is_split
    assert (plan.backward(batch, length, channels, 1, state, 2).num_parts > 1) == backward_is_split


@pytest.mark.parametrize("shared", [("A", "D", "C"), ("D",)], ids=["parameters and C shared", "A per instance"])
def test_vmap_is_a_loop(shared):
    instances = [make_inputs(1, 17, 32, 16, optional=("D",), seed=seed) for seed in range(2)]
    scan = functools.partial(mosaic_gpu.selective_scan, delta_softplus=True)
    assert_vmap_is_a_loop(scan, instances, shared, rtol=1e-5, atol=1e-6)


def lower_with_gradient(dims, dtype, groups=1):
    batch, length, channels, state = dims

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    token, matrix = array(batch, length, channels), array(batch, length, groups, state)
    parameter = array(channels, dtype="float32")
    inputs = Inputs(token, token, array(channels, state, dtype="float32"), matrix, matrix, parameter, token, parameter)
    state_type = array(batch, channels, state, dtype="float32")
    run = functools.partial(values_and_gradients, mosaic_gpu.selective_scan, delta_softplus=True)
    return jax.jit(run).trace(inputs, (token, state_type)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dims", BENCHMARK_SHAPES, ids=str)
def test_benchmark_shapes_lower_for_cuda(dims):
    assert "mosaic_gpu" in lower_with_gradient(dims, "bfloat16")


@pytest.mark.parametrize(
    ("state", "channels", "groups"), [(1, 1536, 1), (8, 130, 2), (64, 130, 2), (256, 1536, 1)], ids=str
)
def test_other_state_sizes_lower_for_cuda(state, channels, groups):
    # In float32, which needs the most shared memory.
    assert "mosaic_gpu" in lower_with_gradient((2, 1000, channels, state), "float32", groups)


def test_at_most_one_state_in_sixteen_steps_is_saved():
    arrays = as_arrays(make_inputs(2, 64, 32, 16))
    _, vjp = jax.eval_shape(lambda arrays: jax.vjp(mosaic_gpu._scan(True), arrays), arrays)
    *kept, states = jax.tree.leaves(vjp)
    assert sum(a.size for a in kept) == sum(a.size for a in arrays.values())
    assert states.size == 2 * (64 // 16) * 32 * 16


def as_arrays(inputs):
    return {name: a for name, a in inputs._asdict().items() if a is not None and name != "segment_ids"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i._replace(A=i.A.astype(jnp.complex64)), "A must be real"),
        (lambda i: i._replace(z=i.z.astype(jnp.int32)), "z must be one of"),
        (lambda i: i._replace(A=jnp.zeros((8, 300))), "state must be at most 256, got 300"),
    ],
)
def test_what_the_kernels_cannot_do_is_named(change, message, no_shape_checks):
    reason = mosaic_gpu.unsupported_reason(change(make_inputs(1, 4, 8, 4)), delta_softplus=True)
    assert reason is not None
    assert message in reason


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_cpu_is_named_as_what_is_missing():
    reason = mosaic_gpu.unsupported_reason(make_inputs(1, 4, 8, 4), delta_softplus=True)
    assert reason == "it needs an NVIDIA GPU, the default device is a cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 2048, 4097])
def test_any_length_on_a_gpu(length, dtype):
    assert_right(make_inputs(2, length, 130, 16, dtype=dtype), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", [1, 8, 16, 64, 128, 256])
@pytest.mark.parametrize("channels", [8, 256, 1536])
def test_any_size_on_a_gpu(channels, state, dtype):
    assert_right(make_inputs(1, 100, channels, state, dtype=dtype), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1536, 5120])
def test_many_channels_on_a_gpu(channels):
    assert_right(make_inputs(8, 100, channels, 16, dtype="bfloat16"), interpret=False)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_a_gpu():
    length, channels = 2**20 + 3, 2**11 + 64
    batch = make_inputs(1, 32, channels, 4, dtype="bfloat16", optional=("z",))
    tail = 32

    def token(array):
        return jnp.pad(array, ((0, 0), (length - tail, 0), (0, 0)))

    def matrix(array):
        return jnp.pad(array, ((0, 0), (length - tail, 0), (0, 0), (0, 0)))

    long = batch._replace(x=token(batch.x), delta=token(batch.delta), z=token(batch.z))
    long = long._replace(B=matrix(batch.B), C=matrix(batch.C))
    assert long.x.size > 2**31
    scan = jax.jit(functools.partial(mosaic_gpu.selective_scan, delta_softplus=True))
    y, state = scan(long)
    expected_y, expected_state = scan(batch)
    error = jnp.linalg.norm((y[:, -tail:] - expected_y).astype(jnp.float32)) / jnp.linalg.norm(
        expected_y.astype(jnp.float32)
    )
    assert error < 5e-3
    assert not y[:, :-tail].any()
    np.testing.assert_allclose(state, expected_state, rtol=1e-5, atol=1e-6)
