"""Signature of the SSD operator: what it accepts, and which implementation gets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import sequence_parallel
from pallas_kernels.dispatch import dispatch, one_token
from pallas_kernels.sharding import Axis, shard_groups
from pallas_kernels.ssd.inputs import Inputs
from pallas_kernels.validation import Checker

_Outputs = tuple[jax.Array, jax.Array]

_TOKEN = ("batch", "length", "heads", "head_dim")
_MATRIX = ("batch", "length", "groups", "state")
_STATE = ("batch", "heads", "head_dim", "state")
_INPUT_DIMS = {
    "x": _TOKEN,
    "delta": ("batch", "length", "heads"),
    "A": ("heads",),
    "B": _MATRIX,
    "C": _MATRIX,
    "D": ("heads", "head_dim"),
    "z": _TOKEN,
    "delta_bias": ("heads",),
    "segment_ids": ("batch", "length"),
    "initial_state": _STATE,
}


def ssd(
    x: Float[Array, "batch length heads head_dim"],
    delta: Float[Array, "batch length heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch length groups state"],
    C: Float[Array, "batch length groups state"],
    D: Float[Array, "heads *head_dim"] | None = None,
    z: Float[Array, "batch length heads head_dim"] | None = None,
    *,
    delta_bias: Float[Array, " heads"] | None = None,
    delta_softplus: bool = False,
    delta_limit: tuple[float, float] = (0.0, math.inf),
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads head_dim state"] | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> (
    Float[Array, "batch length heads head_dim"]
    | tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch heads head_dim state"]]
):
    """Runs a state-space model whose state decays by one scalar a head and token.

    With ``delta' = clip(softplus(delta + delta_bias), *delta_limit)`` (without the softplus unless
    ``delta_softplus``), for each head::

        h[t] = exp(delta'[t] A) h[t-1] + delta'[t] x[t] B[t]^T
        y[t] = (h[t] C[t] + D x[t]) silu(z[t])

    This is the layer of Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
    Structured State Space Duality" (2024), section 5, and computed in the chunked form of its section 6. State and sums
    are float32 whatever the inputs' dtypes (float64 for float64 ``x``); where ``x``, ``B`` and ``C`` are bfloat16, so
    are the operands of matrix products, except in "reference".

    Differentiable in every floating-point array, ``initial_state`` and the final state included; reverse mode only.
    Peak memory grows with one state a chunk, never with one a token, except in "reference".

    Args:
        x: input.
        delta: step sizes, before the bias, the softplus and the limits.
        A: decay rates, one a head. They should be negative.
        B: input matrix of each group of heads: head h uses group h // (heads // groups).
        C: output matrix, of the same shape as ``B``.
        D: skip connection, one a head or one a channel, (heads, head_dim); None for none.
        z: gate; None for none.
        delta_bias: added to ``delta``.
        delta_softplus: whether the step sizes go through a softplus.
        delta_limit: least and largest step size, applied last.
        segment_ids: number of the document each token belongs to; the state is zero at each change.
        initial_state: state before the first token, zero by default. The first token continues it, whatever its
            segment id.
        return_final_state: whether to return the state after the last token.
        chunk_size: tokens that are computed together, any number from 1; None takes what suits the implementation. It
            changes time and memory, and the results by rounding only.
        implementation: "mosaic_gpu", "xla" or "reference"; None takes the best that supports the call.

    Returns:
        y in ``x``'s dtype; with ``return_final_state`` also the state after the last token, (batch, heads, head_dim,
        state) in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, or limits or chunk size make no sense.
        UnsupportedError: the named implementation cannot run this call.
    """
    inputs = _canonical("ssd", Inputs(x, delta, A, B, C, D, z, delta_bias, segment_ids, initial_state))
    _check_options("ssd", delta_limit, chunk_size)
    options = {"delta_softplus": delta_softplus, "delta_limit": delta_limit, "chunk_size": chunk_size}
    y, final_state = _run(inputs, implementation, **options)
    return (y, final_state) if return_final_state else y


def ssd_step(
    state: Float[Array, "batch heads head_dim state"],
    x: Float[Array, "batch heads head_dim"],
    delta: Float[Array, "batch heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch groups state"],
    C: Float[Array, "batch groups state"],
    D: Float[Array, "heads *head_dim"] | None = None,
    z: Float[Array, "batch heads head_dim"] | None = None,
    *,
    delta_bias: Float[Array, " heads"] | None = None,
    delta_softplus: bool = False,
    delta_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Float[Array, "batch heads head_dim"], Float[Array, "batch heads head_dim state"]]:
    """Runs ``ssd`` for one token: its arguments without the length.

    Args:
        state: state before the token, float32.
        x: input.
        delta: step sizes, before the bias, the softplus and the limits.
        A: decay rates, one a head.
        B: input matrix of each group of heads.
        C: output matrix, of the same shape as ``B``.
        D: skip connection, one a head or one a channel; None for none.
        z: gate; None for none.
        delta_bias: added to ``delta``.
        delta_softplus: whether the step sizes go through a softplus.
        delta_limit: least and largest step size, applied last.

    Returns:
        y in ``x``'s dtype, and the state after the token.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the limits make no sense.
    """
    x, delta, B, C, z = one_token(x, delta, B, C, z)
    inputs = _canonical("ssd_step", Inputs(x, delta, A, B, C, D, z, delta_bias, None, state))
    _check_options("ssd_step", delta_limit, None)
    options = {"delta_softplus": delta_softplus, "delta_limit": delta_limit, "chunk_size": None}
    y, state = _run(inputs, "reference", **options)
    return y[:, 0], state


def _run(inputs: Inputs, implementation: str | None, **options: Any) -> _Outputs:
    def along_length(compute: Callable[[Inputs], _Outputs], inputs: Inputs, axis: Axis) -> _Outputs:
        delta = inputs.step_sizes(delta_softplus=options["delta_softplus"], delta_limit=options["delta_limit"])
        decay = jnp.exp(jnp.sum(delta, axis=1) * inputs.A.astype(delta.dtype))[..., None, None]
        return sequence_parallel.scan(compute, inputs, decay, axis)

    inputs, input_dims = shard_groups(inputs, _INPUT_DIMS, "heads")
    return dispatch("ssd", implementation, inputs, input_dims, (_TOKEN, _STATE), along_length, **options)


def _canonical(operator: str, inputs: Inputs) -> Inputs:
    """Checks all arrays, gives D its channels, casts the state."""
    check, x, D, initial_state = Checker(operator), inputs.x, inputs.D, inputs.initial_state
    one_a_head = D is not None and D.ndim == 1
    check.arrays(inputs._asdict(), _INPUT_DIMS | ({"D": ("heads",)} if one_a_head else {}))
    check.multiple("heads", "groups")
    if D is not None:
        D = jnp.broadcast_to(D[:, None] if one_a_head else D, x.shape[2:])
    if initial_state is not None:
        initial_state = initial_state.astype(inputs.real_dtype)
    return inputs._replace(D=D, initial_state=initial_state)


def _check_options(operator: str, delta_limit: tuple[float, float], chunk_size: int | None) -> None:
    check = Checker(operator)
    least, largest = delta_limit
    if not 0 <= least <= largest:
        raise check.error(f"delta_limit must be (least, largest) with 0 <= least <= largest, got {delta_limit}")
    check.optional_size("chunk_size", chunk_size)
