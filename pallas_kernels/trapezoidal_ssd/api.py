"""Signature of the trapezoidal SSD operator: what it accepts, and which implementation gets it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch, one_token
from pallas_kernels.sharding import shard_groups
from pallas_kernels.trapezoidal_ssd import sequence_parallel
from pallas_kernels.trapezoidal_ssd.inputs import Inputs, State
from pallas_kernels.trapezoidal_ssd.recurrence import Recurrence, recurrence
from pallas_kernels.validation import Checker

_TOKEN = ("batch", "length", "heads", "head_dim")
_PER_HEAD = ("batch", "length", "heads")
_MATRIX = ("batch", "length", "groups", "rank", "state")
_PARAMETERS = {
    "D": ("heads", "head_dim"),
    "delta_bias": ("heads",),
    "B_bias": ("heads", "rank", "state"),
    "C_bias": ("heads", "rank", "state"),
    "mimo_x": ("heads", "rank", "head_dim"),
    "mimo_z": ("heads", "rank", "head_dim"),
    "mimo_o": ("heads", "rank", "head_dim"),
    "norm_weight": ("heads", "head_dim"),
}
_STATE = {
    "ssm": ("batch", "heads", "head_dim", "state"),
    "B": ("batch", "heads", "rank", "state"),
    "x": ("batch", "heads", "head_dim"),
}
_INPUT_DIMS = {
    "x": _TOKEN,
    "delta": _PER_HEAD,
    "A": _PER_HEAD,
    "B": _MATRIX,
    "C": _MATRIX,
    "lambda_": _PER_HEAD,
    "theta": ("batch", "length", "pairs"),
    "z": _TOKEN,
    "segment_ids": ("batch", "length"),
    **_PARAMETERS,
    **{f"initial_{name}": dims for name, dims in _STATE.items()},
}


def trapezoidal_ssd(
    x: Float[Array, "batch length heads head_dim"],
    delta: Float[Array, "batch length heads"],
    A: Float[Array, "batch length heads"],
    B: Float[Array, "batch length groups rank state"],
    C: Float[Array, "batch length groups rank state"],
    lambda_: Float[Array, "batch length heads"],
    theta: Float[Array, "batch length pairs"],
    D: Float[Array, "heads *head_dim"] | None = None,
    z: Float[Array, "batch length heads head_dim"] | None = None,
    *,
    delta_bias: Float[Array, " heads"] | None = None,
    delta_softplus: bool = False,
    B_bias: Float[Array, "heads rank state"] | None = None,
    C_bias: Float[Array, "heads rank state"] | None = None,
    mimo_x: Float[Array, "heads rank head_dim"] | None = None,
    mimo_z: Float[Array, "heads rank head_dim"] | None = None,
    mimo_o: Float[Array, "heads rank head_dim"] | None = None,
    norm_weight: Float[Array, "heads head_dim"] | None = None,
    norm_epsilon: float = 1e-5,
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch length heads head_dim"] | tuple[Float[Array, "batch length heads head_dim"], State]:
    """Runs a state-space model whose state decays by one scalar a head and token, rotates, and sees two inputs at once.

    With ``delta' = softplus(delta + delta_bias)`` (without the softplus unless ``delta_softplus``), for each head::

        x'[t, r] = mimo_x[r] x[t],  B'[t, r] = B[t, r] + B_bias[r],  C'[t, r] = C[t, r] + C_bias[r]
        alpha = exp(delta'[t] (A[t] - i pi theta[t]))
        beta = (1 - lambda[t]) delta'[t] alpha,  gamma = lambda[t] delta'[t]
        h[t] = alpha h[t-1] + beta sum_r x'[t-1, r] B'[t-1, r]^T + gamma sum_r x'[t, r] B'[t, r]^T
        y[t, r] = norm(h[t] C'[t, r] + D x'[t, r]) silu(mimo_z[r] z[t])
        y[t] = sum_r mimo_o[r] y[t, r]

    The imaginary part turns component n of the state together with component n + state // 2, for n below ``pairs``;
    the other components do not rotate. This is the layer of Lahoti et al., "Mamba-3: Improved Sequence Modeling using
    State Space Principles" (2026, arXiv:2603.15569): the exponential-trapezoidal rule, a complex state, and with a rank
    above 1 several inputs and outputs (MIMO). With lambda 1, theta 0 and rank 1 it is ``ssd``.

    State and sums are float32 whatever the inputs' dtypes (float64 for float64 ``x``); where ``x``, ``B`` and ``C`` are
    bfloat16, so are the operands of matrix products, except in "reference".

    Differentiable in every floating-point array, the initial and the final state included; reverse mode only. Peak
    memory grows with one state a chunk, never with one a token, except in "reference".

    Args:
        x: input.
        delta: step sizes, before bias and softplus.
        A: decay rates of each token. They should be negative.
        B: input matrices of each group of heads, one a rank: head h uses group h // (heads // groups).
        C: output matrices, of the same shape as ``B``.
        lambda_: how much of a step sees the token at its end, from 0 to 1; the rest sees the token at its start.
        theta: rotation of each pair of components, in half-turns for a step of size 1. "mosaic_gpu" takes less than
            256 a token, beyond which a float32 does not know the angle.
        D: skip connection, one a head or one a channel, (heads, head_dim); None for none.
        z: gate; None for none.
        delta_bias: added to ``delta``.
        delta_softplus: whether the step sizes go through a softplus.
        B_bias: added to ``B`` for each head; None for none.
        C_bias: added to ``C`` for each head; None for none.
        mimo_x: weight of the input for each rank; None for ones.
        mimo_z: weight of the gate for each rank; None for ones.
        mimo_o: weight of the output of each rank; None for ones.
        norm_weight: weight of an RMSNorm over each head's and rank's channels; None for no norm.
        norm_epsilon: added to the norm's mean square.
        segment_ids: number of the document each token belongs to; the state is zero at each change.
        initial_state: state before the first token, zero by default. The first token continues it, whatever its
            segment id.
        return_final_state: whether to return the state after the last token.
        chunk_size: tokens that are computed together, any number from 1; None takes what suits the implementation. It
            changes time and memory, and the results by rounding only.
        implementation: "mosaic_gpu", "xla" or "reference"; None takes the best that supports the call.

    Returns:
        y in ``x``'s dtype; with ``return_final_state`` also the state after the last token, in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, or epsilon or chunk size make no sense.
        UnsupportedError: the named implementation cannot run this call.
    """
    parameters = (D, delta_bias, B_bias, C_bias, mimo_x, mimo_z, mimo_o, norm_weight)
    inputs = _canonical("trapezoidal_ssd", x, delta, A, B, C, lambda_, theta, z, parameters, segment_ids, initial_state)
    _check_options("trapezoidal_ssd", norm_epsilon, chunk_size)
    options = {"delta_softplus": delta_softplus, "norm_epsilon": norm_epsilon, "chunk_size": chunk_size}
    y, state = _run(inputs, implementation, **options)
    return (y, state) if return_final_state else y


def trapezoidal_ssd_step(
    state: State,
    x: Float[Array, "batch heads head_dim"],
    delta: Float[Array, "batch heads"],
    A: Float[Array, "batch heads"],
    B: Float[Array, "batch groups rank state"],
    C: Float[Array, "batch groups rank state"],
    lambda_: Float[Array, "batch heads"],
    theta: Float[Array, "batch pairs"],
    D: Float[Array, "heads *head_dim"] | None = None,
    z: Float[Array, "batch heads head_dim"] | None = None,
    *,
    delta_bias: Float[Array, " heads"] | None = None,
    delta_softplus: bool = False,
    B_bias: Float[Array, "heads rank state"] | None = None,
    C_bias: Float[Array, "heads rank state"] | None = None,
    mimo_x: Float[Array, "heads rank head_dim"] | None = None,
    mimo_z: Float[Array, "heads rank head_dim"] | None = None,
    mimo_o: Float[Array, "heads rank head_dim"] | None = None,
    norm_weight: Float[Array, "heads head_dim"] | None = None,
    norm_epsilon: float = 1e-5,
) -> tuple[Float[Array, "batch heads head_dim"], State]:
    """Runs ``trapezoidal_ssd`` for one token: its arguments without the length, after the state before the token.

    Returns:
        y in ``x``'s dtype, and the state after the token.

    Raises:
        ValueError: shapes or dtypes do not fit together, or epsilon makes no sense.
    """
    x, delta, A, B, C, lambda_, theta, z = one_token(x, delta, A, B, C, lambda_, theta, z)
    parameters = (D, delta_bias, B_bias, C_bias, mimo_x, mimo_z, mimo_o, norm_weight)
    inputs = _canonical("trapezoidal_ssd_step", x, delta, A, B, C, lambda_, theta, z, parameters, None, state)
    _check_options("trapezoidal_ssd_step", norm_epsilon, None)
    options = {"delta_softplus": delta_softplus, "norm_epsilon": norm_epsilon, "chunk_size": None}
    y, state = _run(inputs, "reference", **options)
    return y[:, 0], state


def trapezoidal_ssd_recurrence(
    x: Float[Array, "batch length heads head_dim"],
    delta: Float[Array, "batch length heads"],
    A: Float[Array, "batch length heads"],
    B: Float[Array, "batch length groups rank state"],
    C: Float[Array, "batch length groups rank state"],
    lambda_: Float[Array, "batch length heads"],
    theta: Float[Array, "batch length pairs"],
    *,
    delta_bias: Float[Array, " heads"] | None = None,
    delta_softplus: bool = False,
    B_bias: Float[Array, "heads rank state"] | None = None,
    C_bias: Float[Array, "heads rank state"] | None = None,
    mimo_x: Float[Array, "heads rank head_dim"] | None = None,
) -> Recurrence:
    """What ``trapezoidal_ssd`` does to its inputs, up to skip connection, norm and gate, as weights; for inspection.

    It takes arguments of ``trapezoidal_ssd``, and memory for B and C of every head and token. On a mesh nothing but the
    batch may be sharded.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    parameters = (None, delta_bias, B_bias, C_bias, mimo_x, None, None, None)
    operator = "trapezoidal_ssd_recurrence"
    inputs = _canonical(operator, x, delta, A, B, C, lambda_, theta, None, parameters, None, None)
    return recurrence(inputs, delta_softplus=delta_softplus)


def _run(inputs: Inputs, implementation: str | None, **options: Any) -> tuple[jax.Array, State]:
    along_length = functools.partial(sequence_parallel.scan, delta_softplus=options["delta_softplus"])
    inputs, input_dims = shard_groups(inputs, _INPUT_DIMS, "heads")
    y, *state = dispatch(
        "trapezoidal_ssd", implementation, inputs, input_dims, (_TOKEN, *_STATE.values()), along_length, **options
    )
    return y, State(*state)


def _canonical(operator, x, delta, A, B, C, lambda_, theta, z, parameters, segment_ids, initial_state) -> Inputs:
    """Checks all arrays, gives D its channels, casts parameters and state, makes the state where there is none."""
    check = Checker(operator)
    check.arrays({"x": x, "delta": delta, "A": A, "B": B, "C": C, "lambda_": lambda_, "theta": theta}, _INPUT_DIMS)
    check.multiple("heads", "groups")
    most_pairs = B.shape[4] // 2
    if theta.shape[2] > most_pairs:
        raise check.error(
            f"theta must be of at most {most_pairs} pairs for a state of {B.shape[4]}, got {theta.shape[2]}"
        )
    check.arrays({"z": z, "segment_ids": segment_ids}, _INPUT_DIMS)
    cast_parameters = {
        name: _parameter(check, name, array, x) for name, array in zip(_PARAMETERS, parameters, strict=True)
    }
    state: dict[str, jax.Array | None] = dict.fromkeys(f"initial_{name}" for name in _STATE)
    if initial_state is not None:
        for name, dims in _STATE.items():
            part = getattr(initial_state, name)
            check(f"initial_state.{name}", part, dims)
            state[f"initial_{name}"] = part.astype(_real_dtype(x))
    return Inputs(x, delta, A, B, C, lambda_, theta, z, **cast_parameters, segment_ids=segment_ids, **state)


def _parameter(check: Checker, name: str, array: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Checks and casts a parameter: before it is used at every token, since its gradient is a sum over all of them."""
    if array is None:
        return None
    one_a_head = name == "D" and array.ndim == 1
    check(name, array, ("heads",) if one_a_head else _PARAMETERS[name])
    array = array.astype(_real_dtype(x))
    return jnp.broadcast_to(array[:, None], x.shape[2:]) if one_a_head else array


def _real_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check_options(operator: str, norm_epsilon: float, chunk_size: int | None) -> None:
    check = Checker(operator)
    if norm_epsilon <= 0:
        raise check.error(f"norm_epsilon must be above 0, got {norm_epsilon}")
    check.optional_size("chunk_size", chunk_size)
