"""The selective scan against a loop over tokens in NumPy, float64, and the laws that any correct scan obeys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.implementation import UnsupportedError
from pallas_kernels.selective_scan import selective_scan, selective_scan_step
from tests.pallas_kernels.comparison import (
    assert_close,
    assert_works_under_vmap_scan_and_checkpoint,
    exact,
    relative_error,
)

IMPLEMENTATIONS = ("reference", "xla")


def loop(x, delta, A, B, C, D=None, z=None, *, delta_bias=None, segment_ids=None, initial_state=None):
    """The definition, with the softplus, one token and one group of channels after the other."""
    batch, length, channels = x.shape
    B, C = (M[:, :, None] if M.ndim == 3 else M for M in (B, C))
    group = np.arange(channels) // (channels // B.shape[2])
    delta = np.logaddexp(0, delta if delta_bias is None else delta + delta_bias)
    h = np.zeros((batch, *A.shape), A.dtype) if initial_state is None else initial_state
    y = np.empty_like(x)
    for t in range(length):
        if segment_ids is not None and t > 0:
            h = h * (segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None]
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, group]
        y_t = np.sum(C[:, t, group] * h, axis=-1)
        y[:, t] = 2 * y_t.real if np.iscomplexobj(A) else y_t
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return y, h


def make_inputs(
    batch=2, length=8, channels=4, state=3, *, groups=None, complex_state=False, bare=False, segments=True, seed=None
):
    """Random inputs in float64: all of the operator's arrays, or with ``bare`` only those it must have."""
    rng = np.random.default_rng(seed)
    matrix = (batch, length, state) if groups is None else (batch, length, groups, state)

    def normal(*shape):
        return rng.normal(size=shape) + (1j * rng.normal(size=shape) if complex_state else 0)

    inputs = {
        "x": rng.normal(size=(batch, length, channels)),
        "delta": rng.normal(size=(batch, length, channels)) - 2,
        "A": -np.exp(rng.normal(size=(channels, state))) + (1j * rng.normal(size=(channels, state)) * complex_state),
        "B": normal(*matrix),
        "C": normal(*matrix),
    }
    inputs["A"] = inputs["A"] if complex_state else inputs["A"].real
    if not bare:
        inputs |= {
            "D": rng.normal(size=channels),
            "z": rng.normal(size=(batch, length, channels)),
            "delta_bias": rng.normal(size=channels),
            "initial_state": normal(batch, channels, state),
        }
    segment_ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) if segments and not bare else None
    return inputs, segment_ids


def cast(inputs, dtype):
    """Rounds inputs to a dtype, state matrices and states to no less than single precision."""
    wide = jnp.promote_types(dtype, jnp.float32)
    wide_names = ("A", "initial_state")
    return {
        name: jnp.asarray(
            value,
            jnp.promote_types(wide, jnp.complex64) if np.iscomplexobj(value) else wide if name in wide_names else dtype,
        )
        for name, value in inputs.items()
    }


@functools.partial(jax.jit, static_argnames=("implementation", "delta_softplus"))
def scan(inputs, segment_ids=None, *, implementation=None, delta_softplus=True):
    options = {"delta_softplus": delta_softplus, "return_final_state": True, "implementation": implementation}
    return selective_scan(**inputs, segment_ids=segment_ids, **options)


def scalar(outputs):
    """A loss that weighs every output, and both parts of complex ones, differently."""
    total = 0.0
    for seed, output in enumerate(outputs):
        weights = np.random.default_rng(seed).normal(size=(2, *output.shape))
        total = total + jnp.sum(weights[0] * output.real) + jnp.sum(weights[1] * output.imag)
    return total


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(inputs, segment_ids, implementation):
    """Gradients of ``scalar`` of the outputs, in the precision of the inputs."""
    return jax.grad(lambda inputs: scalar(scan(inputs, segment_ids, implementation=implementation)))(inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("length", "channels", "state"),
    [(1, 8, 16), (2, 130, 1), (63, 8, 8), (65, 1536, 16), (64, 8, 256), (1000, 256, 16), (4097, 8, 64)],
)
def test_equals_the_loop_at_any_size(length, channels, state, implementation):
    inputs, segment_ids = make_inputs(2, length, channels, state)
    inputs = cast(inputs, jnp.float32)
    outputs = scan(inputs, segment_ids, implementation=implementation)
    assert_close(outputs, loop(**exact(inputs), segment_ids=segment_ids), 1e-5)
    assert outputs[0].dtype == outputs[1].dtype == jnp.float32


