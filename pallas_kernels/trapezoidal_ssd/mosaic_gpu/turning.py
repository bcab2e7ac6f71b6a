"""The rotation around the kernels: B and C turned by the angle since the start, so that the state stands still.

In the kernels' view the state after token t is turned by the sum of all angles up to t, which changes no output. Their
gradients do not come of that view: a sum over all later tokens of terms that nearly cancel drowns in rounding. The
gradient of an angle is made of what passes through its token instead: from the tokens of its chunk, and, for all later
chunks at once, from the state after its chunk.

Pairs are n and n + half of the operator's state. Each half of it is padded to a multiple of 32, and where that makes a
state of several parts, each gets as many of either half.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int16

from pallas_kernels.ssd.mosaic_gpu.blocks import STATE_UNIT
from pallas_kernels.ssd.mosaic_gpu.turning import FULL_TURN, part_width
from pallas_kernels.trapezoidal_ssd.rotation import rotate, turn_by

_HALF_UNIT = STATE_UNIT // 2


def padded_state(state: int) -> int:
    """Size of the kernels' state."""
    half = state - state // 2
    return 2 * (-(-half // _HALF_UNIT) * _HALF_UNIT)


def in_parts(array: Float[Array, "*dims state"]) -> Float[Array, "*dims padded_state"]:
    """Gives an array the kernels' state."""
    state, wanted = array.shape[-1], padded_state(array.shape[-1])
    half = wanted // 2
    if state < wanted:
        halves = array[..., : state // 2], array[..., state // 2 :]
        widths = [(0, 0)] * (array.ndim - 1)
        array = jnp.concatenate([jnp.pad(some, [*widths, (0, half - some.shape[-1])]) for some in halves], axis=-1)
    return _exchanged(array, 2, wanted // part_width(wanted))


def as_given(array: Float[Array, "*dims padded_state"], state: int) -> Float[Array, "*dims state"]:
    """Undoes ``in_parts``."""
    padded = array.shape[-1]
    array = _exchanged(array, padded // part_width(padded), 2)
    if padded == state:
        return array
    second = padded // 2
    return jnp.concatenate([array[..., : state // 2], array[..., second : second + state - state // 2]], axis=-1)


def _exchanged(array: jax.Array, outer: int, inner: int) -> jax.Array:
    """A state of ``outer`` times ``inner`` pieces as one of ``inner`` times ``outer``: piece (i, j) becomes (j, i)."""
    if 1 in (outer, inner):
        return array
    pieces = array.reshape(*array.shape[:-1], outer, inner, -1)
    return jnp.swapaxes(pieces, -3, -2).reshape(array.shape)


def turn_states(
    states: Float[Array, "batch heads head_dim state"], angles: Int16[Array, "batch heads pairs"], *, back: bool = False
) -> Float[Array, "batch heads head_dim state"]:
    """Turns states, or their gradients, from the operator's view into the kernels', or back."""
    angle = angles[:, :, None].astype(jnp.float32) * (2 / FULL_TURN)
    return rotate(states, turn_by(-angle if back else angle))


def angles_at_end(angles: Int16[Array, "batch padded_heads chunks rows pairs"], last: int) -> Int16[Array, "..."]:
    """The angles of row number ``last`` of the sequence."""
    return angles[:, :, last // angles.shape[3], last % angles.shape[3]]
