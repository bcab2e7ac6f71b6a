"""The rotation of the state: angles that add up over tokens, and arrays turned by them.

Lahoti et al., "Mamba-3", 2026 (arXiv:2603.15569): a state whose components rotate in pairs is a complex one, and
turning B and C by the angle so far, a rotary embedding with angles from the data, is the same as turning the state.

Angles are in half-turns (multiples of pi). They matter modulo 2, so they are added up as fixed-point numbers that
overflow on purpose: a sum of any number of angles is as precise as its terms.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Turn(NamedTuple):
    """A rotation of pairs of components, one angle a pair. Gradients flow through the angle alone."""

    angle: Float[Array, "*batch pairs"]
    cos: Float[Array, "*batch pairs"]
    sin: Float[Array, "*batch pairs"]


def turn_by(angle: Float[Array, "*batch pairs"]) -> Turn:
    """Returns the rotation by an angle in half-turns."""
    fixed = jnp.pi * jax.lax.stop_gradient(angle)
    # Without the barrier the compiler would compute them anew for each half of each array that they turn.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(fixed), jnp.sin(fixed)))
    return Turn(angle, cos, sin)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rotate(
    array: Float[Array, "*batch state"], turn: Turn, rounded_to: jnp.dtype | None = None
) -> Float[Array, "*batch state"]:
    """Turns pairs of components: n with n + state // 2, for each n below ``pairs``.

    Args:
        array: what to turn.
        turn: by what; its arrays are broadcast against ``array``'s but for the last dimension.
        rounded_to: dtype that the result is rounded to, in ``array``'s dtype; None for no rounding.
    """
    first, still, second, rest = _split(array, turn.angle.shape[-1])
    turned = jnp.concatenate(
        [turn.cos * first - turn.sin * second, still, turn.sin * first + turn.cos * second, rest], axis=-1
    )
    return turned if rounded_to is None else turned.astype(rounded_to).astype(array.dtype)


@rotate.defjvp
def _rotate_jvp(rounded_to, primals, tangents):
    # The slope in the angle is that of the rounded result. Two arrays that are turned together do not change their
    # product, so what they contribute to the gradient of the angle cancels: but only if it comes from the same numbers.
    turned = rotate(*primals, rounded_to)
    angle = jnp.pi * tangents[1].angle
    first, still, second, rest = _split(turned, angle.shape[-1])
    swing = [-angle * second, jnp.zeros_like(still), angle * first, jnp.zeros_like(rest)]
    return turned, rotate(tangents[0], primals[1]) + jnp.concatenate(swing, axis=-1)


def _split(array: jax.Array, pairs: int) -> tuple[jax.Array, ...]:
    """First components of the pairs, those behind them, second components of the pairs, those behind them."""
    half = array.shape[-1] // 2
    return array[..., :pairs], array[..., pairs:half], array[..., half : half + pairs], array[..., half + pairs :]


@jax.custom_jvp
def cumulative_angle(increments: Float[Array, "batch length *dims"]) -> Float[Array, "batch length *dims"]:
    """Returns the sum of the angles up to each token and with it, from -1 to 1."""
    terms = _to_fixed_point(increments)
    return _from_fixed_point(jnp.cumsum(terms, axis=1, dtype=terms.dtype), increments.dtype)


@cumulative_angle.defjvp
def _cumulative_angle_jvp(primals, tangents):
    return cumulative_angle(*primals), jnp.cumsum(tangents[0], axis=1)


@jax.custom_jvp
def total_angle(increments: Float[Array, "batch length *dims"]) -> Float[Array, "batch *dims"]:
    """Returns the sum of the angles of all tokens, from -1 to 1."""
    terms = _to_fixed_point(increments)
    return _from_fixed_point(jnp.sum(terms, axis=1, dtype=terms.dtype), increments.dtype)


@total_angle.defjvp
def _total_angle_jvp(primals, tangents):
    return total_angle(*primals), jnp.sum(tangents[0], axis=1)


def _to_fixed_point(angle: Float[Array, "*dims"]) -> Int[Array, "*dims"]:
    """Angles as integers of the same width, of which a full turn takes the whole range."""
    bits = jnp.finfo(angle.dtype).bits
    scaled = jnp.round((angle - 2 * jnp.round(angle / 2)) * 2.0 ** (bits - 1))
    largest = jnp.nextafter(jnp.asarray(2.0 ** (bits - 1), angle.dtype), 0)
    return jnp.minimum(scaled, largest).astype(f"int{bits}")


def _from_fixed_point(angle: Int[Array, "*dims"], dtype: jnp.dtype) -> Float[Array, "*dims"]:
    return angle.astype(dtype) * 2.0 ** (1 - jnp.finfo(dtype).bits)