@settings(max_examples=10)
@given(
    sizes=st.tuples(*(st.integers(1, largest) for largest in (3, 80, 3, 5))),
    groups=st.sampled_from([None, 1, 2]),
    complex_state=st.booleans(),
    bare=st.booleans(),
)
def test_equals_the_loop_with_any_options(sizes, groups, complex_state, bare):
    batch, length, channels, state = sizes
    inputs, segment_ids = make_inputs(
        batch, length, 2 * channels, state, groups=groups, complex_state=complex_state, bare=bare
    )
    inputs = cast(inputs, jnp.float32)
    outputs = scan(inputs, segment_ids, implementation="xla")
    assert_close(outputs, loop(**exact(inputs), segment_ids=segment_ids), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_inputs_round_only_the_output(dtype, implementation):
    inputs, segment_ids = make_inputs(length=200, channels=16)
    inputs = cast(inputs, dtype)
    y, final_state = scan(inputs, segment_ids, implementation=implementation)
    expected_y, expected_state = loop(**exact(inputs), segment_ids=segment_ids)
    assert y.dtype == dtype
    assert relative_error(y, expected_y) < 5e-3
    assert final_state.dtype == jnp.float32
    assert relative_error(final_state, expected_state) < 1e-5


@pytest.mark.parametrize("complex_state", [False, True])
def test_gradients_of_the_reference_are_the_slopes_of_the_loop(complex_state):
    inputs, segment_ids = make_inputs(groups=2, complex_state=complex_state)
    with jax.enable_x64(True):
        gradient = gradients(cast(inputs, jnp.float64), segment_ids, "reference")
        for name, value in inputs.items():
            direction = np.random.default_rng(1).normal(size=(2, *value.shape))
            direction = direction[0] + (1j * direction[1] if np.iscomplexobj(value) else 0)
            ahead, behind = (
                float(scalar(loop(**inputs | {name: value + step * direction}, segment_ids=segment_ids)))
                for step in (1e-6, -1e-6)
            )
            # JAX's gradient by a complex number z = u + iv is d/du - i d/dv.
            slope = np.sum(np.asarray(gradient[name]) * direction).real
            assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize(
    ("length", "options"),
    [(1, {}), (65, {}), (4097, {"batch": 1}), (6, {"groups": 2}), (6, {"complex_state": True})],
)
def test_gradients_equal_those_of_the_reference_in_double_precision(length, options):
    inputs, segment_ids = make_inputs(length=length, **options)
    inputs = cast(inputs, jnp.float32)
    gradient = gradients(inputs, segment_ids, "xla")
    with jax.enable_x64(True):
        expected = gradients(cast(exact(inputs), jnp.float64), segment_ids, "reference")
    for name in inputs:
        assert relative_error(gradient[name], expected[name]) < 1e-4, name
        assert gradient[name].dtype == inputs[name].dtype


def test_gradients_of_bfloat16_inputs_are_close_to_the_exact_ones():
    inputs, segment_ids = make_inputs(length=32, channels=16)
    inputs = cast(inputs, jnp.bfloat16)
    gradient = gradients(inputs, segment_ids, "xla")
    with jax.enable_x64(True):
        expected = gradients(cast(exact(inputs), jnp.float64), segment_ids, "reference")
    for name in inputs:
        assert relative_error(gradient[name].astype(jnp.float32), expected[name]) < 1e-2, name


@pytest.mark.parametrize("exponent", [-1e-6, -1.0, -69.0, -1e4])
def test_slow_and_fast_decays_stay_finite_and_exact(exponent):
    inputs, segment_ids = make_inputs(length=32, segments=False)
    inputs["delta"] = np.full_like(inputs["delta"], np.log(np.expm1(1.0)))
    del inputs["delta_bias"]
    inputs["A"] = np.full_like(inputs["A"], exponent)
    inputs = cast(inputs, jnp.float32)
    assert_close(scan(inputs, implementation="xla"), loop(**exact(inputs)), 1e-5)
    gradient = gradients(inputs, segment_ids, "xla")
    assert all(np.isfinite(value).all() for value in gradient.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_the_softplus_delta_is_taken_as_it_is(implementation):
    inputs, _ = make_inputs(bare=True)
    inputs = cast(inputs, jnp.float32)
    with_softplus = scan(inputs, implementation=implementation)
    inputs["delta"] = jax.nn.softplus(inputs["delta"])
    without = scan(inputs, delta_softplus=False, implementation=implementation)
    assert_close(without, with_softplus, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [1, 30])
def test_two_parts_with_the_state_between_equal_the_whole(cut, implementation):
    inputs, segment_ids = make_inputs(length=70)
    segment_ids[:, cut] = segment_ids[:, cut - 1]
    inputs = cast(inputs, jnp.float32)
    y, final_state = scan(inputs, segment_ids, implementation=implementation)
    sequences = ("x", "delta", "B", "C", "z")
    first = inputs | {name: inputs[name][:, :cut] for name in sequences}
    second = inputs | {name: inputs[name][:, cut:] for name in sequences}
    y_1, state = scan(first, segment_ids[:, :cut], implementation=implementation)
    y_2, state = scan(second | {"initial_state": state}, segment_ids[:, cut:], implementation=implementation)
    np.testing.assert_allclose(jnp.concatenate([y_1, y_2], axis=1), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"complex_state": True}, {"bare": True}])
