"""Trapezoidal SSD of a sequence whose length is spread over devices.

The angle that reaches a device is a sum over the devices before it; its neighbour's last B and x arrive from there. Then
the rest of the state is passed on as for ``ssd``, by a first pass for what each device leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.sequence_parallel import state_before
from pallas_kernels.sharding import Axis, continues_previous, from_last, from_previous
from pallas_kernels.trapezoidal_ssd import ranks, rotation
from pallas_kernels.trapezoidal_ssd.inputs import Inputs


def scan(
    run: Callable[[Inputs], tuple[jax.Array, ...]], inputs: Inputs, axis: Axis, *, delta_softplus: bool
) -> tuple[jax.Array, ...]:
    """Computes a device's part of y, and the state after the whole sequence on every device.

    Args:
        run: computes y and the final state of a device's own tokens.
        inputs: this device's part of the arrays, the whole of the initial state.
        axis: mesh axis, manual here, that the length is sharded over.
        delta_softplus: as for the operator.
    """
    ids = inputs.segment_ids
    delta = inputs.step_sizes(delta_softplus=delta_softplus)
    inputs = _with_token_before(inputs, delta, axis)
    _, own, *_ = run(
        inputs._replace(D=None, z=None, norm_weight=None, initial_ssm=jnp.zeros_like(inputs.initial_ssm))
    )
    decay = jnp.exp(jnp.sum(delta * inputs.A.astype(delta.dtype), axis=1))[..., None, None]
    before = state_before(own, decay, axis, start=inputs.initial_ssm, segment_ids=ids)
    y, *state = run(inputs._replace(initial_ssm=before))
    return y, *(from_last(part, axis) for part in state)


def _with_token_before(inputs: Inputs, delta: jax.Array, axis: Axis) -> Inputs:
    """Puts the angle, B and x before this device's first token into the initial state."""
    ids = inputs.segment_ids
    if ids is None:
        in_last_segment = jnp.ones(delta.shape[:2], bool)
        restarts = jnp.zeros(delta.shape[:1], bool)
        continues = jnp.ones(delta.shape[:1], bool)
    else:
        starts = segment_starts(ids)
        later_starts = jnp.cumsum(starts[:, ::-1], axis=1)[:, ::-1] - starts
        in_last_segment = later_starts == 0
        restarts = jnp.any(starts, axis=1)
        continues = continues_previous(ids, axis)

    increments = delta[..., None] * inputs.theta.astype(delta.dtype)[:, :, None]
    own = rotation.angle_sum(increments, in_last_segment)
    angle = state_before(own, jnp.ones_like(own), axis, start=inputs.initial_angle, segment_ids=ids)
    angle_after = own + jnp.where(restarts[:, None, None], 0, angle)
    B = ranks.matrix_per_head(inputs.B[:, -1], inputs.B_bias, inputs)
    B = rotation.rotate(B, angle_after[:, :, None])
    x = inputs.x[:, -1].astype(inputs.real_dtype)

    first = jax.lax.axis_index(axis) == 0

    def neighbour(own: jax.Array, initial: jax.Array) -> jax.Array:
        rows = continues.reshape(-1, *(1,) * (own.ndim - 1))
        return jnp.where(first, initial, jnp.where(rows, from_previous(own, axis), 0))

    return inputs._replace(
        initial_B=neighbour(B, inputs.initial_B), initial_x=neighbour(x, inputs.initial_x), initial_angle=angle
    )
