"""Trapezoidal SSD of a sequence whose length is spread over devices.

B and x of the token before a device's first come from its neighbour. The rest of the state is passed on as for ``ssd``:
a first pass finds what each device leaves behind, and how much of a state decays and turns on its way through it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels.sequence_parallel import state_before
from pallas_kernels.sharding import Axis, continues_previous, from_last, from_previous
from pallas_kernels.trapezoidal_ssd import ranks
from pallas_kernels.trapezoidal_ssd.inputs import Inputs, State
from pallas_kernels.trapezoidal_ssd.rotation import total_angle


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
    start = inputs.initial_state()
    inputs = _with_token_before(inputs, start, axis)
    own = _complex(run(inputs._replace(D=None, z=None, norm_weight=None, initial_ssm=jnp.zeros_like(start.ssm)))[1])
    delta = inputs.step_sizes(delta_softplus=delta_softplus)
    log_decay = jnp.sum(delta * inputs.A.astype(delta.dtype), axis=1)[..., None]
    angle = total_angle(delta[..., None] * inputs.theta.astype(delta.dtype)[:, :, None])
    angle = jnp.pad(angle, ((0, 0), (0, 0), (0, own.shape[-1] - angle.shape[-1])))
    decay = jnp.exp(log_decay - 1j * jnp.pi * angle)[:, :, None]
    before = state_before(own, decay, axis, start=_complex(start.ssm), segment_ids=inputs.segment_ids)
    y, *state = run(inputs._replace(initial_ssm=_real(before, start.ssm.shape[-1])))
    return y, *(from_last(part, axis) for part in state)


def _with_token_before(inputs: Inputs, start: State, axis: Axis) -> Inputs:
    """Puts B and x of the token before this device's first one into the initial state, given that of the sequence."""
    first = jax.lax.axis_index(axis) == 0

    def neighbour(own: jax.Array, initial: jax.Array) -> jax.Array:
        before = from_previous(own, axis)
        if inputs.segment_ids is not None:
            continues = continues_previous(inputs.segment_ids, axis)
            before = jnp.where(continues.reshape(-1, *(1,) * (own.ndim - 1)), before, 0)
        return jnp.where(first, initial, before)

    last_B = ranks.matrix_per_head(inputs.B[:, -1], inputs.B_bias, inputs)
    last_x = inputs.x[:, -1].astype(inputs.real_dtype)
    return inputs._replace(initial_B=neighbour(last_B, start.B), initial_x=neighbour(last_x, start.x))


def _complex(state: Float[Array, "*batch state"]) -> Complex[Array, "*batch half"]:
    """Components n and n + state // 2 as one complex number; the one left over by an odd state as a real."""
    half = state.shape[-1] // 2
    imaginary = jnp.pad(state[..., half : 2 * half], [(0, 0)] * (state.ndim - 1) + [(0, state.shape[-1] % 2)])
    real = jnp.concatenate([state[..., :half], state[..., 2 * half :]], axis=-1)
    return jax.lax.complex(real, imaginary)


def _real(state: Complex[Array, "*batch half"], size: int) -> Float[Array, "*batch state"]:
    """Undoes ``_complex`` for a state of this size."""
    half = size // 2
    return jnp.concatenate([state.real[..., :half], state.imag[..., :half], state.real[..., half:]], axis=-1)
