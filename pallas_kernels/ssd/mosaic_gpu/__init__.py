"""The SSD operator as Pallas Mosaic GPU kernels, forward and backward; docs/ssd_kernels.md explains how they work."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.batching import Arrays
from pallas_kernels.differentiation import with_backward_pass
from pallas_kernels.mosaic_gpu_compat import WGMMA, missing_hardware
from pallas_kernels.segments import segment_starts
from pallas_kernels.ssd.inputs import Inputs
from pallas_kernels.ssd.mosaic_gpu import backward, forward, slopes, states
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK
from pallas_kernels.ssd.mosaic_gpu.call import Call

MAX_STATE = 256

FORGET = -1e4
"""Logarithm of the decay where a segment starts: nothing is left."""


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> str | None:
    """Says what stands in the way of running these kernels here, or None."""
    del delta_softplus, delta_limit
    return unsupported_matrices(inputs.x, inputs.B, inputs.C, chunk_size)


def unsupported_matrices(x: jax.Array, B: jax.Array, C: jax.Array, chunk_size: int | None) -> str | None:
    """Says what keeps the kernels from these arrays, of which B and C end with the state, or None."""
    for name, array in (("x", x), ("B", B), ("C", C)):
        if array.dtype != jnp.bfloat16:
            return f"x, B and C must be bfloat16, {name} is {array.dtype}; implementation='xla' computes in float32"
    if B.shape[-1] > MAX_STATE:
        return f"state must be at most {MAX_STATE}, got {B.shape[-1]}; implementation='xla' takes any"
    if chunk_size not in (None, CHUNK):
        return f"chunk_size must be None or {CHUNK}, got {chunk_size}; implementation='xla' takes any"
    return missing_hardware(WGMMA)


def ssd(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    del chunk_size
    delta = inputs.step_sizes(delta_softplus=delta_softplus, delta_limit=delta_limit)
    log_decay = delta * inputs.A.astype(jnp.float32)
    if inputs.segment_ids is not None:
        log_decay = jnp.where(segment_starts(inputs.segment_ids)[..., None], FORGET, log_decay)
    arrays = {"x": inputs.x, "delta": delta, "log_decay": log_decay, "B": inputs.B, "C": inputs.C}
    if inputs.D is not None:
        arrays["D"] = inputs.D.astype(jnp.float32)
    if inputs.initial_state is not None:
        arrays["initial_state"] = inputs.initial_state
    y, final_state = _scan(arrays)
    if inputs.z is not None:
        y = _gate(y, inputs.z)
    return y, final_state


# Computed again in the backward pass, which would otherwise be given four arrays in float32.
@jax.checkpoint
def _gate(y: jax.Array, z: jax.Array) -> jax.Array:
    return (y * jax.nn.silu(z.astype(jnp.float32))).astype(y.dtype)


def forward_pass(call: Call, arrays: Arrays, *, save_states: bool) -> Arrays:
    """Returns "y" and "final_state", and with ``save_states`` what the backward pass will want: "states", "tokens"."""
    inputs = call.prepared(arrays, "x", "B", "C", "D")
    inputs |= call.starts(inputs, arrays.get("initial_state"), reverse=False)
    results = forward.scan(call.problem(call.plan.forward), inputs, save_states=save_states)
    trimmed = {
        "y": call.trim_tokens(results["y"], arrays["x"]),
        "final_state": call.trim_state(results["end"][:, -1]),
    }
    if save_states:
        trimmed |= {"states": results["states"], "tokens": inputs["tokens"]}
    return trimmed


def backward_pass(call: Call, arrays: Arrays) -> Arrays:
    """Returns gradients by the names of their arrays, that of D one an element of the batch."""
    inputs = call.prepared(arrays, "x", "dy", "B", "C", "D")
    walk = call.problem(call.plan.states)
    start = call.starts(inputs, arrays.get("dfinal_state"), reverse=True)
    walked = states.scan(walk, inputs | start, reverse=True, save=True)
    inputs |= {"states": arrays["states"], "dstates": walked["states"]}
    results = backward.scan(walk, inputs, splits=call.plan.splits, stages=call.plan.stages)
    numbers = slopes.gradients(call.by_head(results["slopes"]), inputs["tokens"])
    gradients = {
        "x": call.trim_tokens(results["dx"], arrays["x"]),
        **{name: call.trim_numbers(gradient) for name, gradient in numbers.items()},
        **{name: call.trim_matrix(jnp.sum(results[f"d{name}"], axis=0)) for name in ("B", "C")},
    }
    if "D" in arrays:
        gradients["D"] = call.trim_channels(jnp.sum(results["dD"], axis=1).reshape(call.batch, -1))
    if "initial_state" in arrays:
        gradients["initial_state"] = call.trim_state(walked["end"][:, 0])
    return gradients


_scan = with_backward_pass(
    lambda arrays, *, save_states: forward_pass(Call(arrays), arrays, save_states=save_states),
    lambda arrays: backward_pass(Call(arrays), arrays),
    parameters=("D",),
)
