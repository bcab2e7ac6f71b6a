"""The operator's linear map from inputs to outputs, in the one form that hidden attention is read off from.

One input a token, as in ``weights.py``, and no rotation: B and C are turned by the angle so far instead. docs/mamba3.md
derives both.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.trapezoidal_ssd import ranks, weights
from pallas_kernels.trapezoidal_ssd.inputs import Inputs
from pallas_kernels.trapezoidal_ssd.rotation import cumulative_angle, rotate, turn_by


class Recurrence(NamedTuple):
    """What outputs are of inputs, for each head, before skip connection, norm and gate::

        y[i, r] = sum over j <= i and s of C[i, r] . B[j, s] exp(sum of log_decay[j+1 .. i]) w[j] x[j, s]

    with ``own_weight`` for w where j = i, and ``weight`` elsewhere.
    """

    x: Float[Array, "batch length heads rank head_dim"]
    log_decay: Float[Array, "batch length heads"]
    weight: Float[Array, "batch length heads"]
    own_weight: Float[Array, "batch length heads"]
    B: Float[Array, "batch length heads rank state"]
    C: Float[Array, "batch length heads rank state"]


def recurrence(inputs: Inputs, *, delta_softplus: bool) -> Recurrence:
    """Returns what these tokens make of these tokens; the state before them and their segments have no part in it."""
    delta = inputs.step_sizes(delta_softplus=delta_softplus)
    angle = cumulative_angle(delta[..., None] * inputs.theta.astype(delta.dtype)[:, :, None])
    turn = turn_by(angle[..., None, :])
    return Recurrence(
        x=ranks.input_per_rank(inputs.x, inputs),
        **weights.weights(inputs, delta)._asdict(),
        B=rotate(ranks.matrix_per_head(inputs.B, inputs.B_bias, inputs), turn),
        C=rotate(ranks.matrix_per_head(inputs.C, inputs.C_bias, inputs), turn),
    )
