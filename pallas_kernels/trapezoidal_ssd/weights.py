"""The recurrence as one with a single input a token, the form that all but the reference compute; docs/mamba3.md.

What the next token will add for this one, (1 - lambda) delta of the next times the input of this, can as well be added
at once: the next token then finds it in the state and lets it decay. So the recurrence is that of ``ssd`` with the
weight lambda[t] delta[t] + (1 - lambda[t+1]) delta[t+1] in place of delta[t], except that a token's own output must not
see what is added for the next: there the weight is lambda[t] delta[t].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.trapezoidal_ssd import ranks
from pallas_kernels.trapezoidal_ssd.inputs import Inputs


class Weights(NamedTuple):
    """What each head's recurrence is made of besides x, B and C."""

    log_decay: Float[Array, "batch length heads"]
    weight: Float[Array, "batch length heads"]
    """What each token's input enters the state with."""
    own_weight: Float[Array, "batch length heads"]
    """What it enters the token's own output with."""


def weights(inputs: Inputs, delta: Float[Array, "batch length heads"]) -> Weights:
    """Returns the weights, given the step sizes after bias and softplus."""
    lambda_ = inputs.lambda_.astype(delta.dtype)
    for_previous = (1 - lambda_) * delta
    # Nothing comes after the last token, and what the last of a segment leaves for the next one is not seen there.
    for_next = jnp.pad(for_previous[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return Weights(delta * inputs.A.astype(delta.dtype), lambda_ * delta + for_next, lambda_ * delta)


def state_before(
    inputs: Inputs, delta: Float[Array, "batch length heads"]
) -> Float[Array, "batch heads head_dim state"]:
    """Returns the state before the first token, with what that one adds for the token before it."""
    before = inputs.initial_state()
    for_previous = (1 - inputs.lambda_[:, 0].astype(delta.dtype)) * delta[:, 0]
    x = ranks.input_per_rank(before.x, inputs) * for_previous[:, :, None, None]
    return before.ssm + jnp.einsum("bhrp,bhrn->bhpn", x, before.B, precision=jax.lax.Precision.HIGHEST)


def last_token(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns what the final state says about the last token: its B and x."""
    last_B = ranks.matrix_per_head(inputs.B[:, -1], inputs.B_bias, inputs)
    return last_B, inputs.x[:, -1].astype(inputs.real_dtype)
