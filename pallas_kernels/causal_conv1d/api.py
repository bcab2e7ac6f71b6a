"""Signature of the causal convolution: what it accepts, and which implementation gets it."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv1d import sequence_parallel
from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.dispatch import dispatch
from pallas_kernels.validation import Checker

_TOKEN = ("batch", "length", "channels")
_STATE = ("batch", "width - 1", "channels")
_INPUT_DIMS = {
    "x": _TOKEN,
    "weight": ("width", "channels"),
    "bias": ("channels",),
    "segment_ids": ("batch", "length"),
    "initial_state": _STATE,
}
_ACTIVATIONS = (None, "silu")


def causal_conv1d(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "width channels"],
    bias: Float[Array, " channels"] | None = None,
    *,
    activation: str | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch width-1 channels"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> (
    Float[Array, "batch length channels"]
    | tuple[Float[Array, "batch length channels"], Float[Array, "batch width-1 channels"]]
):
    """Filters every channel with a few taps of its own, seeing no token ahead.

    ``y[t] = activation(bias + sum over k of weight[k] x[t - width + 1 + k])``: the convolution in front of the
    selective scan in figure 3 of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (2023). The last tap is that of the token itself, as in PyTorch's ``Conv1d``. Sums are float32 whatever the inputs'
    dtypes (float64 for float64 ``x``).

    The state is what a sequence cut in two has to pass on: the inputs before the first token. Differentiable in every
    floating-point array, the states included; reverse mode only.

    Args:
        x: input.
        weight: taps; any width from 1.
        bias: added before the activation; None for none.
        activation: None or "silu".
        segment_ids: number of the document each token belongs to. Inputs before a change of it count as zero after it.
        initial_state: the width - 1 inputs before the first token, zeros by default. They count as of the first
            token's segment, whatever its id.
        return_final_state: whether to return the state after the last token.
        implementation: "mosaic_gpu", "xla" or "reference"; None takes the best that supports the call.

    Returns:
        y in ``x``'s dtype; with ``return_final_state`` also the last width - 1 inputs in ``x``'s dtype, with zeros in
        place of those that are of another segment than the last token.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the activation is unknown.
        UnsupportedError: the named implementation cannot run this call.
    """
    inputs = _canonical("causal_conv1d", Inputs(x, weight, bias, segment_ids, initial_state), activation)
    y, final_state = _run(inputs, activation, implementation)
    return (y, final_state) if return_final_state else y


def causal_conv1d_step(
    state: Float[Array, "batch past channels"],
    x: Float[Array, "batch channels"],
    weight: Float[Array, "width channels"],
    bias: Float[Array, " channels"] | None = None,
    *,
    activation: str | None = None,
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch past channels"]]:
    """Runs ``causal_conv1d`` for one token: its arguments without the length.

    Args:
        state: the width - 1 inputs before the token.
        x: input.
        weight: taps.
        bias: added before the activation; None for none.
        activation: None or "silu".

    Returns:
        y and the state after the token, both in ``x``'s dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the activation is unknown.
    """
    inputs = _canonical("causal_conv1d_step", Inputs(x[:, None], weight, bias, None, state), activation)
    y, state = _run(inputs, activation, "xla")
    return y[:, 0], state


def _run(inputs: Inputs, activation: str | None, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    return dispatch(
        "causal_conv1d",
        implementation,
        inputs,
        _INPUT_DIMS,
        (_TOKEN, _STATE),
        along_length=sequence_parallel.causal_conv1d,
        activation=activation,
    )


def _canonical(operator: str, inputs: Inputs, activation: str | None) -> Inputs:
    """Checks all arguments, casts the state."""
    check, initial_state = Checker(operator), inputs.initial_state
    check.arrays(inputs._replace(initial_state=None)._asdict(), _INPUT_DIMS)
    if activation not in _ACTIVATIONS:
        raise check.error(f"activation must be one of {_ACTIVATIONS}, got {activation!r}")
    if initial_state is None:
        return inputs
    check.fix("width - 1", inputs.weight.shape[0] - 1, "weight")
    check("initial_state", initial_state, _STATE)
    return inputs._replace(initial_state=initial_state.astype(inputs.x.dtype))
