"""The trapezoidal SSD operator against a loop over tokens with complex states in NumPy, complex128, and its laws."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.implementation import UnsupportedError
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import State, trapezoidal_ssd, trapezoidal_ssd_step
from tests.pallas_kernels.comparison import (
    assert_close,
    assert_works_under_vmap_scan_and_checkpoint,
    exact,
    relative_error,
    weighted_sum,
)

IMPLEMENTATIONS = ("reference", "xla")
SEQUENCES = ("x", "delta", "A", "B", "C", "lambda_", "theta", "z")


def complex_pairs(array):
    """Component n and component n + state // 2 as one complex number, the one left over by an odd state as a real."""
    half = array.shape[-1] // 2
    return np.concatenate([array[..., :half] + 1j * array[..., half : 2 * half], array[..., 2 * half :]], axis=-1)


def real_pairs(array, state):
    half = state // 2
    return np.concatenate([array[..., :half].real, array[..., :half].imag, array[..., half:].real], axis=-1)


def phase(half_turns, like):
    """exp(i pi angle) for the pairs that rotate, 1 for the others."""
    padding = [(0, 0)] * (half_turns.ndim - 1) + [(0, like.shape[-1] - half_turns.shape[-1])]
    return np.exp(1j * np.pi * np.pad(half_turns, padding))


def loop(
    x, delta, A, B, C, lambda_, theta, D=None, z=None, *, delta_bias=0.0, B_bias=0.0, C_bias=0.0, mimo_x=1.0,
    mimo_z=1.0, mimo_o=1.0, norm_weight=None, initial_state=None, segment_ids=None,
):  # fmt: skip
    """The paper's recurrence, with the softplus: a complex state that decays and rotates, one token after the other."""
    batch, length, heads, head_dim = x.shape
    groups, rank, state = B.shape[2:]
    group = np.arange(heads) // (heads // groups)
    delta = np.logaddexp(0, delta + delta_bias)
    B, C = complex_pairs(B[:, :, group] + B_bias), complex_pairs(C[:, :, group] + C_bias)
    x_of_rank = x[..., None, :] * np.broadcast_to(mimo_x, (heads, rank, head_dim))
    h = np.zeros((batch, heads, head_dim, B.shape[-1]), complex)
    B_before, x_before = np.zeros_like(B[:, 0]), np.zeros_like(x_of_rank[:, 0])
    if initial_state is not None:
        h, B_before = complex_pairs(initial_state.ssm), complex_pairs(initial_state.B)
        x_before = initial_state.x[..., None, :] * np.broadcast_to(mimo_x, (heads, rank, head_dim))
    y = np.empty_like(x)
    for t in range(length):
        if segment_ids is not None and t > 0:
            continues = segment_ids[:, t] == segment_ids[:, t - 1]
            h, x_before = h * continues[:, None, None, None], x_before * continues[:, None, None, None]
        turn = phase(-delta[:, t, :, None] * theta[:, t, None], B[:, t, :, 0])
        transition = np.exp(delta[:, t] * A[:, t])[..., None, None] * turn[:, :, None]
        before = np.einsum("bhrp,bhrn->bhpn", x_before, B_before)
        own = np.einsum("bhrp,bhrn->bhpn", x_of_rank[:, t], B[:, t])
        weight, step = lambda_[:, t, :, None, None], delta[:, t, :, None, None]
        h = transition * h + (1 - weight) * step * transition * before + weight * step * own
        out = np.einsum("bhpn,bhrn->bhrp", h, C[:, t].conj()).real
        if D is not None:
            out = out + (D if D.ndim == 2 else D[:, None])[:, None] * x_of_rank[:, t]
        if norm_weight is not None:
            out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + 1e-5) * norm_weight[:, None]
        if z is not None:
            gate = z[:, t, :, None] * mimo_z
            out = out * gate / (1 + np.exp(-gate))
        y[:, t] = np.sum(out * mimo_o, axis=-2)
        B_before, x_before = B[:, t], x_of_rank[:, t]
    return y, State(real_pairs(h, state), real_pairs(B_before, state), x[:, -1])


