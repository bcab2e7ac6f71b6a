"""The SSD operator against a loop over tokens in NumPy, float64, and the laws that any correct form of it obeys."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.implementation import UnsupportedError
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd, ssd_step
from tests.pallas_kernels.comparison import (
    assert_close,
    assert_works_under_vmap_scan_and_checkpoint,
    exact,
    relative_error,
    weighted_sum,
)

IMPLEMENTATIONS = ("reference", "xla")
SEQUENCES = ("x", "delta", "B", "C", "z")


def loop(
    x, delta, A, B, C, D=None, z=None, *, delta_bias=None, delta_limit=(0, math.inf), segment_ids=None,
    initial_state=None,
):  # fmt: skip
    """The definition, with the softplus, one token after the other."""
    batch, length, heads, head_dim = x.shape
    group = np.arange(heads) // (heads // B.shape[2])
    delta = np.clip(np.logaddexp(0, delta if delta_bias is None else delta + delta_bias), *delta_limit)
    h = np.zeros((batch, heads, head_dim, B.shape[3])) if initial_state is None else initial_state
    y = np.empty_like(x)
    for t in range(length):
        if segment_ids is not None and t > 0:
            h = h * (segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None, None]
        h = np.exp(delta[:, t] * A)[..., None, None] * h
        h = h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, group, None]
        y[:, t] = np.sum(h * C[:, t, group, None], axis=-1)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * x
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return y, h


def make_inputs(
    batch=2, length=8, heads=4, head_dim=3, state=5, *, groups=1, D_per_channel=False, bare=False, segments=True
):
    """Random inputs in float64: all of the operator's arrays, or with ``bare`` only those it must have."""
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(batch, length, heads, head_dim)),
        "delta": rng.normal(size=(batch, length, heads)) - 2,
        "A": -np.exp(rng.normal(size=heads)),
        "B": rng.normal(size=(batch, length, groups, state)),
        "C": rng.normal(size=(batch, length, groups, state)),
    }
    if not bare:
        inputs |= {
            "D": rng.normal(size=(heads, head_dim) if D_per_channel else heads),
            "z": rng.normal(size=(batch, length, heads, head_dim)),
            "delta_bias": rng.normal(size=heads),
            "initial_state": rng.normal(size=(batch, heads, head_dim, state)),
        }
    segment_ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) if segments and not bare else None
    return inputs, segment_ids


