"""The causal convolution of a sequence whose length is spread over devices.

Every device needs the last width - 1 inputs of the ones before it, which arrive from its neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.causal_conv1d.state import final_state
from pallas_kernels.sharding import Axis, continues_previous, from_last, from_previous, vary_like


def causal_conv1d(
    convolve: Callable[[Inputs], tuple[jax.Array, jax.Array]], inputs: Inputs, axis: Axis
) -> tuple[jax.Array, jax.Array]:
    """Computes a device's part of y, and the state after the whole sequence on every device.

    Args:
        convolve: computes y and the final state of a device's own tokens.
        inputs: this device's part of the arrays, the whole of ``initial_state``.
        axis: mesh axis, manual here, that the length is sharded over.
    """
    y, state = convolve(inputs._replace(initial_state=_state_before(inputs, axis)))
    return y, from_last(state, axis)


def _state_before(inputs: Inputs, axis: Axis) -> jax.Array:
    batch, length, channels = inputs.x.shape
    reach = inputs.weight.shape[0] - 1
    first = inputs.initial_state
    if first is None:
        first = vary_like(jnp.zeros((batch, reach, channels), inputs.x.dtype), inputs.x)
    state = first
    # A part shorter than the filter hands on inputs of parts before it, which need as many steps to arrive.
    for _ in range(math.ceil(reach / length)):
        left_behind = final_state(inputs._replace(initial_state=state))
        state = jnp.where(jax.lax.axis_index(axis) == 0, first, from_previous(left_behind, axis))
        if inputs.segment_ids is not None:
            state = jnp.where(continues_previous(inputs.segment_ids, axis)[:, None, None], state, 0)
    return state
