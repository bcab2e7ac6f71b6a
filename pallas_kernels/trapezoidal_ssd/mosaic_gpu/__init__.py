"""The trapezoidal SSD operator out of the SSD operator's Pallas Mosaic GPU kernels; docs/mamba3.md explains how.

The recurrence has one input a token (``weights.py``) and its state stands still, in exchange for B and C that turn
(``turning.py``). What is left is an SSD of heads that are groups of their own, whose tokens enter their own outputs
with a weight of their own. Rows of a token follow each other in the sequence; only the first lets the state decay, and
the kernels' masks know which rows are one token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.batching import Arrays, batch_by_folding
from pallas_kernels.segments import segment_starts
from pallas_kernels.ssd import mosaic_gpu as ssd_kernels
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK
from pallas_kernels.ssd.mosaic_gpu.call import Call
from pallas_kernels.trapezoidal_ssd import ranks, weights
from pallas_kernels.trapezoidal_ssd.inputs import Inputs
from pallas_kernels.trapezoidal_ssd.mosaic_gpu import turning

_PARAMETERS = ("D", "B_bias", "C_bias")


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> str | None:
    """Says what stands in the way of running these kernels here, or None."""
    del delta_softplus, norm_epsilon
    rank = inputs.B.shape[3]
    if rank > CHUNK:
        return f"rank must be at most {CHUNK}, got {rank}; implementation='xla' takes any"
    return ssd_kernels.unsupported_matrices(inputs.x, inputs.B, inputs.C, chunk_size)


def trapezoidal_ssd(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> tuple[jax.Array, ...]:
    """Computes y and the parts of the final state; see ``Inputs``."""
    del chunk_size
    rank = inputs.B.shape[3]
    rows = 1 << (rank - 1).bit_length()
    delta = inputs.step_sizes(delta_softplus=delta_softplus)
    log_decay, weight, own_weight = weights.weights(inputs, delta)
    if inputs.segment_ids is not None:
        log_decay = jnp.where(segment_starts(inputs.segment_ids)[..., None], ssd_kernels.FORGET, log_decay)
    x = _input_per_rank(inputs)
    arrays = {
        "x": _as_tokens(_fill(x, 3, rows)),
        "log_decay": _as_tokens(_fill(log_decay[..., None], 3, rows)),
        "delta": jnp.repeat(weight, rows, axis=1),
        "own_weight": jnp.repeat(own_weight, rows, axis=1),
        "B": _fill(inputs.B, 3, rows),
        "C": _fill(inputs.C, 3, rows),
        "step_size": delta,
        "theta": inputs.theta.astype(jnp.float32),
        "initial_state": weights.state_before(inputs, delta),
    }
    for name in ("B_bias", "C_bias"):
        bias = getattr(inputs, name)
        if bias is not None:
            arrays[name] = _fill(bias, 1, rows)
    if inputs.D is not None:
        arrays["D"] = inputs.D
    y, final_state = _scan(arrays)
    y = _as_ranks(y, rows)[:, :, :, :rank]
    if not _is_output(inputs):
        y = ranks.output(y.astype(jnp.float32), x, inputs.z, inputs._replace(D=None), norm_epsilon=norm_epsilon)
    else:
        y = y[:, :, :, 0]
    return y.astype(inputs.x.dtype), final_state, *weights.last_token(inputs)


def _input_per_rank(inputs: Inputs) -> jax.Array:
    """(batch, length, heads, rank, head_dim) inputs, rounded as the kernels take them."""
    if inputs.B.shape[3] == 1 and inputs.mimo_x is None:
        return inputs.x[:, :, :, None]
    return ranks.input_per_rank(inputs.x, inputs).astype(inputs.x.dtype)


def _is_output(inputs: Inputs) -> bool:
    """Whether the kernels' output is the operator's."""
    return inputs.B.shape[3] == 1 and inputs.norm_weight is None and inputs.z is None and inputs.mimo_o is None


def _fill(array: jax.Array, dim: int, size: int) -> jax.Array:
    """Pads with zeros: ranks that neither see nor are seen."""
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, size - array.shape[dim])
    return jnp.pad(array, widths)


def _as_tokens(array: jax.Array) -> jax.Array:
    """(batch, length, heads, rows, …) to (batch, length · rows, heads, …), without the last one where it is rows."""
    array = jnp.swapaxes(array, 2, 3)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _as_ranks(array: jax.Array, rows: int) -> jax.Array:
    """(batch, length · rows, heads, …) to (batch, length, heads, rows, …)."""
    return jnp.swapaxes(array.reshape(array.shape[0], -1, rows, *array.shape[2:]), 2, 3)


@jax.custom_vjp
def _scan(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    results = _forward(False)(arrays)
    return results["y"], results["final_state"]


def _scan_forward(arrays: Arrays) -> tuple[tuple[jax.Array, jax.Array], tuple[Arrays, Arrays]]:
    results = _forward(True)(arrays)
    saved = {name: results[name] for name in ("states", "final_state")}
    return (results["y"], results["final_state"]), (arrays, saved)


def _scan_backward(residuals: tuple[Arrays, Arrays], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Arrays]:
    arrays, saved = residuals
    dy, dfinal_state = cotangents
    gradients = _backward(arrays | saved | {"dy": dy, "dfinal_state": dfinal_state})
    for name in _PARAMETERS:
        if name in arrays:
            gradients[name] = jnp.sum(gradients[name], axis=0)
    return ({name: gradients[name].astype(array.dtype) for name, array in arrays.items()},)


_scan.defvjp(_scan_forward, _scan_backward)


@functools.cache
def _forward(save_states: bool) -> Any:
    """The forward pass, with or without what the backward pass needs."""

    @functools.partial(batch_by_folding, parameters=_PARAMETERS)
    def run(arrays: Arrays) -> Arrays:
        return forward_pass(arrays, save_states=save_states)

    return run


@functools.partial(batch_by_folding, parameters=_PARAMETERS)
def _backward(arrays: Arrays) -> Arrays:
    return backward_pass(arrays)


def forward_pass(arrays: Arrays, *, save_states: bool) -> Arrays:
    """Returns "y" and "final_state", and what the backward pass will want of "states"."""
    angle = turning.angles(arrays["step_size"], arrays["theta"], turning.tokens_per_chunk(arrays))
    turned = turning.turned(arrays, angle)
    turned = arrays | {name: matrix.astype(arrays[name].dtype) for name, matrix in turned.items()}
    results = ssd_kernels.forward_pass(_call(turned), turned, save_states=save_states)
    return results | {"final_state": turning.turn_states(results["final_state"], -angle[:, -1])}


def backward_pass(arrays: Arrays) -> Arrays:
    """Returns gradients by the names of their arrays, those of parameters one an element of the batch."""
    tokens = turning.tokens_per_chunk(arrays)
    angle = turning.angles(arrays["step_size"], arrays["theta"], tokens)
    matrices = {name: arrays[name] for name in ("B", "C", "B_bias", "C_bias") if name in arrays}
    for name in ("B_bias", "C_bias"):
        if name in arrays:
            matrices[name] = jnp.broadcast_to(arrays[name], (arrays["x"].shape[0], 1, *arrays[name].shape))
    turned, vjp = jax.vjp(turning.turned, matrices, angle)
    turned_arrays = arrays | {name: matrix.astype(arrays[name].dtype) for name, matrix in turned.items()}
    turned_arrays["dfinal_state"] = turning.turn_states(arrays["dfinal_state"], angle[:, -1])
    call = _call(turned_arrays)
    gradients = ssd_kernels.backward_pass(call, turned_arrays)
    of_matrices, dangle = vjp({name: gradients[name] for name in ("B", "C")})
    for name in ("B_bias", "C_bias"):
        if name in arrays:
            of_matrices[name] = of_matrices[name][:, 0]
    final_state = call.pad_state(turning.turn_states(arrays["final_state"], angle[:, -1]))
    turns = turning.turn_gradients(
        arrays["states"], gradients.pop("dstates"), final_state, call.pieces, arrays["B"].shape[-1], angle.shape[-1]
    )
    dincrements = turning.increment_gradients(dangle, turns, tokens)
    return {
        **gradients,
        **of_matrices,
        "step_size": turning.product("blhp,blp->blh", dincrements, arrays["theta"]),
        "theta": turning.product("blhp,blh->blp", dincrements, arrays["step_size"]),
    }


def _call(arrays: Arrays) -> Call:
    return Call(arrays, rank=arrays["x"].shape[1] // arrays["theta"].shape[1])
