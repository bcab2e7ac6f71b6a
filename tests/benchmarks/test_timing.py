"""The time of a call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.timing import compile_calls, time_calls, time_program, whole_programs


def multiply(times: int, a: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, times, lambda _, b: jnp.tanh(a @ b), a)


def test_ten_times_the_work_takes_about_ten_times_as_long():
    sets = [(jax.random.normal(jax.random.key(i), (64, 64)),) for i in range(2)]
    short, long = (time_calls(lambda a, n=n: multiply(n, a), sets, samples=5) for n in (30, 300))
    assert 3 < long.median / short.median < 30
    assert long.lower <= long.median <= long.upper


def test_two_inputs_do_not_count_twice():
    one, four = (
        time_calls(
            lambda a: multiply(100, a), [(jax.random.normal(jax.random.key(i), (64, 64)),) for i in range(n)], samples=5
        )
        for n in (1, 4)
    )
    assert 0.3 < four.median / one.median < 3


def test_many_inputs_go_through_programs_of_a_few():
    traced = []

    def call(a: jax.Array) -> jax.Array:
        traced.append(a.shape)
        return multiply(100, a)

    sets = [(jax.random.normal(jax.random.key(i), (64, 64)),) for i in range(6)]
    program = compile_calls(call, sets[0], sets=6, calls=2)
    # Once for all calls of the program.
    assert len(traced) == 1
    assert len(program.out_info) == 2
    six, _ = time_program(program, sets, samples=5)
    two = time_calls(lambda a: multiply(100, a), sets[:2], samples=5)
    assert 0.3 < six.median / two.median < 3


@pytest.mark.parametrize(("sets", "shared"), [(2, 2), (4, 4), (5, 8), (16, 16), (17, 32), (20, 32), (41, 48)])
def test_programs_of_few_and_of_many_calls_share_their_inputs(sets, shared):
    assert whole_programs(sets) == shared


def test_what_was_timed_returns_what_it_computed_of_the_first_inputs():
    sets = [(jnp.full(3, float(i)), None) for i in range(1, 5)]
    program = compile_calls(lambda a, nothing: {"double": 2 * a, "nothing": nothing}, sets[0], sets=4)
    _, outputs = time_program(program, sets, samples=2)
    np.testing.assert_array_equal(outputs["double"], [2.0, 2.0, 2.0])
