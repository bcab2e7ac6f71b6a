"""Compiling before timing."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from benchmarks import prepare
from benchmarks.operators import OPERATORS, Arrays
from benchmarks.suites import QUICK, Case, cases

SHAPE = {"batch": 1, "length": 8, "channels": 4, "width": 2}


def forward(implementation: str, length: int = 8) -> Case:
    shape = {**SHAPE, "length": length}
    return Case("shapes", OPERATORS["causal_conv1d"], implementation, "forward", shape)


def with_make(case: Case, make) -> Case:
    return dataclasses.replace(case, operator=dataclasses.replace(case.operator, make=make))


def test_cases_that_differ_in_their_implementations_only_are_one_problem():
    backward = dataclasses.replace(forward("xla"), direction="backward")
    several = [forward("mosaic_gpu"), forward("xla"), backward, forward("xla", 16)]
    assert prepare.problems(several) == [tuple(several[:2]), (backward,), (several[3],)]


def test_a_problem_whose_inputs_cannot_be_made_leaves_the_others():
    def too_large(*_):
        raise RuntimeError("too large")

    groups = [(with_make(forward("xla"), too_large),), (forward("xla"),)]
    failed, compiled = prepare.prepare_all(groups, print)
    assert str(failed) == "too large"
    assert isinstance(compiled, prepare.Problem)
    assert compiled.cases == groups[1]


def test_a_mistake_in_the_code_is_raised():
    def mistaken(*_):
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        prepare.prepare_all([(with_make(forward("xla"), mistaken),)], print)


def test_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(prepare, "_PROGRESS_SECONDS", 0.01)
    seen: list[int] = []

    def make_later(*arguments) -> Arrays:
        deadline = time.monotonic() + 60
        while 1 not in seen and time.monotonic() < deadline:
            time.sleep(0.01)
        return OPERATORS["causal_conv1d"].make(*arguments)

    prepare.prepare_all([(forward("xla"),), (with_make(forward("xla"), make_later),)], seen.append)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_in_chunks_is_the_reference(name, monkeypatch):
    sizes = dataclasses.replace(QUICK, tokens=((2, 12, 16),))
    case = next(cases(sizes, [name], ["shapes"], on_gpu=False))
    monkeypatch.setattr(prepare, "_REFERENCE_CHUNK", 4)
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda a: a.astype(float), case.operator.make(jax.random.key(0), case.shape))
        y, gradients = jax.vjp(functools.partial(prepare._reference, case.operator), arrays)
        want, want_gradients = jax.vjp(functools.partial(case.operator.call, implementation="reference"), arrays)
        dy = jax.random.normal(jax.random.key(1), y.shape, y.dtype)
        np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-12)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), gradients(dy), want_gradients(dy)
        )
