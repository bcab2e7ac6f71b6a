"""The choice of an implementation."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from pallas_kernels import implementation
from pallas_kernels.implementation import UnsupportedError, choose


@pytest.fixture
def operator(monkeypatch):
    """An operator with three implementations, whose kernel takes even numbers only."""

    def install(name, unsupported_reason):
        module = SimpleNamespace(
            unsupported_reason=unsupported_reason, double=lambda number: (name, 2 * number), __spec__=object()
        )
        monkeypatch.setitem(sys.modules, f"pallas_kernels.double.{name}", module)

    monkeypatch.setitem(sys.modules, "pallas_kernels.double", SimpleNamespace(__path__=[], __spec__=object()))
    install("mosaic_gpu", lambda number: f"number must be even, got {number}" if number % 2 else None)
    install("xla", lambda number: None)
    install("reference", lambda number: None)
    return "double"


@pytest.mark.parametrize(
    ("backend", "number", "chosen"),
    [("gpu", 4, "mosaic_gpu"), ("gpu", 3, "xla"), ("cpu", 4, "xla"), ("tpu", 4, "xla")],
)
def test_none_takes_the_best_that_supports_the_call(operator, monkeypatch, backend, number, chosen):
    monkeypatch.setattr(implementation, "backend", lambda: backend)
    assert choose(operator, None, number)(number) == (chosen, 2 * number)


@pytest.mark.parametrize("name", implementation.NAMES)
def test_a_named_one_is_taken_on_any_backend(operator, name):
    assert choose(operator, name, 4)(4) == (name, 8)


def test_a_named_one_that_cannot_run_says_why_and_what_can(operator):
    message = r"'mosaic_gpu' cannot run this call: number must be even, got 3\. .*\['xla', 'reference'\]"
    with pytest.raises(UnsupportedError, match=message):
        choose(operator, "mosaic_gpu", 3)


def test_an_operator_without_the_named_one_says_so(operator, monkeypatch):
    monkeypatch.delitem(sys.modules, "pallas_kernels.double.mosaic_gpu")
    with pytest.raises(UnsupportedError, match="double has no mosaic_gpu implementation"):
        choose(operator, "mosaic_gpu", 4)


def test_an_unknown_name_is_a_mistake(operator):
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*, got 'cuda'"):
        choose(operator, "cuda", 4)
