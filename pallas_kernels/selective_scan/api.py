"""Signature of the selective scan: what it accepts, and which implementation gets it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact, Int

from pallas_kernels import implementation as implementations
from pallas_kernels import sequence_parallel, sharding
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.validation import INTEGER, REAL_OR_COMPLEX, Checker

_TOKEN = ("batch", "length", "channels")
_STATE = ("batch", "channels", "state")
_OUTPUT_DIMS = (_TOKEN, _STATE)


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
    inputs = _canonical("selective_scan", x, delta, A, B, C, D, z, delta_bias, segment_ids, initial_state)
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
    x, delta, B, C = (array[:, None] for array in (x, delta, B, C))
    z = None if z is None else z[:, None]
    inputs = _canonical("selective_scan_step", x, delta, A, B, C, D, z, delta_bias, None, state)
    y, state = _run(inputs, delta_softplus, "reference")
    return y[:, 0], state


def _run(inputs: Inputs, delta_softplus: bool, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    def scan(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        run = implementations.choose("selective_scan", implementation, inputs, delta_softplus=delta_softplus)
        return run(inputs, delta_softplus=delta_softplus)

    def scan_shard(inputs: Inputs, sequence_axis: sharding.Axis | None) -> tuple[jax.Array, jax.Array]:
        if sequence_axis is None:
            return scan(inputs)
        decay = _decay(inputs, delta_softplus=delta_softplus)
        return sequence_parallel.scan(scan, inputs, decay, sequence_axis)

    shards = sharding.shard_count(inputs.x, 2)
    inputs = inputs._replace(
        B=sharding.groups_per_shard(inputs.B, shards), C=sharding.groups_per_shard(inputs.C, shards)
    )
    return sharding.map_shards(scan_shard, inputs, _input_dims(inputs), _OUTPUT_DIMS)


def _decay(inputs: Inputs, *, delta_softplus: bool) -> jax.Array:
    """Returns what a state is multiplied by on its way through all tokens, (batch, channels, state)."""
    delta = inputs.delta.astype(inputs.real_dtype)
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias
    if delta_softplus:
        delta = jax.nn.softplus(delta)
    return jnp.exp(jnp.sum(delta, axis=1)[..., None] * inputs.A.astype(inputs.state_dtype))


def _input_dims(inputs: Inputs) -> dict[str, sharding.Dims]:
    # A single group serves all channels, several are sharded along with theirs.
    matrix = ("batch", "length", "groups" if inputs.B.shape[2] == 1 else "channels", "state")
    return {
        "x": _TOKEN,
        "delta": _TOKEN,
        "A": ("channels", "state"),
        "B": matrix,
        "C": matrix,
        "D": ("channels",),
        "z": _TOKEN,
        "delta_bias": ("channels",),
        "segment_ids": ("batch", "length"),
        "initial_state": _STATE,
    }


def _canonical(operator, x, delta, A, B, C, D, z, delta_bias, segment_ids, initial_state) -> Inputs:
    """Checks all arguments, gives B and C their groups, casts the state."""
    check = Checker(operator)
    check("x", x, ("batch", "length", "channels"))
    check("delta", delta, ("batch", "length", "channels"))
    check("A", A, ("channels", "state"), REAL_OR_COMPLEX)
    for name, array in (("B", B), ("C", C)):
        dims = ("batch", "length", "state") if array.ndim == 3 else ("batch", "length", "groups", "state")
        check(name, array, dims, REAL_OR_COMPLEX)
        if jnp.iscomplexobj(array) and not jnp.iscomplexobj(A):
            raise check.error(f"{name} is {array.dtype} but A is {A.dtype}; only a complex A can have a complex {name}")
    if B.ndim != C.ndim:
        raise check.error(f"B and C must have the same shape, got {B.shape} and {C.shape}")
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    if x.shape[2] % B.shape[2]:
        raise check.error(f"channels must be a multiple of groups, got {x.shape[2]} channels and {B.shape[2]} groups")
    if D is not None:
        check("D", D, ("channels",))
    if z is not None:
        check("z", z, ("batch", "length", "channels"))
    if delta_bias is not None:
        check("delta_bias", delta_bias, ("channels",))
    if segment_ids is not None:
        check("segment_ids", segment_ids, ("batch", "length"), INTEGER)
    if initial_state is not None:
        check("initial_state", initial_state, ("batch", "channels", "state"), REAL_OR_COMPLEX)
        if jnp.iscomplexobj(initial_state) and not jnp.iscomplexobj(A):
            raise check.error(f"initial_state is {initial_state.dtype} but A is {A.dtype}; give its real part")
    inputs = Inputs(x, delta, A, B, C, D, z, delta_bias, segment_ids, initial_state)
    if initial_state is None:
        return inputs
    return inputs._replace(initial_state=initial_state.astype(inputs.state_dtype))
