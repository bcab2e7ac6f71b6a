"""What a causal convolution has to remember of the past."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.segments import segment_starts


def final_state(inputs: Inputs) -> jax.Array:
    """Returns the last width - 1 inputs, zeros in place of those before the last token's segment."""
    length = inputs.x.shape[1]
    state = inputs.extended()[:, length:]
    if inputs.segment_ids is None:
        return state
    reach = state.shape[1]
    starts = jnp.pad(segment_starts(inputs.segment_ids), ((0, 0), (reach, 0)))[:, length:].astype(jnp.int32)
    later_starts = jax.lax.cumsum(starts, axis=1, reverse=True) - starts
    return jnp.where((later_starts == 0)[..., None], state, 0)
