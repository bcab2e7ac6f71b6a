"""Compiling before timing."""

from __future__ import annotations

import dataclasses
import time

import pytest

from benchmarks import prepare
from benchmarks.operators import OPERATORS, Arrays
from benchmarks.suites import Case

SHAPE = {"batch": 1, "length": 8, "channels": 4, "width": 2}


def forward(implementation: str, length: int = 8) -> Case:
    shape = {**SHAPE, "length": length}
    return Case("shapes", OPERATORS["causal_conv1d"], implementation, "forward", shape)


def with_make(case: Case, make) -> Case:
    return dataclasses.replace(case, operator=dataclasses.replace(case.operator, make=make))


def test_cases_that_differ_in_their_implementations_only_are_one_problem():
    backward = dataclasses.replace(forward("xla"), direction="backward")
    cases = [forward("mosaic_gpu"), forward("xla"), backward, forward("xla", 16)]
    assert prepare.problems(cases) == [tuple(cases[:2]), (backward,), (cases[3],)]


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
