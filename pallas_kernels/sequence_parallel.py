"""Scans of a sequence whose length is spread over devices.

Every device scans its part twice: first from a zero state, only for the state that its own tokens leave behind; then
from the state that reaches it. In between, the devices exchange these states and the decay over their whole parts,
all that the rest of the sequence can know of them. The traffic does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.sharding import Axis, continues_previous, from_last, vary_like


def scan(
    run: Callable[[Any], tuple[jax.Array, jax.Array]], inputs: Any, decay: jax.Array, axis: Axis
) -> tuple[jax.Array, jax.Array]:
    """Computes a device's part of y, and the state after the whole sequence on every device.

    Args:
        run: computes y and the final state of a device's own tokens.
        inputs: the operator's NamedTuple, with this device's part of the arrays and the whole of ``initial_state``.
        decay: what a state is multiplied by on its way through this device's tokens if they are of one segment, (batch,
            ...), broadcast against the state.
        axis: mesh axis, manual here, that the length is sharded over.
    """
    _, own = run(inputs._replace(D=None, z=None, initial_state=None))
    before = state_before(own, decay, axis, start=inputs.initial_state, segment_ids=inputs.segment_ids)
    y, final_state = run(inputs._replace(initial_state=before))
    return y, from_last(final_state, axis)


def state_before(
    own: jax.Array, decay: jax.Array, axis: Axis, *, start: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Returns the state that reaches this device's first token, from the states that each part leaves behind.

    Args:
        own: state that this device's tokens leave behind when they start from none.
        decay: what a state is multiplied by on its way through this device's tokens, as for ``scan``.
        axis: mesh axis, manual here, that the length is sharded over.
        start: state before the whole sequence; None for zero.
        segment_ids: (batch, length), this device's part; a state passes within a segment only.
    """

    def keep(state: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *(1,) * (state.ndim - 1)), state, 0)

    def next_part(state, part):
        decay, own, passes = part
        before = keep(state, passes)
        return decay * before + own, before

    passes = jnp.ones((own.shape[0],), bool)
    if segment_ids is not None:
        passes = continues_previous(segment_ids, axis)
        decay = keep(decay, ~jnp.any(segment_starts(segment_ids), axis=1))
    if start is None:
        start = vary_like(jnp.zeros_like(own), own)
    parts = jax.lax.all_gather((decay, own, vary_like(passes, own)), axis)
    _, states = jax.lax.scan(next_part, start, parts)
    return jax.lax.dynamic_index_in_dim(states, jax.lax.axis_index(axis), keepdims=False)