def make_inputs(
    batch=2, length=8, heads=4, head_dim=3, state=5, *, groups=1, rank=1, pairs=2, D_per_channel=False, norm=False,
    bare=False, segments=True, seed=None,
):  # fmt: skip
    """Random inputs in float64: all of the operator's arrays, or with ``bare`` only those it must have."""
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.normal(size=(batch, length, heads, head_dim)),
        "delta": rng.normal(size=(batch, length, heads)) - 2,
        "A": -np.exp(rng.normal(size=(batch, length, heads))),
        "B": rng.normal(size=(batch, length, groups, rank, state)),
        "C": rng.normal(size=(batch, length, groups, rank, state)),
        "lambda_": rng.uniform(size=(batch, length, heads)),
        "theta": 3 * rng.normal(size=(batch, length, pairs)),
    }
    if not bare:
        inputs |= {
            "D": rng.normal(size=(heads, head_dim) if D_per_channel else heads),
            "z": rng.normal(size=(batch, length, heads, head_dim)),
            "delta_bias": rng.normal(size=heads),
            "B_bias": rng.normal(size=(heads, rank, state)),
            "C_bias": rng.normal(size=(heads, rank, state)),
            "initial_state": State(
                ssm=rng.normal(size=(batch, heads, head_dim, state)),
                B=rng.normal(size=(batch, heads, rank, state)),
                x=rng.normal(size=(batch, heads, head_dim)),
            ),
        }
        if rank > 1:
            inputs |= {name: rng.normal(size=(heads, rank, head_dim)) for name in ("mimo_x", "mimo_z", "mimo_o")}
        if norm:
            inputs["norm_weight"] = rng.normal(size=(heads, head_dim))
    segment_ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) if segments and not bare else None
    return inputs, segment_ids


