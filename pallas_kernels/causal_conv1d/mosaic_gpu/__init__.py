"""The causal convolution as Pallas Mosaic GPU kernels, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.batching import Arrays, batch_by_folding
from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.causal_conv1d.mosaic_gpu import blocks, geometry, kernels
from pallas_kernels.causal_conv1d.mosaic_gpu.blocks import Problem
from pallas_kernels.causal_conv1d.mosaic_gpu.geometry import MAX_WIDTH, Geometry
from pallas_kernels.causal_conv1d.state import final_state
from pallas_kernels.mosaic_gpu_compat import missing_hardware
from pallas_kernels.segments import segment_starts

_DTYPES = ("float32", "bfloat16", "float16")
_COPY_BYTES = 16
"""Rows that the copy engine moves must be a multiple of it."""
_PARAMETERS = ("weight", "bias")


def unsupported_reason(inputs: Inputs, *, activation: str | None) -> str | None:
    """Says what stands in the way of running these kernels here, or None."""
    del activation
    if inputs.x.dtype.name not in _DTYPES:
        return f"x must be one of {_DTYPES}, got {inputs.x.dtype}"
    if inputs.weight.shape[0] > MAX_WIDTH:
        return f"width must be at most {MAX_WIDTH}, got {inputs.weight.shape[0]}"
    return missing_hardware()


def causal_conv1d(inputs: Inputs, *, activation: str | None) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    arrays = {name: array for name, array in inputs._asdict().items() if array is not None}
    return _convolve(arrays, activation == "silu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _convolve(arrays: Arrays, silu: bool) -> tuple[jax.Array, jax.Array]:
    return _forward(silu)(arrays)["y"], _final_state(_tail(arrays))


def _convolve_forward(primals: Any, silu: bool) -> tuple[tuple[jax.Array, jax.Array], Arrays]:
    arrays = {name: primal.value for name, primal in primals.items()}
    return _convolve(arrays, silu), arrays


def _convolve_backward(silu: bool, arrays: Arrays, cotangents: tuple[Any, Any]) -> tuple[dict[str, Any]]:
    dy, dfinal_state = cotangents
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros_like(arrays["x"])
    results = _backward(silu)(arrays | {"dy": dy})
    parameters = jnp.sum(results.pop("parameters"), axis=(0, 1))
    width = arrays["weight"].shape[0]
    gradients: dict[str, Any] = dict.fromkeys(arrays) | results
    gradients["weight"] = parameters[:width].astype(arrays["weight"].dtype)
    if "bias" in arrays:
        gradients["bias"] = parameters[width].astype(arrays["bias"].dtype)
    if not isinstance(dfinal_state, SymbolicZero):
        tail = _tail(arrays)
        _, transpose = jax.vjp(lambda x: _final_state(tail | x), {name: tail[name] for name in results})
        (more,) = transpose(dfinal_state)
        first = arrays["x"].shape[1] - tail["x"].shape[1]
        gradients["x"] = gradients["x"].at[:, first:].add(more["x"])
        if "initial_state" in results:
            gradients["initial_state"] += more["initial_state"]
    return (gradients,)


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def _tail(arrays: Arrays) -> Arrays:
    """The last tokens: those that the final state is made of."""
    length = arrays["x"].shape[1]
    first = max(length - arrays["weight"].shape[0], 0)
    return arrays | {name: arrays[name][:, first:] for name in ("x", "segment_ids") if name in arrays}


def _final_state(arrays: Arrays) -> jax.Array:
    return final_state(Inputs(**arrays))


@functools.cache
def _forward(silu: bool) -> Callable[[Arrays], Arrays]:
    """The forward pass on arrays by their names in ``Inputs``."""

    def run(arrays: Arrays) -> Arrays:
        p, padded = _prepare(arrays, silu, geometry.forward)
        return {"y": _trim(kernels.forward(p, padded), arrays["x"])}

    return batch_by_folding(run, parameters=_PARAMETERS)


@functools.cache
def _backward(silu: bool) -> Callable[[Arrays], Arrays]:
    """The backward pass; of the parameters' gradients it returns the terms, see ``kernels.backward``."""

    def run(arrays: Arrays) -> Arrays:
        p, padded = _prepare(arrays, silu, geometry.backward)
        return {name: _trim(array, arrays["x"]) for name, array in kernels.backward(p, padded).items()}

    return batch_by_folding(run, parameters=_PARAMETERS)


def _prepare(arrays: Arrays, silu: bool, choose: Callable[[int, int, int], Geometry]) -> tuple[Problem, Arrays]:
    """Brings arrays by their names in ``Inputs`` into the shapes of ``Problem``."""
    x = arrays["x"]
    batch, length, channels = x.shape
    width = arrays["weight"].shape[0]
    pitch = -(-channels * x.dtype.itemsize // _COPY_BYTES) * _COPY_BYTES // x.dtype.itemsize
    p = Problem(choose(batch, length, pitch), batch, length, pitch, width, silu)
    padded = {}
    for name, array in arrays.items():
        if name == "segment_ids":
            padded["reach"] = blocks.reaches(p, segment_starts(array))
        elif name in _PARAMETERS:
            padded[name] = _pad(array.astype(jnp.float32), p.padded_channels)
        elif array.size:
            padded[name] = _pad(array, pitch)
    return p, padded


def _pad(array: jax.Array, channels: int) -> jax.Array:
    more = channels - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)]) if more else array


def _trim(array: jax.Array, like: jax.Array) -> jax.Array:
    return array[..., : like.shape[-1]]
