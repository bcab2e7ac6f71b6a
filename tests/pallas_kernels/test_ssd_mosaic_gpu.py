"""The SSD operator's GPU kernels: interpreted on a CPU, lowered for CUDA, and run where there is a GPU."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu_compat import plgpu
from pallas_kernels.selective_scan import mosaic_gpu as selective_scan_kernels
from pallas_kernels.selective_scan.inputs import Inputs as SelectiveScanInputs
from pallas_kernels.ssd import mosaic_gpu
from pallas_kernels.ssd.inputs import Inputs
from pallas_kernels.ssd.mosaic_gpu import call, plan, tokens
from tests.pallas_kernels.kernel_results import (
    VALUES,
    assert_vmap_is_a_loop,
    assert_within,
    run_kernels,
    values_and_gradients,
)
from tests.pallas_kernels.refusals import RefusalContract
from tests.pallas_kernels.ssd_definition import OPTIONS, cotangents, expected_and_scales, make_inputs

BENCHMARK_SHAPES = ((8, 2048, 80, 64, 128), (8, 2048, 24, 64, 128), (1, 131072, 24, 64, 128))


def assert_right(inputs, *, interpret=True, **options):
    """Compares values and gradients with the definition in float64, to the bar of the design."""
    run = functools.partial(values_and_gradients, mosaic_gpu.ssd, **OPTIONS | options)
    results = run_kernels(run, inputs, cotangents(inputs), interpret=interpret)
    expected = expected_and_scales(inputs, cotangents(inputs), **options)
    assert_within(lambda name: 5e-3 if name in VALUES else 1e-2, results, *expected)


@pytest.fixture
def use_plan(monkeypatch):
    """Replaces numbers of the plan that a call gets."""

    def use(**numbers):
        choose = plan.choose
        monkeypatch.setattr(plan, "choose", lambda *sizes: plan.dataclasses.replace(choose(*sizes), **numbers))

    return use


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((1, 70, 2, 64, 64), {}),
        ((1, 20, 4, 32, 16), {"groups": 2, "optional": ("D", "initial_state")}),
        ((1, 20, 1, 16, 16), {"optional": ()}),
        ((2, 1, 8, 16, 16), {"optional": ("initial_state", "delta_bias")}),
        ((1, 64, 1, 80, 130), {"optional": ("initial_state",), "rates": (-6, -4)}),
    ],
    ids=["all features", "two groups", "bare", "one token", "wide"],
)
def test_interpreted_kernels_compute_the_definition_and_its_gradient(dims, options):
    assert_right(make_inputs(*dims, **options))


def test_parts_of_a_long_sequence_join_to_the_whole(use_plan):
    use_plan(parts=3)
    # Of three chunks, three and one.
    assert_right(make_inputs(1, 7 * 64, 1, 16, 8, optional=("initial_state",), rates=(-6, 0)))


@pytest.mark.slow
def test_heads_need_not_fill_the_blocks(use_plan):
    use_plan(forward=(2, 2), states=(2, 2), splits=3, stages=1)
    assert_right(make_inputs(1, 3 * 64, 3, 16, 8, optional=("D",)))


def test_step_sizes_are_limited_and_taken_as_they_are_without_the_softplus():
    inputs = make_inputs(1, 30, 2, 16, 8, optional=())
    inputs = inputs._replace(delta=jnp.abs(inputs.delta) / 10)
    assert_right(inputs, delta_softplus=False, delta_limit=(0.02, 0.1))


def test_step_sizes_of_zero_have_gradients_too():
    inputs = make_inputs(1, 64, 1, 16, 8, optional=("initial_state",))
    skipped = np.random.default_rng(0).random(inputs.delta.shape) < 0.5
    inputs = inputs._replace(delta=jnp.where(skipped, 0.0, jnp.abs(inputs.delta)))
    # Without a lower limit of zero, where the limit's slope would be in question.
    assert_right(inputs, delta_softplus=False, delta_limit=(-1.0, math.inf))


def mixed_decays(length):
    """Inputs whose heads mix decays of 1e-30 and of 1 - 1e-6, and end with some of the latter."""
    inputs = make_inputs(1, length, 1, 16, 8, optional=("initial_state",))
    random = np.random.default_rng(0)
    forgets = random.random(inputs.delta.shape) < 0.2
    delta = np.where(forgets, random.uniform(30, 69, forgets.shape), random.uniform(1e-6, 1e-2, forgets.shape))
    delta[:, -30:] = 1e-6
    return inputs._replace(A=-jnp.ones(1), delta=jnp.asarray(delta, jnp.float32))


def test_tokens_that_forget_everything_do_not_blur_those_that_forget_nothing():
    assert_right(mixed_decays(128), delta_softplus=False)


def test_sums_of_decays_are_rounded_once():
    random = np.random.default_rng(0)
    shape = (1, 128, 3)
    log_decay = -np.where(random.random(shape) < 0.3, random.uniform(0, 100, shape), random.uniform(0, 1e-3, shape))
    with plgpu.force_gpu_interpret_mode():
        packed = jax.jit(tokens.pack)(jnp.ones(shape, jnp.float32), jnp.asarray(log_decay, jnp.float32))
    # The logarithm to base 2 is rounded before it is added up.
    terms = np.asarray(jnp.asarray(log_decay, jnp.float32) * jnp.float32(np.log2(np.e)), np.float64)
    expected = np.cumsum(terms.reshape(1, 2, 64, 3), axis=2).transpose(0, 3, 1, 2)
    totals = np.asarray(packed[:, :3, :, 0])
    assert (np.abs(totals - expected) <= 0.501 * np.spacing(np.abs(totals))).all()
    np.testing.assert_array_equal(packed[:, :3, :, 1], totals)
    np.testing.assert_array_equal(packed[:, :3, :, 2], 1)


@pytest.mark.slow
def test_vmap_is_a_loop():
    instances = [make_inputs(1, 20, 1, 16, 8, optional=("D",), seed=seed) for seed in range(2)]
    run = functools.partial(mosaic_gpu.ssd, **OPTIONS)
    assert_vmap_is_a_loop(run, instances, ("D",), rtol=1e-2, atol=1e-5)


def lower_with_gradient(dims, groups=1):
    batch, length, heads, head_dim, state = dims

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    token, matrix = array(batch, length, heads, head_dim), array(batch, length, groups, state)
    per_head = array(heads, dtype=jnp.float32)
    D = array(heads, head_dim, dtype=jnp.float32)
    inputs = Inputs(token, array(batch, length, heads), per_head, matrix, matrix, D, None, per_head)
    state_type = array(batch, heads, head_dim, state, dtype=jnp.float32)
    run = functools.partial(values_and_gradients, mosaic_gpu.ssd, **OPTIONS)
    return jax.jit(run).trace(inputs, (token, state_type)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dims", BENCHMARK_SHAPES, ids=str)
def test_benchmark_shapes_lower_for_cuda(dims):
    assert lower_with_gradient(dims).count("custom_call @mosaic_gpu") >= 4


@pytest.mark.parametrize(("head_dim", "state", "groups"), [(32, 16, 2), (96, 192, 1), (128, 256, 4)], ids=str)
def test_other_sizes_lower_for_cuda(head_dim, state, groups):
    assert "mosaic_gpu" in lower_with_gradient((2, 1000, 4, head_dim, state), groups)


def plan_for(batch, length, heads, _, state):
    return plan.choose(batch, length // 64, heads, 1, state)


def test_a_long_sequence_of_few_heads_is_split_into_parts():
    large, medium, long = (plan_for(*dims) for dims in BENCHMARK_SHAPES)
    assert large.parts == medium.parts == 1
    assert long.parts > 1
    chunks_per_part = math.ceil(2048 / long.parts)
    assert (long.parts - 1) * chunks_per_part < 2048, "the last part is empty"


def test_heads_are_split_where_there_are_few_chunks():
    assert plan_for(8, 2048, 80, 64, 128).splits == 1
    assert plan_for(1, 1024, 24, 64, 128).splits > 1


def test_one_state_a_chunk_is_saved_in_16_bits():
    inputs = make_inputs(2, 130, 2, 64, 64, optional=("D",))
    arrays = {"x": inputs.x, "delta": inputs.delta.astype(jnp.float32), "B": inputs.B, "C": inputs.C, "D": inputs.D}
    arrays["log_decay"] = arrays["delta"]
    _, vjp = jax.eval_shape(lambda arrays: jax.vjp(mosaic_gpu._scan, arrays), arrays)
    *kept, states, tokens = jax.tree.leaves(vjp)
    assert sum(array.size for array in kept) == sum(array.size for array in arrays.values())
    assert states.shape == (2, 2, 3, 64, 64)
    assert states.dtype == jnp.bfloat16
    assert tokens.shape == (2, 32, 3, 3, 64)


class TestRefusals(RefusalContract):
    kernels, options = mosaic_gpu, OPTIONS

    def inputs(self):
        return make_inputs(1, 4, 1, 8, 4)

    def test_larger_states_are_left_to_xla(self, no_shape_checks):
        inputs = self.inputs()._replace(B=jnp.zeros((1, 4, 1, 300), jnp.bfloat16))
        assert self.reason(inputs=inputs) == "state must be at most 256, got 300; implementation='xla' takes any"


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4097])
def test_any_length_on_a_gpu(length):
    assert_right(make_inputs(2, length, 6, 64, 128, groups=2), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "state"),
    [
        (32, 16),
        (32, 256),
        (64, 1),
        (64, 64),
        (64, 100),
        (64, 128),
        (64, 192),
        (64, 256),
        (96, 128),
        (128, 64),
        (128, 256),
    ],
)
def test_any_size_on_a_gpu(head_dim, state):
    assert_right(make_inputs(1, 200, 5, head_dim, state), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("state", [(), ("initial_state",)], ids=["as in training", "with states"])
@pytest.mark.parametrize(
    ("batch", "length", "heads"), [(4, 192, 80), (8, 192, 24), (1, 4096, 24), (3, 300, 7), (2, 1000, 1)]
)
def test_every_plan_on_a_gpu(batch, length, heads, state):
    assert_right(make_inputs(batch, length, heads, 64, 128, optional=("D", "delta_bias", *state)), interpret=False)


@pytest.mark.gpu
def test_decays_of_every_size_in_one_head_on_a_gpu():
    assert_right(mixed_decays(2000), interpret=False, delta_softplus=False)


@pytest.mark.gpu
def test_a_scalar_A_is_a_selective_scan_whose_channels_share_it_on_a_gpu():
    inputs = make_inputs(2, 1000, 4, 32, 16, groups=2, optional=("D", "delta_bias", "initial_state"))
    y, state = mosaic_gpu.ssd(inputs, **OPTIONS)

    def channels(array):
        return jnp.repeat(array, 32, axis=-1)

    expanded = SelectiveScanInputs(
        x=inputs.x.reshape(2, 1000, 128),
        delta=channels(inputs.delta),
        A=jnp.tile(channels(inputs.A)[:, None], (1, 16)),
        B=inputs.B,
        C=inputs.C,
        D=inputs.D.reshape(128),
        delta_bias=channels(inputs.delta_bias),
        initial_state=inputs.initial_state.reshape(2, 128, 16),
    )
    expected = selective_scan_kernels.selective_scan(expanded, delta_softplus=True)
    for result, truth in zip((y.reshape(2, 1000, 128), state.reshape(2, 128, 16)), expected, strict=True):
        result, truth = np.asarray(result, np.float64), np.asarray(truth, np.float64)
        assert np.linalg.norm(result - truth) <= 5e-3 * np.linalg.norm(truth)


@pytest.mark.gpu
def test_a_long_memory_does_not_drift_on_a_gpu():
    length = 131_072
    inputs = make_inputs(1, length, 1, 64, 16, optional=())
    delta = jnp.asarray(np.random.default_rng(0).uniform(1e-4, 1e-3, size=(1, length, 1)), jnp.float32)
    arrays = {"x": inputs.x, "delta": delta, "log_decay": -delta, "B": inputs.B, "C": inputs.C}
    states = jax.jit(lambda a: mosaic_gpu.forward_pass(call.Call(a), a, save_states=True)["states"])(arrays)
    x, delta, B = (np.asarray(a, np.float64)[0, :, 0] for a in (inputs.x, delta[..., None], inputs.B))
    expected, errors = np.zeros((64, 16)), []
    for t in range(length):
        if t % 8192 == 8128:
            state = np.asarray(states[0, 0, t // 64, :, :16], np.float64)
            errors.append(np.linalg.norm(state - expected) / np.linalg.norm(expected))
        expected = np.exp(-delta[t]) * expected + (delta[t] * x[t])[:, None] * B[t]
    # By position, every 8192 tokens: as small at the end as at the start.
    assert max(errors) < 5e-3, errors
