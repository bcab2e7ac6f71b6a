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
from pallas_kernels.ssd.mosaic_gpu import call, plan

OPTIONAL = ("D", "z", "delta_bias", "segment_ids", "initial_state")
BENCHMARK_SHAPES = ((8, 2048, 80, 64, 128), (8, 2048, 24, 64, 128), (1, 131072, 24, 64, 128))
OPTIONS = {"delta_softplus": True, "delta_limit": (0.0, math.inf), "chunk_size": None}


def make_inputs(batch, length, heads, head_dim, state, *, groups=1, optional=OPTIONAL, rates=(-6, 4)):
    """Fresh random inputs; decay rates are e to a power between ``rates``."""
    random = np.random.default_rng()

    def tokens(*dims):
        return jnp.asarray(random.normal(size=dims)).astype(jnp.bfloat16)

    def floats(*dims):
        return jnp.asarray(random.normal(size=dims), jnp.float32)

    extra = {
        "D": floats(heads, head_dim),
        "z": tokens(batch, length, heads, head_dim),
        "delta_bias": floats(heads) - 3,
        "segment_ids": jnp.asarray(np.sort(random.integers(0, 3, size=(batch, length))), jnp.int32),
        "initial_state": floats(batch, heads, head_dim, state),
    }
    return Inputs(
        x=tokens(batch, length, heads, head_dim),
        delta=tokens(batch, length, heads),
        A=jnp.asarray(-np.exp(random.uniform(*rates, size=heads)), jnp.float32),
        B=tokens(batch, length, groups, state),
        C=tokens(batch, length, groups, state),
        **{name: array for name, array in extra.items() if name in optional},
    )


def definition(inputs, *, delta_softplus=True, delta_limit=(0.0, math.inf), chunk_size=None):
    """The operator as the paper writes it, in the precision of its inputs."""
    del chunk_size
    heads, groups = inputs.x.shape[2], inputs.B.shape[2]
    delta = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias
    delta = jnp.clip(jnp.logaddexp(delta, 0.0) if delta_softplus else delta, *delta_limit)
    group = np.arange(heads) // (heads // groups)
    ids = inputs.segment_ids
    keep = jnp.ones(inputs.x.shape[:2]) if ids is None else jnp.diff(ids, axis=1, prepend=ids[:, :1]) == 0

    def step(h, token):
        x, delta, B, C, keep = token
        decay = jnp.exp(delta * inputs.A) * keep[:, None]
        h = decay[..., None, None] * h + (delta[..., None] * x)[..., None] * B[:, group, None]
        return h, jnp.sum(C[:, group, None] * h, axis=-1)

    h = inputs.initial_state
    h = jnp.zeros((*inputs.x.shape[::2], *inputs.x.shape[3:], inputs.B.shape[3]), inputs.x.dtype) if h is None else h
    tokens = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (inputs.x, delta, inputs.B, inputs.C, keep))
    h, y = jax.lax.scan(step, h, tokens)
    y = jnp.swapaxes(y, 0, 1)
    y = y if inputs.D is None else y + inputs.D * inputs.x
    return (y if inputs.z is None else y * inputs.z / (1 + jnp.exp(-inputs.z))), h


def values_and_gradients(run, inputs, dy, dstate, **options):
    """All results by name: y, the final state, and the gradient of every floating-point input."""
    arrays = {name: a for name, a in inputs._asdict().items() if a is not None and name != "segment_ids"}
    (y, state), vjp = jax.vjp(lambda a: run(inputs._replace(**a), **OPTIONS | options), arrays)
    (gradients,) = vjp((dy, dstate))
    return {"y": y, "final_state": state} | {f"d{name}": gradient for name, gradient in gradients.items()}


def cotangents(inputs):
    random = np.random.default_rng()
    state = (*inputs.x.shape[::2], *inputs.x.shape[3:], inputs.B.shape[3])
    return (
        jnp.asarray(random.normal(size=inputs.x.shape)).astype(inputs.x.dtype),
        jnp.asarray(random.normal(size=state), jnp.float32),
    )


def in_float64(run, *arguments):
    """Calls a function on the same numbers in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, arguments)
        return jax.tree.map(np.asarray, jax.jit(run)(*wide))


def relative_error(actual, expected):
    actual = np.asarray(actual, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def assert_right(inputs, *, interpret=True, **options):
    """Compares values and gradients with the definition in float64, to the bar of the design."""
    dy, dstate = cotangents(inputs)
    run = jax.jit(functools.partial(values_and_gradients, mosaic_gpu.ssd, **options))
    if interpret:
        with plgpu.force_gpu_interpret_mode():
            results = run(inputs, dy, dstate)
    else:
        results = run(inputs, dy, dstate)
        again = run(inputs, dy, dstate)
        for name, array in results.items():
            assert (array == again[name]).all(), f"{name} differs from run to run"
    expected = in_float64(functools.partial(values_and_gradients, definition, **options), inputs, dy, dstate)
    for name, array in results.items():
        bar = 5e-3 if name in ("y", "final_state") else 1e-2
        error = relative_error(array, expected[name])
        assert error <= bar, f"{name}: relative error {error:.1e}, allowed {bar:.0e}"


@pytest.fixture
def use_plan(monkeypatch):
    """Replaces numbers of the plan that a call gets."""

    def use(**numbers):
        choose = plan.choose
        monkeypatch.setattr(
            plan, "choose", lambda *sizes: plan.dataclasses.replace(choose(*sizes), **numbers)
        )

    return use


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((1, 130, 4, 64, 64), {}),
        ((1, 20, 6, 32, 16), {"groups": 2, "optional": ("D",)}),
        ((2, 1, 3, 65, 1), {"optional": ("initial_state", "delta_bias")}),
        ((1, 65, 2, 16, 160), {"optional": ()}),
    ],
    ids=["all features", "two groups", "one token, wide head", "bare, wide state"],
)
def test_interpreted_kernels_compute_the_definition_and_its_gradient(dims, options):
    assert_right(make_inputs(*dims, **options))


def test_parts_of_a_long_sequence_join_to_the_whole(use_plan):
    use_plan(parts=3)
    assert_right(make_inputs(1, 6 * 64, 2, 16, 8, optional=("initial_state",), rates=(-6, 0)))


@pytest.mark.slow
def test_a_block_takes_fewer_heads_than_it_could_where_they_run_out(use_plan):
    use_plan(forward=(3, 2), states=(3, 1), splits=2, stages=1)
    assert_right(make_inputs(1, 130, 4, 16, 8, optional=("D",)))


def test_step_sizes_are_limited_and_taken_as_they_are_without_the_softplus():
    inputs = make_inputs(1, 70, 2, 16, 8, optional=())
    inputs = inputs._replace(delta=jnp.abs(inputs.delta) / 10)
    assert_right(inputs, delta_softplus=False, delta_limit=(0.02, 0.1))
