"""The causal convolution as it is defined: a weighted sum over a window of every token's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.segments import segment_starts


def unsupported_reason(inputs: Inputs, *, activation: str | None) -> str | None:
    """Runs everywhere."""
    del inputs, activation


def causal_conv1d(inputs: Inputs, *, activation: str | None) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    batch, length, _ = inputs.x.shape
    width = inputs.weight.shape[0]
    segments = jnp.zeros((batch, length), int)
    if inputs.segment_ids is not None:
        segments = jnp.cumsum(segment_starts(inputs.segment_ids), axis=1)
    # One window more than there are tokens: that of the next token, whose first width - 1 inputs are the final state.
    segments = jnp.pad(segments, ((0, 0), (width - 1, 1)), mode="edge")
    tokens = jnp.pad(inputs.extended(), ((0, 0), (0, 1), (0, 0)))

    taps = jnp.arange(length + 1)[:, None] + jnp.arange(width)
    same_segment = segments[:, taps] == segments[:, width - 1 :, None]
    windows = jnp.where(same_segment[..., None], tokens[:, taps], 0)

    y = jnp.sum(windows[:, :-1].astype(inputs.real_dtype) * inputs.weight, axis=2)
    if inputs.bias is not None:
        y = y + inputs.bias
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(inputs.x.dtype), windows[:, -1, :-1]
