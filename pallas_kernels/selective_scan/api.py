"""Signature of the selective scan: what it accepts, and which implementation gets it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact, Int

from pallas_kernels import sequence_parallel
from pallas_kernels.dispatch import dispatch, one_token
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.sharding import Axis, shard_groups
from pallas_kernels.validation import INTEGER, REAL_OR_COMPLEX, Checker

_Outputs = tuple[jax.Array, jax.Array]

_TOKEN = ("batch", "length", "channels")
_MATRIX = ("batch", "length", "groups", "state")
_STATE = ("batch", "channels", "state")
_INPUT_DIMS = {
    "x": _TOKEN,
    "delta": _TOKEN,
    "A": ("channels", "state"),
    "B": _MATRIX,
    "C": _MATRIX,
    "D": ("channels",),
    "z": _TOKEN,
    "delta_bias": ("channels",),
    "segment_ids": ("batch", "length"),
    "initial_state": _STATE,
}
_KINDS = {"segment_ids": INTEGER, **dict.fromkeys(("A", "B", "C", "initial_state"), REAL_OR_COMPLEX)}


def selective_scan(
    x: Float[Array, "batch length channels"],
    delta: Float[Array, "batch length channels"],
    A: Inexact[Array, "channels state"],
    B: Inexact[Array, "batch length *groups state"],
    C: Inexact[Array, "batch length *groups state"],
    D: Float[Array, " channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    *,
    delta_bias: Float[Array, " channels"] | None = None,
    delta_softplus: bool = False,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch channels state"] | Complex[Array, "batch channels state"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "batch length channels"] | tuple[Float[Array, "batch length channels"], Inexact[Array, ...]]:
    """Runs a diagonal state-space model whose step size, input and output matrices change with every token.

    With ``delta' = softplus(delta + delta_bias)`` (without the softplus unless ``delta_softplus``), for each channel::

        h[t] = exp(delta'[t] A) h[t-1] + delta'[t] B[t] x[t]
        y[t] = (C[t] · h[t] + D x[t]) silu(z[t])

    This is algorithm 2 of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), with
    the gate of its figure 3. State and sums are float32 whatever the inputs' dtypes (float64 for float64 ``x``).

    With complex ``A`` the state is complex64 and stands for itself and its complex conjugate, so that
    ``y[t] = 2 Re(C[t] · h[t])``, without conjugating ``C``: the convention of mamba_ssm, S4 and S4D. ``B`` and ``C``
    may then be complex too.

    Differentiable in every floating-point array, ``initial_state`` and the final state included; reverse mode only.
    Peak memory grows with batch·length·channels, never with that times the state, except in "reference".

    Args:
        x: input.
        delta: step sizes, before the bias and the softplus.
        A: state matrix, diagonal. Its real part should be negative.
        B: input matrix, shared by all channels or by those of a group: channel c uses group c // (channels // groups).
        C: output matrix, of the same shape as ``B``.
        D: skip connection; None for none.
        z: gate; None for none.
        delta_bias: added to ``delta``.
        delta_softplus: whether the step sizes go through a softplus.
        segment_ids: number of the document each token belongs to; the state is zero at each change.
        initial_state: state before the first token, zero by default. The first token continues it, whatever its
            segment id. Complex for complex ``A``.
        return_final_state: whether to return the state after the last token.
        implementation: "mosaic_gpu", "xla" or "reference"; None takes the best that supports the call.

    Returns:
        y in ``x``'s dtype; with ``return_final_state`` also the state after the last token, (batch, channels, state)
        in float32 (complex64 for complex ``A``).

    Raises:
        ValueError: shapes or dtypes do not fit together.
        UnsupportedError: the named implementation cannot run this call.
    """
    inputs = _canonical("selective_scan", Inputs(x, delta, A, B, C, D, z, delta_bias, segment_ids, initial_state))
    y, final_state = _run(inputs, delta_softplus, implementation)
    return (y, final_state) if return_final_state else y


def selective_scan_step(
    state: Inexact[Array, "batch channels state"],
    x: Float[Array, "batch channels"],
    delta: Float[Array, "batch channels"],
    A: Inexact[Array, "channels state"],
    B: Inexact[Array, "batch *groups state"],
    C: Inexact[Array, "batch *groups state"],
    D: Float[Array, " channels"] | None = None,
    z: Float[Array, "batch channels"] | None = None,
    *,
    delta_bias: Float[Array, " channels"] | None = None,
    delta_softplus: bool = False,
) -> tuple[Float[Array, "batch channels"], Inexact[Array, "batch channels state"]]:
    """Runs ``selective_scan`` for one token: its arguments without the length.

    Args:
        state: state before the token, float32 (complex64 for complex ``A``).
        x: input.
        delta: step sizes, before the bias and the softplus.
        A: state matrix, diagonal.
        B: input matrix, (batch, state) or (batch, groups, state).
        C: output matrix, of the same shape as ``B``.
        D: skip connection; None for none.
        z: gate; None for none.
        delta_bias: added to ``delta``.
        delta_softplus: whether the step sizes go through a softplus.

    Returns:
        y in ``x``'s dtype, and the state after the token.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    x, delta, B, C, z = one_token(x, delta, B, C, z)
    inputs = _canonical("selective_scan_step", Inputs(x, delta, A, B, C, D, z, delta_bias, None, state))
    y, state = _run(inputs, delta_softplus, "reference")
    return y[:, 0], state


def _run(inputs: Inputs, delta_softplus: bool, implementation: str | None) -> _Outputs:
    def along_length(compute: Callable[[Inputs], _Outputs], inputs: Inputs, axis: Axis) -> _Outputs:
        delta = inputs.step_sizes(delta_softplus=delta_softplus)
        decay = jnp.exp(jnp.sum(delta, axis=1)[..., None] * inputs.A.astype(inputs.state_dtype))
        return sequence_parallel.scan(compute, inputs, decay, axis)

    inputs, input_dims = shard_groups(inputs, _INPUT_DIMS, "channels")
    return dispatch(
        "selective_scan",
        implementation,
        inputs,
        input_dims,
        (_TOKEN, _STATE),
        along_length,
        delta_softplus=delta_softplus,
    )


def _canonical(operator: str, inputs: Inputs) -> Inputs:
    """Checks all arguments, gives B and C their groups, casts the state."""
    check, A, B, C, initial_state = Checker(operator), inputs.A, inputs.B, inputs.C, inputs.initial_state
    dims = dict(_INPUT_DIMS)
    for name, array in (("B", B), ("C", C)):
        if array.ndim == 3:
            dims[name] = ("batch", "length", "state")
    check.arrays(inputs._asdict(), dims, _KINDS)
    for name, array in (("B", B), ("C", C)):
        if jnp.iscomplexobj(array) and not jnp.iscomplexobj(A):
            raise check.error(f"{name} is {array.dtype} but A is {A.dtype}; only a complex A can have a complex {name}")
    if B.ndim != C.ndim:
        raise check.error(f"B and C must have the same shape, got {B.shape} and {C.shape}")
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    else:
        check.multiple("channels", "groups")
    if initial_state is not None:
        if jnp.iscomplexobj(initial_state) and not jnp.iscomplexobj(A):
            raise check.error(f"initial_state is {initial_state.dtype} but A is {A.dtype}; give its real part")
        initial_state = initial_state.astype(inputs.state_dtype)
    return inputs._replace(B=B, C=C, initial_state=initial_state)
