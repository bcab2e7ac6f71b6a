"""The trapezoidal SSD operator's GPU kernels: interpreted on a CPU, lowered for CUDA, and run where there is a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu_compat import plgpu
from pallas_kernels.ssd.mosaic_gpu import plan as ssd_plan
from pallas_kernels.trapezoidal_ssd import mosaic_gpu, reference
from pallas_kernels.trapezoidal_ssd.inputs import Inputs
from pallas_kernels.trapezoidal_ssd.mosaic_gpu import angles, plan
from tests.pallas_kernels.kernel_results import (
    assert_vmap_is_a_loop,
    assert_within,
    norms,
    run_kernels,
    values_and_gradients,
    widened,
)
from tests.pallas_kernels.random_arrays import RandomArrays
from tests.pallas_kernels.refusals import RefusalContract

BENCHMARK_SHAPES = ((8, 2048, 80, 64, 128), (8, 2048, 24, 64, 128), (1, 131072, 24, 64, 128))
OPTIONS = {"delta_softplus": True, "norm_epsilon": 1e-5, "chunk_size": None}
PARAMETERS = ("D", "delta_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "norm_weight")
ALL = (*PARAMETERS, "z", "segment_ids", "initial_state")
WITHOUT_NORM = tuple(name for name in ALL if name != "norm_weight")
RESULTS = ("y", "ssm", "B", "x")


def make_inputs(
    batch, length, heads, head_dim, state, *, groups=1, rank=1, pairs=None, optional=WITHOUT_NORM, rate=2.0, seed=0
):
    """Random inputs, with the optional ones that are named; decay rates are e to some multiple of ``rate``."""
    random = RandomArrays(seed, batch, length, heads, head_dim, state)
    tokens, floats = random.tokens, random.floats
    pairs = state // 4 if pairs is None else pairs
    extra = {
        "D": floats(heads, head_dim),
        "z": tokens(batch, length, heads, head_dim),
        "delta_bias": floats(heads) - 3,
        **{name: floats(heads, rank, state) for name in ("B_bias", "C_bias")},
        **{name: floats(heads, rank, head_dim) if rank > 1 else None for name in ("mimo_x", "mimo_z", "mimo_o")},
        "norm_weight": floats(heads, head_dim),
        "segment_ids": random.segment_ids(batch, length),
    }
    initial_state = {
        "initial_ssm": floats(batch, heads, head_dim, state),
        "initial_B": floats(batch, heads, rank, state),
        "initial_x": floats(batch, heads, head_dim),
    }
    return Inputs(
        x=tokens(batch, length, heads, head_dim),
        delta=tokens(batch, length, heads),
        A=-jnp.exp(rate * floats(batch, length, heads)),
        B=tokens(batch, length, groups, rank, state),
        C=tokens(batch, length, groups, rank, state),
        lambda_=random.uniform(batch, length, heads),
        theta=2 * floats(batch, length, pairs),
        **{name: array if name in optional else None for name, array in extra.items()},
        **{name: array if "initial_state" in optional else None for name, array in initial_state.items()},
    )


def cotangents(inputs):
    """Of all results; without a state before nothing depends on the one after either, as in training."""
    random = RandomArrays(0, dtype=inputs.x.dtype)
    dy, *state = random.tokens(*inputs.x.shape), *(random.floats(*part.shape) for part in inputs.initial_state())
    return (dy, *state) if inputs.initial_ssm is not None else (dy, None, *state[1:])


def compute(run, **options):
    """Returns a function of inputs and cotangents that computes all results by name."""
    return functools.partial(values_and_gradients, run, values=RESULTS, **OPTIONS | options)


def expected_and_scales(inputs, seeds, **options):
    """The results of the recurrence in float64, and what their errors are measured by: their norm.

    The gradient of delta_bias is a few numbers, sums over all tokens, which may cancel though their terms err alike.
    Its error is measured by the sum of their sizes.
    """
    with jax.enable_x64(True):
        results = jax.jit(compute(reference.trapezoidal_ssd, **options))(*widened((inputs, seeds)))
        sizes = dict(results)
        if "ddelta_bias" in results:
            sizes["ddelta_bias"] = jnp.sum(jnp.abs(results["ddelta"]), axis=(0, 1))
    return results, norms(sizes)


def assert_right(inputs, *, interpret=True, **options):
    """Compares values and gradients with the recurrence in float64, to the bar of the design.

    Outputs of several ranks are mixed, and those with an RMSNorm normalised, after they were rounded, and so are their
    gradients: there the bar is twice as high. Behind a norm gradients are orthogonal to y, so that those of B and C may
    nearly cancel; the seeds are of inputs where they do not.
    """
    slack = 1 if inputs.norm_weight is None and inputs.mimo_o is None else 2
    seeds = cotangents(inputs)
    results = run_kernels(compute(mosaic_gpu.trapezoidal_ssd, **options), inputs, seeds, interpret=interpret)
    expected = expected_and_scales(inputs, seeds, **options)
    assert_within(lambda name: slack * (5e-3 if name in RESULTS else 1e-2), results, *expected)


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((1, 100, 2, 64, 32), {}),
        ((1, 40, 2, 16, 9), {"rank": 3, "pairs": 4, "groups": 2}),
        ((1, 20, 2, 16, 9), {"rank": 2, "pairs": 4, "optional": ALL}),
        ((2, 1, 6, 80, 16), {"optional": ("initial_state",), "pairs": 8}),
        ((1, 2, 1, 16, 8), {"optional": ()}),
        ((1, 70, 2, 16, 200), {"pairs": 100}),
        ((1, 20, 2, 16, 250), {"pairs": 40, "rank": 3}),
    ],
    ids=["all but a norm", "three ranks, two groups", "a norm", "one token", "bare", "in parts", "a part that stands"],
)
def test_interpreted_kernels_compute_the_recurrence_and_its_gradient(dims, options):
    assert_right(make_inputs(*dims, **options))


@pytest.mark.slow
def test_parts_of_a_long_sequence_join_to_the_whole(monkeypatch):
    choose = ssd_plan.choose
    monkeypatch.setattr(ssd_plan, "choose", lambda *sizes: dataclasses.replace(choose(*sizes), parts=3))
    assert_right(make_inputs(1, 5 * 64, 1, 16, 8, optional=("initial_state",), rate=1.0))


@pytest.mark.slow
def test_angles_are_as_precise_behind_many_turns_as_their_terms():
    random = np.random.default_rng(0)
    step_size, theta = np.ones((1, 1024, 1), np.float32), random.uniform(0, 200, (1, 1024, 32)).astype(np.float32)
    with plgpu.force_gpu_interpret_mode():
        sums = jax.jit(functools.partial(angles.sums, tokens=64))(jnp.asarray(step_size), jnp.asarray(theta))
    half_turns = np.asarray(sums, float)[0, 0].reshape(1024, 32) * (2 / 2**16)
    difference = half_turns - np.cumsum(theta[0].astype(float), axis=0)
    # The integers' own step is 3e-5.
    assert np.abs((difference + 1) % 2 - 1).max() < 1e-4


@pytest.mark.slow
def test_vmap_is_a_loop():
    instances = [make_inputs(1, 20, 2, 16, 8, optional=("B_bias", "C_bias"), seed=seed) for seed in range(2)]
    run = functools.partial(mosaic_gpu.trapezoidal_ssd, **OPTIONS)
    assert_vmap_is_a_loop(run, instances, ("C_bias",), rtol=1e-2, atol=1e-4)


def lower_with_gradient(dims, rank=1, groups=1, pairs=None):
    batch, length, heads, head_dim, state = dims

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def floats(*shape):
        return array(*shape, dtype=jnp.float32)

    inputs = dict.fromkeys(Inputs._fields) | {
        "x": array(batch, length, heads, head_dim),
        **{name: array(batch, length, heads) for name in ("delta", "A", "lambda_")},
        **{name: array(batch, length, groups, rank, state) for name in ("B", "C")},
        "theta": array(batch, length, state // 4 if pairs is None else pairs),
        "D": floats(heads, head_dim),
        **{name: floats(heads, rank, state) for name in ("B_bias", "C_bias")},
        "initial_ssm": floats(batch, heads, head_dim, state),
        "initial_B": floats(batch, heads, rank, state),
        "initial_x": floats(batch, heads, head_dim),
    }
    inputs = Inputs(**inputs)
    seeds = (inputs.x, inputs.initial_ssm, inputs.initial_B, inputs.initial_x)
    return (
        jax.jit(compute(mosaic_gpu.trapezoidal_ssd)).trace(inputs, seeds).lower(lowering_platforms=("cuda",)).as_text()
    )


@pytest.mark.parametrize("dims", BENCHMARK_SHAPES, ids=str)
def test_benchmark_shapes_lower_for_cuda(dims):
    assert lower_with_gradient(dims).count("custom_call @mosaic_gpu") >= 4


@pytest.mark.parametrize(
    ("batch", "chunks", "heads", "splits"),
    [(8, 32, 80, 2), (8, 32, 24, 2), (1, 2048, 24, 1), (1, 32, 24, 4), (8, 32, 16, 1), (1, 4, 1, 1)],
)
def test_blocks_of_the_backward_kernel_are_many_unless_heads_are_few(batch, chunks, heads, splits):
    assert plan.choose(batch, chunks, heads, 1, 128, 32).splits == splits


@pytest.mark.parametrize(
    ("head_dim", "state", "options"),
    [
        (32, 16, {"rank": 4}),
        (96, 190, {"groups": 2, "pairs": 11}),
        (128, 192, {"rank": 2}),
        (64, 256, {"rank": 4}),
        (64, 192, {"pairs": 96}),
    ],
    ids=str,
)
def test_other_sizes_lower_for_cuda(head_dim, state, options):
    assert "mosaic_gpu" in lower_with_gradient((2, 1000, 4, head_dim, state), **options)


class TestRefusals(RefusalContract):
    kernels, options = mosaic_gpu, OPTIONS

    def inputs(self):
        return make_inputs(1, 4, 1, 8, 4)

    @pytest.mark.parametrize(
        ("dims", "message"),
        [((1, 258), "state must be at most 256, got 258"), ((65, 8), "rank must be at most 64, got 65")],
        ids=["state", "rank"],
    )
    def test_larger_states_and_ranks_are_left_to_xla(self, dims, message, no_shape_checks):
        inputs = self.inputs()._replace(B=jnp.zeros((1, 4, 1, *dims), jnp.bfloat16))
        assert self.reason(inputs=inputs) == f"{message}; implementation='xla' takes any"


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_any_length_on_a_gpu(length, rank):
    assert_right(make_inputs(2, length, 6, 64, 128, groups=2, rank=rank), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
def test_a_norm_on_a_gpu(rank):
    assert_right(make_inputs(2, 200, 6, 64, 128, groups=2, rank=rank, optional=ALL), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("state", [2, 16, 65, 128, 192, 200, 256])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_any_size_on_a_gpu(head_dim, state):
    assert_right(make_inputs(1, 200, 5, head_dim, state, pairs=max(1, state // 4)), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("state", [(), ("initial_state",)], ids=["as in training", "with states"])
@pytest.mark.parametrize(("batch", "length", "heads"), [(4, 192, 80), (8, 192, 24), (1, 4096, 24), (3, 300, 7)])
def test_every_plan_on_a_gpu(batch, length, heads, state):
    optional = ("D", "delta_bias", "B_bias", "C_bias", *state)
    assert_right(make_inputs(batch, length, heads, 64, 128, optional=optional), interpret=False)


@pytest.mark.gpu
def test_the_state_counts_the_parity_of_many_bits_on_a_gpu():
    length = 4096
    bits = np.random.default_rng(0).integers(0, 2, size=(1, length))
    ones = jnp.ones((1, length, 1), jnp.float32)
    matrix = jnp.broadcast_to(jnp.array([1.0, 0.0], jnp.bfloat16), (1, length, 1, 1, 2))
    none = dict.fromkeys(Inputs._fields)
    inputs = none | {
        "x": jnp.zeros((1, length, 1, 1), jnp.bfloat16),
        "delta": ones,
        "A": jnp.zeros((1, length, 1)),
        "B": matrix,
        "C": matrix,
        "lambda_": ones,
        "theta": jnp.asarray(bits, jnp.float32)[..., None],
        "initial_ssm": jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2),
        "initial_B": jnp.zeros((1, 1, 1, 2)),
        "initial_x": jnp.zeros((1, 1, 1)),
    }
    y = mosaic_gpu.trapezoidal_ssd(Inputs(**inputs), **OPTIONS | {"delta_softplus": False})[0]
    np.testing.assert_allclose(np.asarray(y, float)[0, :, 0, 0], 1 - 2 * (np.cumsum(bits) % 2), rtol=1e-2)
