"""Which implementation of an operator runs, and the error when a named one cannot.

An operator is a folder of this package; an implementation of it is a module there, named as in ``NAMES``, with two
functions of the same arguments, the operator's validated inputs:

- one named like the operator, which computes it;
- ``unsupported_reason``, which returns None where the first one can run on the current backend, else what stands in
  its way, as half a sentence ("state must be at most 256, got 512").

The arrays may be tracers and are always local: sharding is dealt with before (``pallas_kernels.sharding``). An
implementation is differentiable in reverse mode in every floating-point input.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

NAMES = ("mosaic_gpu", "xla", "reference")

_PREFERENCE = {"gpu": ("mosaic_gpu", "xla")}
_FALLBACK = ("xla",)


class UnsupportedError(NotImplementedError):
    """A named implementation cannot run this call."""


def backend() -> str:
    """Platform that computations go to by default: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def choose(operator: str, implementation: str | None, *inputs: Any, **options: Any) -> Callable[..., Any]:
    """Returns the function that computes an operator for these inputs.

    Args:
        operator: name of the operator's folder.
        implementation: one of ``NAMES``, or None for the best one that supports the call on this backend.
        *inputs: what the function will be called with.
        **options: what the function will be called with.

    Raises:
        ValueError: there is no implementation of this name.
        UnsupportedError: the named implementation does not support the call.
    """
    if implementation is None:
        for name in _PREFERENCE.get(backend(), _FALLBACK):
            if _unsupported_reason(operator, name, inputs, options) is None:
                return _function(operator, name)
        raise UnsupportedError(f"{operator}: no implementation supports this call on {backend()}.")
    if implementation not in NAMES:
        raise ValueError(f"{operator}: implementation must be None or one of {NAMES}, got {implementation!r}.")
    reason = _unsupported_reason(operator, implementation, inputs, options)
    if reason is not None:
        others = [
            name
            for name in NAMES
            if name != implementation and _unsupported_reason(operator, name, inputs, options) is None
        ]
        raise UnsupportedError(
            f"{operator}: implementation={implementation!r} cannot run this call: {reason}. "
            f"Use implementation=None for the best one that can, or one of {others}."
        )
    return _function(operator, implementation)


def _unsupported_reason(operator: str, name: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    if importlib.util.find_spec(f"pallas_kernels.{operator}.{name}") is None:
        return f"{operator} has no {name} implementation"
    return _module(operator, name).unsupported_reason(*inputs, **options)


def _function(operator: str, name: str) -> Callable[..., Any]:
    return getattr(_module(operator, name), operator)


def _module(operator: str, name: str) -> Any:
    # Imported on demand: a kernel's module must not cost those who never run it, nor fail where its backend is absent.
    return importlib.import_module(f"pallas_kernels.{operator}.{name}")
