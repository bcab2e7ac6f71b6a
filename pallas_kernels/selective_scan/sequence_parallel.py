"""The selective scan of a sequence whose length is spread over devices.

Every device scans its part twice: first from a zero state, only for the state that its own tokens leave behind; then
from the state that reaches it. In between, the devices exchange these states and the decay over their whole parts,
all that the rest of the sequence can know of them. The traffic does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.sharding import Axis, continues_previous, from_last, vary_like


def selective_scan(
    scan: Callable[[Inputs], tuple[jax.Array, jax.Array]], inputs: Inputs, axis: Axis, *, delta_softplus: bool
) -> tuple[jax.Array, jax.Array]:
    """Computes a device's part of y, and the state after the whole sequence on every device.

    Args:
        scan: computes y and the final state of a device's own tokens.
        inputs: this device's part of the arrays, the whole of ``initial_state``.
        axis: mesh axis, manual here, that the length is sharded over.
        delta_softplus: whether the step sizes go through a softplus.
    """
    _, own = scan(inputs._replace(D=None, z=None, initial_state=None))
    before = _states_before(own, inputs, axis, delta_softplus=delta_softplus)
    y, final_state = scan(inputs._replace(initial_state=before))
    return y, from_last(final_state, axis)


def _states_before(own: jax.Array, inputs: Inputs, axis: Axis, *, delta_softplus: bool) -> jax.Array:
    """Returns the state that reaches this device's first token, from the states that each part leaves behind."""
    decay = _decay(inputs, delta_softplus=delta_softplus)
    passes = jnp.ones((inputs.x.shape[0],), bool)
    if inputs.segment_ids is not None:
        passes = continues_previous(inputs.segment_ids, axis)
    start = inputs.initial_state
    if start is None:
        start = vary_like(jnp.zeros_like(own), own)

    def next_part(state, part):
        decay, own, passes = part
        before = jnp.where(passes[:, None, None], state, 0)
        return decay * before + own, before

    parts = jax.lax.all_gather((decay, own, vary_like(passes, own)), axis)
    _, states = jax.lax.scan(next_part, start, parts)
    return jax.lax.dynamic_index_in_dim(states, jax.lax.axis_index(axis), keepdims=False)


def _decay(inputs: Inputs, *, delta_softplus: bool) -> jax.Array:
    """Returns what a state is multiplied by on its way through this device's tokens, (batch, channels, state)."""
    delta = inputs.delta.astype(inputs.real_dtype)
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias
    if delta_softplus:
        delta = jax.nn.softplus(delta)
    decay = jnp.exp(jnp.sum(delta, axis=1)[..., None] * inputs.A.astype(inputs.state_dtype))
    if inputs.segment_ids is None:
        return decay
    ends = jnp.any(segment_starts(inputs.segment_ids), axis=1)
    return jnp.where(ends[:, None, None], 0, decay)