def test_steps_equal_the_scan(options):
    inputs, _ = make_inputs(segments=False, **options)
    inputs = cast(inputs, jnp.float32)
    y, final_state = scan(inputs, implementation="xla")
    state = inputs.pop("initial_state", jnp.zeros_like(final_state))
    for t in range(y.shape[1]):
        token = inputs | {name: inputs[name][:, t] for name in ("x", "delta", "B", "C", "z") if name in inputs}
        y_t, state = selective_scan_step(state, **token, delta_softplus=True)
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final_state, rtol=1e-5, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    inputs, _ = make_inputs(length=20)
    inputs = cast(inputs, jnp.float32)
    segment_ids = jnp.repeat(jnp.array([[7, 3, 7]]), jnp.array([6, 9, 5]), axis=1).repeat(2, axis=0)
    last = {name: inputs[name][:, 15:] for name in ("x", "delta", "B", "C", "z")} | {"initial_state": None}
    alone, _ = scan(inputs | last, implementation="xla")
    packed, _ = scan(inputs, segment_ids, implementation="xla")
    np.testing.assert_allclose(packed[:, 15:], alone, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bit_identical():
    inputs, segment_ids = make_inputs(length=65)
    inputs = cast(inputs, jnp.float32)
    for first, second in zip(*(gradients(inputs, segment_ids, "xla").values() for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


def test_works_under_vmap_scan_and_checkpoint():
    inputs, _ = make_inputs(batch=3, length=4, segments=False)
    assert_works_under_vmap_scan_and_checkpoint(scan, cast(inputs, jnp.float32))


def test_works_inside_shard_map_with_shared_parameters():
    inputs, _ = make_inputs(batch=4, length=4, segments=False)
    inputs = cast(inputs, jnp.float32)
    per_row = ("x", "delta", "B", "C", "z", "initial_state")

    def energy(inputs):
        return jnp.sum(scan(inputs, implementation="xla")[0] ** 2)

    expected = jax.grad(energy)(inputs)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P("data") if name in per_row else P() for name in inputs}
    split = jax.shard_map(
        lambda inputs: jax.lax.psum(energy(inputs), "data"), mesh=mesh, in_specs=(specs,), out_specs=P()
    )
    for name, value in jax.jit(jax.grad(split))(inputs).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_mistakes_name_the_argument_and_what_would_fit(no_shape_checks):
    inputs, _ = make_inputs(bare=True)
    inputs = cast(inputs, jnp.float32)
    x = inputs["x"]
    for wrong, message in [
        (
            {"delta": x[:, :5]},
            r"delta must be \(batch, length, channels\) with length 8 as in x, got shape \(2, 5, 4\)",
        ),
        ({"x": x[0]}, r"x must be \(batch, length, channels\), got shape \(8, 4\)"),
        ({"x": x[:0]}, "x has no elements: .* batch must be at least 1"),
        ({"A": inputs["A"].astype(int)}, "A must be floating-point or complex, got int32"),
        ({"B": inputs["B"][..., :2]}, "B must be .* with state 3 as in A"),
        ({"C": inputs["C"][:, :, None]}, "B and C must have the same shape"),
        ({"C": inputs["C"].astype(jnp.complex64)}, "only a complex A can have a complex C"),
        ({"B": inputs["B"][:, :, None].repeat(3, 2), "C": inputs["C"][:, :, None].repeat(3, 2)}, "multiple of groups"),
        ({"D": jnp.ones(3)}, "D must be .* with channels 4"),
        ({"z": x[:1]}, "z must be"),
        ({"delta_bias": jnp.ones((4, 1))}, "delta_bias must be"),
        ({"segment_ids": jnp.ones((2, 8))}, "segment_ids must be integer, got float32"),
        ({"initial_state": jnp.ones((2, 4, 2))}, "initial_state must be .* with state 3"),
        ({"initial_state": jnp.ones((2, 4, 3), jnp.complex64)}, "initial_state is complex64 but A is float32"),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            selective_scan(**(inputs | wrong))


def test_a_named_implementation_never_falls_back():
    inputs, _ = make_inputs(bare=True, complex_state=True)
    with pytest.raises(UnsupportedError, match=r"'mosaic_gpu' cannot run this call: .*one of \['xla', 'reference'\]"):
        scan(cast(inputs, jnp.float32), implementation="mosaic_gpu")