def cast(inputs, dtype):
    """Rounds inputs to a dtype, states and what sets time scales to no less than single precision."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def array(path, value):
        return jnp.asarray(value, wide if path[0].key in ("A", "theta", "initial_state") else dtype)

    return jax.tree.map_with_path(array, inputs)


_OPTIONS = ("implementation", "chunk_size")


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def run(inputs, segment_ids=None, **options):
    return trapezoidal_ssd(**inputs, segment_ids=segment_ids, delta_softplus=True, return_final_state=True, **options)


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def gradients(inputs, segment_ids, **options):
    """Gradients of ``weighted_sum`` of the outputs, in the precision of the inputs."""
    return jax.grad(lambda inputs: weighted_sum(run(inputs, segment_ids, **options)))(inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "state", "groups", "rank", "pairs"),
    [(1, 2, 64, 16, 1, 1, 4), (2, 1, 130, 2, 1, 2, 1), (65, 6, 32, 8, 3, 1, 4), (300, 2, 16, 64, 1, 4, 16)],
)
def test_equals_the_loop_at_any_size(length, heads, head_dim, state, groups, rank, pairs, implementation):
    inputs, segment_ids = make_inputs(2, length, heads, head_dim, state, groups=groups, rank=rank, pairs=pairs)
    inputs = cast(inputs, jnp.float32)
    outputs = run(inputs, segment_ids, implementation=implementation)
    assert_close(outputs, loop(**exact(inputs), segment_ids=segment_ids), 1e-5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(outputs))


@settings(max_examples=8)
@given(
    sizes=st.tuples(*(st.integers(least, most) for least, most in ((1, 3), (1, 80), (1, 3), (1, 5), (2, 7)))),
    groups=st.sampled_from([1, 2]),
    rank=st.integers(1, 3),
    chunk_size=st.none() | st.integers(1, 100),
    D_per_channel=st.booleans(),
    norm=st.booleans(),
    bare=st.booleans(),
)
def test_equals_the_loop_with_any_options(sizes, groups, rank, chunk_size, D_per_channel, norm, bare):
    batch, length, heads, head_dim, state = sizes
    inputs, segment_ids = make_inputs(
        batch, length, 2 * heads, head_dim, state,
        groups=groups, rank=rank, pairs=state // 2, D_per_channel=D_per_channel, norm=norm, bare=bare,
    )  # fmt: skip
    inputs = cast(inputs, jnp.float32)
    outputs = run(inputs, segment_ids, implementation="xla", chunk_size=chunk_size)
    assert_close(outputs, loop(**exact(inputs), segment_ids=segment_ids), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_inputs_round_no_more_than_they_must(implementation):
    inputs, segment_ids = make_inputs(length=200, head_dim=16, state=32, rank=2, pairs=8)
    inputs = cast(inputs, jnp.bfloat16)
    y, state = run(inputs, segment_ids, implementation=implementation)
    expected_y, expected_state = loop(**exact(inputs), segment_ids=segment_ids)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, expected_y) < 5e-3
    assert all(part.dtype == jnp.float32 for part in state)
    assert_close(state, expected_state, 5e-3)


@pytest.mark.parametrize("length", [200, 2000])
def test_gradients_of_low_precision_inputs_stay_close(length):
    # Of a seed: gradients of a few numbers that are sums over all tokens may by chance be near zero.
    inputs, segment_ids = make_inputs(1, length, heads=16, head_dim=4, state=8, rank=2, segments=length < 1000, seed=0)
    inputs = cast(inputs, jnp.bfloat16)
    wide = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), inputs)
    expected = gradients(wide, segment_ids, implementation="reference")
    assert_close(gradients(inputs, segment_ids, implementation="xla"), expected, 1e-2)


@pytest.mark.parametrize("options", [{"groups": 2}, {"rank": 2, "D_per_channel": True, "norm": True}])
def test_gradients_of_the_reference_are_the_slopes_of_the_loop(options):
    inputs, segment_ids = make_inputs(**options)
    leaves, structure = jax.tree.flatten(inputs)
    with jax.enable_x64(True):
        gradient = gradients(cast(inputs, jnp.float64), segment_ids, implementation="reference")
        for place, (value, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
            direction = np.random.default_rng(1).normal(size=value.shape)
            ends = []
            for step in (1e-6, -1e-6):
                moved = [*leaves[:place], value + step * direction, *leaves[place + 1 :]]
                ends.append(weighted_sum(loop(**jax.tree.unflatten(structure, moved), segment_ids=segment_ids)))
            np.testing.assert_allclose(np.sum(slope * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("chunk_size", "segments"), [(None, False), (7, True)])
def test_gradients_equal_those_of_the_reference(chunk_size, segments):
    inputs, segment_ids = make_inputs(
        length=150, head_dim=8, state=16, groups=2, rank=2, pairs=4, norm=True, segments=segments
    )
    with jax.enable_x64(True):
        expected = gradients(cast(inputs, jnp.float64), segment_ids, implementation="reference")
    actual = gradients(cast(inputs, jnp.float32), segment_ids, implementation="xla", chunk_size=chunk_size)
    assert_close(actual, expected, 1e-4)


def test_the_chunk_size_changes_nothing_but_rounding():
    inputs, segment_ids = make_inputs(length=70, rank=2)
    inputs = cast(inputs, jnp.float32)
    expected = run(inputs, segment_ids, implementation="xla")
    for chunk_size in (1, 16, 69, 1000):
        assert_close(run(inputs, segment_ids, implementation="xla", chunk_size=chunk_size), expected, 1e-5)


def test_without_rotation_and_with_each_step_at_its_end_it_is_ssd():
    inputs, segment_ids = make_inputs(length=70, groups=2, bare=True)
    inputs = cast(inputs, jnp.float32) | {"lambda_": jnp.ones((2, 70, 4)), "theta": jnp.zeros((2, 70, 2))}
    A = -jnp.array([0.1, 1.0, 4.0, 16.0])
    inputs["A"] = jnp.broadcast_to(A, inputs["A"].shape)
    y, state = run(inputs, segment_ids, implementation="xla")
    shared = {name: inputs[name] for name in ("x", "delta")} | {name: inputs[name][:, :, :, 0] for name in "BC"}
    expected = ssd(**shared, A=A, delta_softplus=True, return_final_state=True, implementation="xla")
    assert_close((y, state.ssm), expected, 1e-6)


def test_a_token_that_forgets_nothing_and_takes_no_step_leaves_the_state():
    inputs, _ = make_inputs(length=6, segments=False)
    inputs = cast(inputs, jnp.float32)
    still = inputs | {"delta": jnp.full((2, 6, 4), -1e4)}
    for implementation in IMPLEMENTATIONS:
        _, state = run(still, implementation=implementation)
        np.testing.assert_array_equal(state.ssm, inputs["initial_state"].ssm)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_that_turns_knows_the_parity_of_all_bits_so_far(implementation):
    bits = np.random.default_rng(0).integers(0, 2, size=(1, 1000))
    ones, zeros = jnp.ones((1, 1000, 1)), jnp.zeros((1, 1000, 1))
    B = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 1000, 1, 1, 2))
    start = State(ssm=B[:, :1, 0], B=jnp.zeros((1, 1, 1, 2)), x=jnp.zeros((1, 1, 1)))
    theta = jnp.asarray(bits, jnp.float32)[..., None]
    y = trapezoidal_ssd(
        zeros[..., None], ones, zeros, B, B, ones, theta, initial_state=start, implementation=implementation
    )
    np.testing.assert_allclose(y[0, :, 0, 0], 1 - 2 * (np.cumsum(bits) % 2), rtol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [1, 33])
def test_a_sequence_may_be_cut_anywhere(cut, implementation):
    inputs, segment_ids = make_inputs(length=70, rank=2)
    segment_ids[:, cut] = segment_ids[:, cut - 1]
    inputs = cast(inputs, jnp.float32)
    expected = run(inputs, segment_ids, implementation=implementation)
    first = inputs | {name: inputs[name][:, :cut] for name in SEQUENCES}
    second = inputs | {name: inputs[name][:, cut:] for name in SEQUENCES}
    y_1, state = run(first, segment_ids[:, :cut], implementation=implementation)
    y_2, state = run(second | {"initial_state": state}, segment_ids[:, cut:], implementation=implementation)
    assert_close((jnp.concatenate([y_1, y_2], axis=1), state), expected, 1e-5)


@pytest.mark.parametrize("options", [{"groups": 2, "rank": 2, "norm": True}, {"bare": True}])
def test_steps_equal_the_whole_sequence(options):
    inputs, _ = make_inputs(segments=False, **options)
    inputs = cast(inputs, jnp.float32)
    y, final_state = run(inputs, implementation="xla")
    state = inputs.pop("initial_state", jax.tree.map(jnp.zeros_like, final_state))
    for t in range(y.shape[1]):
        token = inputs | {name: inputs[name][:, t] for name in SEQUENCES if name in inputs}
        y_t, state = trapezoidal_ssd_step(state, **token, delta_softplus=True)
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-5, atol=1e-5)
    assert_close(state, final_state, 1e-5)


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
    first, second = (gradients(inputs, segment_ids, implementation="xla") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_works_under_vmap_scan_and_checkpoint():
    inputs, _ = make_inputs(batch=3, length=4, segments=False)
    assert_works_under_vmap_scan_and_checkpoint(run, cast(inputs, jnp.float32))


def test_mistakes_name_the_argument_and_what_would_fit(no_shape_checks):
    inputs, _ = make_inputs(segments=False)
    inputs = cast(inputs, jnp.float32)
    for wrong, message in [
        ({"A": inputs["A"][0, 0]}, r"A must be \(batch, length, heads\), got shape \(4,\)"),
        ({"B": inputs["B"][:, :, 0]}, r"B must be \(batch, length, groups, rank, state\), got shape"),
        ({"C": inputs["C"][..., :2]}, "C must be .* with state 5 as in B"),
        ({"B": inputs["B"].repeat(3, 2), "C": inputs["C"].repeat(3, 2)}, "multiple of groups, got 4 heads and 3"),
        ({"lambda_": inputs["lambda_"][:, :5]}, "lambda_ must be .* with length 8 as in x"),
        ({"theta": jnp.ones((2, 8, 3))}, "theta must be of at most 2 pairs for a state of 5, got 3"),
        ({"D": jnp.ones((4, 2))}, "D must be .* with head_dim 3"),
        ({"z": inputs["x"][:1]}, "z must be"),
        ({"B_bias": jnp.ones((4, 5))}, r"B_bias must be \(heads, rank, state\)"),
        ({"mimo_x": jnp.ones((4, 2, 3))}, "mimo_x must be .* with rank 1 as in B"),
        ({"norm_weight": jnp.ones(4)}, r"norm_weight must be \(heads, head_dim\)"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be above 0, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be None or at least 1, got 0"),
        ({"segment_ids": jnp.ones((2, 8))}, "segment_ids must be integer, got float32"),
        (
            {"initial_state": inputs["initial_state"]._replace(ssm=jnp.ones((2, 4, 3, 2)))},
            r"initial_state.ssm must be \(batch, heads, head_dim, state\) with state 5 as in B",
        ),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            trapezoidal_ssd(**(inputs | wrong))


def test_a_named_implementation_never_falls_back():
    inputs, _ = make_inputs(bare=True)
    with pytest.raises(UnsupportedError, match="'mosaic_gpu' cannot run this call: x, B and C must be bfloat16"):
        run(cast(inputs, jnp.float32), implementation="mosaic_gpu")
