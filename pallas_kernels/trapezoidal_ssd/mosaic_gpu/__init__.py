"""The trapezoidal SSD operator out of the SSD operator's Pallas Mosaic GPU kernels; docs/mamba3.md explains how.

The recurrence has one input a token (``weights.py``) and its state stands still, in exchange for B and C that turn
(``turning.py``). What is left is an SSD of heads that are groups of their own, whose tokens enter their own outputs
with a weight of their own. Rows of a token follow each other in the sequence; only the first lets the state decay, and
the kernels' masks know which rows are one token.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.batching import Arrays
from pallas_kernels.differentiation import with_backward_pass
from pallas_kernels.segments import segment_starts
from pallas_kernels.ssd import mosaic_gpu as ssd_kernels
from pallas_kernels.ssd.mosaic_gpu import slopes, states
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK
from pallas_kernels.ssd.mosaic_gpu.call import Call
from pallas_kernels.trapezoidal_ssd import ranks, weights
from pallas_kernels.trapezoidal_ssd.inputs import Inputs
from pallas_kernels.trapezoidal_ssd.mosaic_gpu import (
    angles,
    backward,
    forward,
    plan,
    sum_heads,
    turning,
)


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, norm_epsilon: float, chunk_size: int | None
) -> str | None:
    """Says what stands in the way of running these kernels here, or None."""
    del delta_softplus, norm_epsilon
    rank, state = inputs.B.shape[3:]
    if rank > CHUNK:
        return f"rank must be at most {CHUNK}, got {rank}; implementation='xla' takes any"
    if turning.padded_state(state) > plan.MAX_STATE:
        return f"state must be at most {plan.MAX_STATE}, got {state}; implementation='xla' takes any"
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
    }
    if inputs.initial_ssm is not None:
        arrays["initial_state"] = weights.state_before(inputs, delta)
    for name in ("B_bias", "C_bias"):
        bias = getattr(inputs, name)
        if bias is not None:
            arrays[name] = _fill(bias, 1, rows)
    if inputs.D is not None:
        arrays["D"] = inputs.D
    y, final_state = _scan(arrays)
    y = _as_ranks(y, rows)[:, :, :, :rank]
    y = y[:, :, :, 0] if _is_output(inputs) else _output(y, x, inputs._replace(D=None), norm_epsilon)
    return y, final_state, *weights.last_token(inputs)


# Computed again in the backward pass, which would otherwise be given several arrays in float32.
@functools.partial(jax.checkpoint, static_argnums=(3,))
def _output(y: jax.Array, x: jax.Array, inputs: Inputs, norm_epsilon: float) -> jax.Array:
    y = ranks.output(y.astype(jnp.float32), x, inputs.z, inputs, norm_epsilon=norm_epsilon)
    return y.astype(inputs.x.dtype)


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


def forward_pass(arrays: Arrays, *, save_states: bool) -> Arrays:
    """Returns "y" and "final_state", and with ``save_states`` what the backward pass will want.

    That is "states", before each chunk, and "tokens" and "angles", which are not made twice.
    """
    made = _kernel_arrays(arrays)
    call = _call(made, arrays)
    inputs = _prepared(call, made, "x", "B", "C", "D")
    inputs |= call.starts(inputs, made.get("initial_state"), reverse=False)
    results = forward.scan(call.problem(call.plan.forward), inputs, save_states=save_states)
    end = results["end"][:, -1]
    final_state = turning.as_given(call.trim_state(end), arrays["B"].shape[-1])
    trimmed = {
        "y": call.trim_tokens(results["y"], arrays["x"]),
        "final_state": turning.turn_states(final_state, _last_angles(call, made), back=True),
    }
    if save_states:
        trimmed |= {"states": results["states"], "tokens": inputs["tokens"], "angles": made["angles"]}
    return trimmed


def backward_pass(arrays: Arrays) -> Arrays:
    """Returns gradients by the names of their arrays, those of parameters one an element of the batch."""
    made = _kernel_arrays(arrays)
    call = _call(made, arrays)
    inputs = _prepared(call, made | {"dy": arrays["dy"]}, "x", "dy", "B", "C", "D")
    dfinal_state = arrays.get("dfinal_state")
    if dfinal_state is not None:
        dfinal_state = turning.in_parts(turning.turn_states(dfinal_state, _last_angles(call, made)))
    start = call.starts(inputs, dfinal_state, reverse=True)
    walk = call.problem(call.plan.states)
    walked = states.scan(walk, inputs | start, reverse=True, save=True)
    inputs |= {"states": arrays["states"], "dstates": walked["states"], **_angle_factors(call, arrays)}
    results = backward.scan(walk, inputs, splits=call.plan.splits, stages=call.plan.stages)
    numbers = slopes.gradients(call.by_head(results["slopes"]), inputs["tokens"])
    gradients = {
        "x": call.trim_tokens(results["dx"], arrays["x"]),
        **{name: call.trim_numbers(gradient) for name, gradient in numbers.items()},
        **_angle_gradients(call, arrays, results),
    }
    if "initial_state" in arrays:
        end = call.trim_state(walked["end"][:, 0])
        gradients["initial_state"] = turning.as_given(end, arrays["B"].shape[-1])
    if "D" in arrays:
        gradients["D"] = call.trim_channels(jnp.sum(results["dD"], axis=1).reshape(call.batch, -1))
    return gradients | _matrix_gradients(call, arrays, results["dmatrices"])


_scan = with_backward_pass(forward_pass, backward_pass, parameters=("D", "B_bias", "C_bias"))


def _matrix_gradients(call: Call, arrays: Arrays, of_heads: jax.Array) -> Arrays:
    """Gradients of B, C and their biases, given those of every head's B and C, cut as the backward kernel does."""
    length, groups, rank, state = arrays["B"].shape[1:]
    of_groups, of_chunks = (
        array.reshape(2, call.batch, *array.shape[1:])
        for array in sum_heads.sums(of_heads.reshape(-1, *of_heads.shape[2:]), groups)
    )
    gradients = {}
    for i, name in enumerate(("B", "C")):
        of_group = of_groups[i].reshape(call.batch, -1, rank, groups, call.state)[:, :length]
        gradients[name] = turning.as_given(jnp.swapaxes(of_group, 2, 3), state)
        if f"{name}_bias" in arrays:
            if rank == 1:
                of_bias = jnp.sum(of_chunks[i], axis=1)
            else:
                by_rank = of_heads[i].reshape(*of_heads.shape[1:5], -1, rank, of_heads.shape[-1])
                of_bias = jnp.moveaxis(jnp.sum(by_rank.astype(jnp.float32), axis=(1, 4)), 3, 1)
            of_pieces = of_bias.reshape(call.batch, rank, call.heads, call.pieces, call.state)
            of_bias = jnp.swapaxes(jnp.sum(of_pieces, axis=3), 1, 2)
            gradients[f"{name}_bias"] = turning.as_given(of_bias, state)
    return gradients