def cast(inputs, dtype):
    """Rounds inputs to a dtype, decay rates and states to no less than single precision."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {
        name: jnp.asarray(value, wide if name in ("A", "initial_state") else dtype) for name, value in inputs.items()
    }


_OPTIONS = ("implementation", "chunk_size", "delta_limit", "delta_softplus")


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def run(inputs, segment_ids=None, **options):
    return ssd(**inputs, segment_ids=segment_ids, **{"delta_softplus": True, "return_final_state": True} | options)


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def gradients(inputs, segment_ids, **options):
    """Gradients of ``weighted_sum`` of the outputs, in the precision of the inputs."""
    return jax.grad(lambda inputs: weighted_sum(run(inputs, segment_ids, **options)))(inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "state", "groups"),
    [(1, 2, 64, 16, 1), (2, 1, 130, 1, 1), (63, 6, 32, 8, 3), (65, 4, 64, 128, 1), (1000, 2, 8, 256, 2)],
)
def test_equals_the_loop_at_any_size(length, heads, head_dim, state, groups, implementation):
    inputs, segment_ids = make_inputs(2, length, heads, head_dim, state, groups=groups)
    inputs = cast(inputs, jnp.float32)
    outputs = run(inputs, segment_ids, implementation=implementation)
    assert_close(outputs, loop(**exact(inputs), segment_ids=segment_ids), 1e-5)
    assert outputs[0].dtype == outputs[1].dtype == jnp.float32


@settings(max_examples=8)
@given(
    sizes=st.tuples(*(st.integers(1, largest) for largest in (3, 80, 3, 5, 5))),
    groups=st.sampled_from([1, 2]),
    chunk_size=st.none() | st.integers(1, 100),
    D_per_channel=st.booleans(),
    bare=st.booleans(),
)
def test_equals_the_loop_with_any_options(sizes, groups, chunk_size, D_per_channel, bare):
    batch, length, heads, head_dim, state = sizes
    inputs, segment_ids = make_inputs(
        batch, length, 2 * heads, head_dim, state, groups=groups, D_per_channel=D_per_channel, bare=bare
    )
    inputs = cast(inputs, jnp.float32)
    limit = (0.05, 0.2)
    outputs = run(inputs, segment_ids, implementation="xla", chunk_size=chunk_size, delta_limit=limit)
    assert_close(outputs, loop(**exact(inputs), segment_ids=segment_ids, delta_limit=limit), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_inputs_round_no_more_than_they_must(implementation):
    inputs, segment_ids = make_inputs(length=300, heads=8, head_dim=16, state=32)
    inputs = cast(inputs, jnp.bfloat16)
    y, final_state = run(inputs, segment_ids, implementation=implementation)
    expected_y, expected_state = loop(**exact(inputs), segment_ids=segment_ids)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, expected_y) < 5e-3
    assert final_state.dtype == jnp.float32
    assert relative_error(final_state, expected_state) < 5e-3


def test_gradients_of_low_precision_inputs_stay_close():
    inputs, segment_ids = make_inputs(length=300, heads=8, head_dim=16, state=32)
    inputs = cast(inputs, jnp.bfloat16)
    wide = {name: jnp.asarray(value, jnp.float32) for name, value in inputs.items()}
    expected = gradients(wide, segment_ids, implementation="reference")
    for name, gradient in gradients(inputs, segment_ids, implementation="xla").items():
        assert relative_error(gradient, expected[name]) < 1e-2, name


@pytest.mark.parametrize("D_per_channel", [False, True])
def test_gradients_of_the_reference_are_the_slopes_of_the_loop(D_per_channel):
    inputs, segment_ids = make_inputs(groups=2, D_per_channel=D_per_channel)
    limit = (0.05, 0.3)
    with jax.enable_x64(True):
        gradient = gradients(cast(inputs, jnp.float64), segment_ids, implementation="reference", delta_limit=limit)
        for name, value in inputs.items():
            direction = np.random.default_rng(1).normal(size=value.shape)
            ends = [
                weighted_sum(
                    loop(**inputs | {name: value + step * direction}, segment_ids=segment_ids, delta_limit=limit)
                )
                for step in (1e-6, -1e-6)
            ]
            np.testing.assert_allclose(np.sum(gradient[name] * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_gradients_equal_those_of_the_reference(chunk_size):
    inputs, segment_ids = make_inputs(length=150, heads=4, head_dim=8, state=16, groups=2, D_per_channel=True)
    with jax.enable_x64(True):
        expected = gradients(cast(inputs, jnp.float64), segment_ids, implementation="reference")
    for name, gradient in gradients(
        cast(inputs, jnp.float32), segment_ids, implementation="xla", chunk_size=chunk_size
    ).items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_the_chunk_size_changes_nothing_but_rounding():
    inputs, segment_ids = make_inputs(length=70)
    inputs = cast(inputs, jnp.float32)
    expected = run(inputs, segment_ids, implementation="xla")
    for chunk_size in (1, 16, 69, 1000):
        assert_close(run(inputs, segment_ids, implementation="xla", chunk_size=chunk_size), expected, 1e-5)


def test_a_scalar_A_is_a_selective_scan_whose_channels_share_it():
    inputs, segment_ids = make_inputs(length=150, heads=4, head_dim=6, state=8, groups=2, D_per_channel=True)
    inputs = cast(inputs, jnp.float32)
    y, final_state = run(inputs, segment_ids, implementation="xla")

    def channels(array):
        """(..., heads, head_dim) to (..., channels)."""
        return array.reshape(*array.shape[:-2], -1)

    def shared(array):
        """(..., heads) to (..., channels)."""
        return jnp.repeat(array, 6, axis=-1)

    expected_y, expected_state = selective_scan(
        channels(inputs["x"]),
        shared(inputs["delta"]),
        jnp.tile(shared(inputs["A"])[:, None], (1, 8)),
        inputs["B"],
        inputs["C"],
        channels(inputs["D"]),
        channels(inputs["z"]),
        delta_bias=shared(inputs["delta_bias"]),
        delta_softplus=True,
        segment_ids=jnp.asarray(segment_ids),
        initial_state=inputs["initial_state"].reshape(2, 24, 8),
        return_final_state=True,
    )
    assert_close((channels(y), final_state.reshape(2, 24, 8)), (expected_y, expected_state), 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2000])
def test_tokens_that_forget_everything_do_not_blur_those_that_forget_nothing(chunk_size):
    # Decays of 1e-30 and of 1 - 1e-6 in the same head: behind some of the former, a sum of logarithms in float32 is too
    # coarse to tell the latter from 0.999.
    inputs, _ = make_inputs(length=2000, bare=True)
    rng = np.random.default_rng(0)
    forgets = rng.random(inputs["delta"].shape) < 0.2
    inputs["delta"] = np.where(forgets, rng.uniform(30, 69, forgets.shape), rng.uniform(1e-6, 1e-2, forgets.shape))
    inputs["delta"][:, -30:] = 1e-6
    inputs["A"] = -np.ones(4)
    inputs = cast(inputs, jnp.float32)
    expected = loop(**exact(inputs) | {"delta": np.log(np.expm1(exact(inputs)["delta"]))})
    outputs = run(inputs, implementation="xla", delta_softplus=False, chunk_size=chunk_size)
    assert_close(outputs, expected, 1e-5)


def test_a_long_memory_in_bfloat16_does_not_drift():
    length, period = 131_072, 8192
    rng = np.random.default_rng(0)
    inputs = cast(
        {
            "x": rng.normal(size=(1, length, 1, 4)),
            "delta": rng.uniform(1e-4, 1e-3, size=(1, length, 1)),
            "A": -np.ones(1),
            "B": rng.normal(size=(1, length, 1, 8)),
            "C": rng.normal(size=(1, length, 1, 8)),
        },
        jnp.bfloat16,
    )
    truth = exact(inputs)
    increment = (truth["delta"][..., None] * truth["x"])[0, :, 0, :, None] * truth["B"][0, :, 0, None]
    decay = np.exp(-truth["delta"][0, :, 0])

    state, expected, errors = None, np.zeros((4, 8)), []
    for start in range(0, length, period):
        part = {name: array if name == "A" else array[:, start : start + period] for name, array in inputs.items()}
        _, state = run(part, implementation="xla", delta_softplus=False, initial_state=state)
        for t in range(start, start + period):
            expected = decay[t] * expected + increment[t]
        errors.append(relative_error(state[0, 0], expected))
    # By position, every 8192 tokens: as small at the end as at the start.
    assert max(errors) < 5e-3, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [1, 33, 69])
def test_a_sequence_may_be_cut_anywhere(cut, implementation):
    inputs, segment_ids = make_inputs(length=70)
    segment_ids[:, cut] = segment_ids[:, cut - 1]
    inputs = cast(inputs, jnp.float32)
    y, final_state = run(inputs, segment_ids, implementation=implementation)
    first = inputs | {name: inputs[name][:, :cut] for name in SEQUENCES}
    second = inputs | {name: inputs[name][:, cut:] for name in SEQUENCES}
    y_1, state = run(first, segment_ids[:, :cut], implementation=implementation)
    y_2, state = run(second | {"initial_state": state}, segment_ids[:, cut:], implementation=implementation)
    assert_close((jnp.concatenate([y_1, y_2], axis=1), state), (y, final_state), 1e-5)


@pytest.mark.parametrize("options", [{}, {"groups": 2, "D_per_channel": True}, {"bare": True}])
def test_steps_equal_the_whole_sequence(options):
    inputs, _ = make_inputs(segments=False, **options)
    inputs = cast(inputs, jnp.float32)
    limit = (0.05, 0.2)
    y, final_state = run(inputs, implementation="xla", delta_limit=limit)
    state = inputs.pop("initial_state", jnp.zeros_like(final_state))
    for t in range(y.shape[1]):
        token = inputs | {name: inputs[name][:, t] for name in SEQUENCES if name in inputs}
        y_t, state = ssd_step(state, **token, delta_softplus=True, delta_limit=limit)
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_packed_documents_do_not_see_each_other(chunk_size):
    inputs, _ = make_inputs(length=20)
    inputs = cast(inputs, jnp.float32)
    segment_ids = jnp.repeat(jnp.array([[7, 3, 7]]), jnp.array([6, 9, 5]), axis=1).repeat(2, axis=0)
    last = {name: inputs[name][:, 15:] for name in SEQUENCES} | {"initial_state": None}
    alone = run(inputs | last, implementation="xla")
    packed, state = run(inputs, segment_ids, implementation="xla", chunk_size=chunk_size)
    assert_close((packed[:, 15:], state), alone, 1e-5)


def test_two_runs_are_bit_identical():
    inputs, segment_ids = make_inputs(length=150)
    inputs = cast(inputs, jnp.float32)
    for first, second in zip(
        *(gradients(inputs, segment_ids, implementation="xla").values() for _ in range(2)), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def test_works_under_vmap_scan_and_checkpoint():
    inputs, _ = make_inputs(batch=3, length=4, segments=False)
    assert_works_under_vmap_scan_and_checkpoint(run, cast(inputs, jnp.float32))


def test_mistakes_name_the_argument_and_what_would_fit(no_shape_checks):
    inputs, _ = make_inputs(bare=True)
    inputs = cast(inputs, jnp.float32)
    x = inputs["x"]
    for wrong, message in [
        (
            {"delta": inputs["delta"][:, :5]},
            r"delta must be \(batch, length, heads\) with length 8 as in x, got shape \(2, 5, 4\)",
        ),
        ({"x": x[0]}, r"x must be \(batch, length, heads, head_dim\), got shape \(8, 4, 3\)"),
        ({"x": x[:0]}, "x has no elements: .* batch must be at least 1"),
        ({"A": inputs["A"].astype(int)}, "A must be floating-point, got int32"),
        ({"A": inputs["A"][:, None]}, r"A must be \(heads\), got shape \(4, 1\)"),
        ({"B": inputs["B"][:, :, 0]}, r"B must be \(batch, length, groups, state\), got shape"),
        ({"C": inputs["C"][..., :2]}, "C must be .* with state 5 as in B"),
        ({"B": inputs["B"].repeat(3, 2), "C": inputs["C"].repeat(3, 2)}, "multiple of groups, got 4 heads and 3"),
        ({"D": jnp.ones(3)}, "D must be .* with heads 4"),
        ({"D": jnp.ones((4, 2))}, "D must be .* with head_dim 3"),
        ({"z": x[:1]}, "z must be"),
        ({"delta_bias": jnp.ones((4, 1))}, "delta_bias must be"),
        ({"delta_limit": (0.5, 0.1)}, r"delta_limit must be .* got \(0.5, 0.1\)"),
        ({"delta_limit": (-1.0, 1.0)}, r"delta_limit must be .* got \(-1.0, 1.0\)"),
        ({"chunk_size": 0}, "chunk_size must be None or at least 1, got 0"),
        ({"segment_ids": jnp.ones((2, 8))}, "segment_ids must be integer, got float32"),
        ({"initial_state": jnp.ones((2, 4, 3, 2))}, "initial_state must be .* with state 5"),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            ssd(**(inputs | wrong))


def test_a_named_implementation_never_falls_back():
    inputs, _ = make_inputs(bare=True)
    with pytest.raises(UnsupportedError, match=r"'mosaic_gpu' cannot run this call: x, B and C must be bfloat16"):
        run(cast(inputs, jnp.float32), implementation="mosaic_gpu")
