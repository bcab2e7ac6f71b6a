"""The selective scan as Pallas Mosaic GPU kernels, forward and backward; docs/kernels.md explains how they work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.batching import Arrays
from pallas_kernels.differentiation import with_backward_pass
from pallas_kernels.mosaic_gpu_compat import missing_hardware
from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.selective_scan.mosaic_gpu import backward, forward, parts, plan
from pallas_kernels.selective_scan.mosaic_gpu.blocks import Problem
from pallas_kernels.selective_scan.mosaic_gpu.geometry import KEEP_LANES, MAX_STATE
from pallas_kernels.sharding import vary_like

_TOKEN_DTYPES = ("float32", "bfloat16", "float16")


def unsupported_reason(inputs: Inputs, *, delta_softplus: bool) -> str | None:
    """Says what stands in the way of running these kernels here, or None."""
    del delta_softplus
    if jnp.iscomplexobj(inputs.A):
        return f"A must be real, got {inputs.A.dtype}"
    for name in ("x", "delta", "z"):
        array = getattr(inputs, name)
        if array is not None and array.dtype.name not in _TOKEN_DTYPES:
            return f"{name} must be one of {_TOKEN_DTYPES}, got {array.dtype}"
    if inputs.A.shape[1] > MAX_STATE:
        return f"state must be at most {MAX_STATE}, got {inputs.A.shape[1]}"
    return missing_hardware()


def selective_scan(inputs: Inputs, *, delta_softplus: bool) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    arrays = {name: array for name, array in inputs._asdict().items() if array is not None}
    keep = arrays.pop("segment_ids", None)
    if keep is not None:
        arrays["keep"] = 1.0 - segment_starts(keep).astype(jnp.float32)
    return _scan(delta_softplus)(arrays)


@functools.cache
def _scan(delta_softplus: bool) -> Callable[[Arrays], tuple[jax.Array, jax.Array]]:
    """The scan of arrays as ``Inputs`` describes them, but with "keep" in place of the segment ids."""
    return with_backward_pass(
        functools.partial(_forward, delta_softplus=delta_softplus),
        functools.partial(_backward, delta_softplus=delta_softplus),
        parameters=("A", "D", "delta_bias"),
    )


def _forward(arrays: Arrays, *, delta_softplus: bool, save_states: bool) -> Arrays:
    """Returns "y" and "final_state", and what the backward pass will want of "states"."""
    p, padded = _prepare(arrays, delta_softplus, plan.forward)
    if p.num_parts > 1:
        padded |= parts.summarize(p, padded, reverse=False)
    results = forward.scan(p, padded, save_states=save_states)
    trimmed = {
        "y": _trim_channels(results["y"], arrays["x"].shape[2], p),
        "final_state": _from_tiles(results["final_state"], arrays["A"], p),
    }
    if save_states:
        trimmed["states"] = results["states"]
    return trimmed


def _backward(arrays: Arrays, *, delta_softplus: bool) -> Arrays:
    """Returns gradients by the names of their arrays, those of parameters one an element of the batch."""
    p, padded = _prepare(arrays, delta_softplus, plan.backward)
    if p.num_parts > 1:
        padded |= parts.summarize(p, padded, reverse=True)
    results = backward.scan(p, padded)
    channels = arrays["x"].shape[2]
    gradients = {}
    for name in ("x", "delta", "z"):
        if name in arrays:
            gradients[name] = _trim_channels(results[f"d{name}"], channels, p)
    for name, matrix in zip(("B", "C"), jnp.split(results["dBC"], 2, axis=3), strict=True):
        gradients[name] = matrix.reshape(*matrix.shape[:3], p.geometry.state)[..., : arrays["A"].shape[1]]
    gradients["A"] = _from_tiles(jnp.sum(results["dA"], axis=1), arrays["A"], p)
    for name in ("D", "delta_bias"):
        if name in arrays:
            gradients[name] = _trim_channels(jnp.sum(results[f"d{name}"], axis=1), channels, p)
    if "initial_state" in arrays:
        gradients["initial_state"] = _from_tiles(results["dinitial_state"], arrays["A"], p)
    if "keep" in arrays:
        gradients["keep"] = vary_like(jnp.zeros_like(arrays["keep"]), arrays["keep"])
    return gradients


def _prepare(arrays: Arrays, delta_softplus: bool, choose: Any) -> tuple[Problem, Arrays]:
    """Brings arrays as ``Inputs`` describes them into the shapes of ``Problem``."""
    batch, length, channels = arrays["x"].shape
    groups, state = arrays["B"].shape[2:]
    width = plan.padded_channels(channels // groups, state) * groups
    itemsize = max(arrays[name].dtype.itemsize for name in ("x", "delta", "z", "dy") if name in arrays)
    chosen = choose(batch, length, width, groups, plan.padded_state(state), itemsize)
    g = chosen.geometry
    p = Problem(g, batch, length, width, groups, delta_softplus, chosen.num_parts)
    padded = {}
    for name, array in arrays.items():
        match name:
            case "x" | "delta" | "z" | "dy":
                padded[name] = _pad_channels(array, p)
            case "D" | "delta_bias":
                padded[name] = _pad_channels(array.astype(jnp.float32), p)
            case "A":
                padded[name] = jnp.swapaxes(_to_tiles(array.astype(jnp.float32), p), 0, 1)
            case "B":
                matrices = jnp.stack([_pad(arrays[n].astype(jnp.float32), -1, g.state) for n in ("B", "C")], axis=3)
                padded["BC"] = matrices.reshape(batch, length, groups, 2 * g.state_lanes, g.states_per_lane)
            case "initial_state" | "dfinal_state":
                padded[name] = _to_tiles(array, p)
            case "keep":
                # Padding starts no segment, and with step sizes of zero it does not change the state.
                array = _pad(array, 1, p.num_chunks * g.steps, value=1.0)
                chunks = array.reshape(batch, p.num_chunks, g.steps)
                padded[name] = _pad(chunks, 2, KEEP_LANES)
                if p.num_parts > 1:
                    padded["part_keep"] = jnp.min(array.reshape(batch, p.num_parts, -1), axis=2)
            case "states":
                padded[name] = array
    return p, padded


def _pad(array: jax.Array, dim: int, size: int, value: float = 0.0) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, size - array.shape[dim])
    return jnp.pad(array, widths, constant_values=value) if widths[dim][1] else array


def _pad_channels(array: jax.Array, p: Problem) -> jax.Array:
    """Pads the last dimension, group by group."""
    grouped = array.reshape(*array.shape[:-1], p.groups, array.shape[-1] // p.groups)
    return _pad(grouped, -1, p.channels // p.groups).reshape(*array.shape[:-1], p.channels)


def _trim_channels(array: jax.Array, channels: int, p: Problem) -> jax.Array:
    """Undoes ``_pad_channels``."""
    grouped = array.reshape(*array.shape[:-1], p.groups, p.channels // p.groups)
    return grouped[..., : channels // p.groups].reshape(*array.shape[:-1], channels)


def _to_tiles(array: jax.Array, p: Problem) -> jax.Array:
    """(…, channels, state) to (…, state_lanes, padded channels, states_per_lane)."""
    padded = jnp.swapaxes(_pad_channels(jnp.swapaxes(_pad(array, -1, p.geometry.state), -1, -2), p), -1, -2)
    split = padded.reshape(*padded.shape[:-1], p.geometry.state_lanes, p.geometry.states_per_lane)
    return jnp.moveaxis(split, -2, -3)


def _from_tiles(array: jax.Array, like: jax.Array, p: Problem) -> jax.Array:
    """Undoes ``_to_tiles``, for the channels and states of A."""
    channels, state = like.shape
    joined = jnp.moveaxis(array, -3, -2).reshape(*array.shape[:-3], p.channels, p.geometry.state)
    return jnp.swapaxes(_trim_channels(jnp.swapaxes(joined[..., :state], -1, -2), channels, p), -1, -2)