def _angle_gradients(call: Call, arrays: Arrays, results: Arrays) -> Arrays:
    """Gradients of "step_size" and "theta", given what the kernel found for every head and row."""
    length, pairs = arrays["theta"].shape[1:]
    dstep_size, dtheta = call.by_head(results["dstep_size"]), jnp.sum(results["dtheta"], axis=0)
    # Of a token's rows the first has the sum over all of them.
    dstep_size = dstep_size.reshape(call.batch, call.heads, -1, call.rank)[:, :, :length, 0]
    dtheta = dtheta.reshape(call.batch, -1, call.rank, dtheta.shape[-1])[:, :length, 0, :pairs]
    return {"step_size": jnp.swapaxes(dstep_size, 1, 2), "theta": dtheta}


def _angle_factors(call: Call, arrays: Arrays) -> Arrays:
    """Step sizes and theta of every row, whose products are the angles, as the backward kernel takes them."""
    tokens = CHUNK // call.rank

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, call.chunks * tokens - array.shape[1]), (0, 0)))
        by_chunk = padded.reshape(call.batch, call.chunks, tokens, -1)
        return jnp.repeat(by_chunk, call.rank, axis=2)

    theta = arrays["theta"]
    theta = jnp.pad(theta, ((0, 0), (0, 0), (0, call.pairs - theta.shape[2])))
    return {"theta": cut(theta), "step_size": jnp.moveaxis(cut(arrays["step_size"]), 3, 1)}


def _kernel_arrays(arrays: Arrays) -> Arrays:
    """The arrays as ``Call`` takes them: with angles, the kernels' state, and rows in the place of ranks."""
    rank = arrays["B"].shape[3]
    made = dict(arrays)
    if "initial_state" in arrays:
        made["initial_state"] = turning.in_parts(arrays["initial_state"])
    if "angles" not in arrays:
        sums = angles.sums(arrays["step_size"], arrays["theta"], CHUNK // rank)
        made["angles"] = jnp.repeat(sums, rank, axis=3)
    for name in ("B", "C"):
        made[name] = turning.in_parts(_as_tokens(arrays[name]))
        if f"{name}_bias" in arrays:
            bias = turning.in_parts(arrays[f"{name}_bias"])
            made[f"{name}_bias"] = bias[:, 0] if rank == 1 else jnp.tile(bias, (1, CHUNK // rank, 1))
    return made


def _prepared(call: Call, made: Arrays, *names: str) -> Arrays:
    """``Call.prepared``, and what these kernels need besides."""
    turns = {name: made[name] for name in ("angles", "B_bias", "C_bias") if name in made}
    return call.prepared(made, *names) | turns


def _last_angles(call: Call, made: Arrays) -> jax.Array:
    """The angles at the end of the sequence, by which the kernels' final state is turned."""
    angles = turning.angles_at_end(made["angles"], call.length - 1)
    return angles[:, : call.heads, : made["theta"].shape[-1]]


def _call(made: Arrays, arrays: Arrays) -> Call:
    batch, length, heads, head_dim = made["x"].shape
    groups, state = made["B"].shape[2:]
    pieces, chunks = -(-head_dim // CHANNELS), -(-length // CHUNK)
    chosen = plan.choose(batch, chunks, heads * pieces, groups, state, made["angles"].shape[-1])
    return Call(made, chosen, rank=arrays["B"].shape[3])
