"""The rotating half of the state: angles that add up over the tokens, and B and C turned by them.

Lahoti et al., "Mamba-3", 2026 (arXiv:2603.15569): a state whose components rotate in pairs is a complex one, and turning
B and C by the angle so far, a rotary embedding with angles from the data, is the same as turning the state.

Angles are in half-turns (multiples of pi). They matter modulo 2, so they are added up as fixed-point numbers that
overflow on purpose: the sum over any number of tokens is as precise as its terms, and the same however it is grouped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rotate(matrix: Float[Array, "*batch state"], angle: Float[Array, "*#batch pairs"]) -> Float[Array, "*batch state"]:
    """Turns pairs of components by angles in half-turns: n with n + state // 2, for each n below ``pairs``."""
    pairs, half = angle.shape[-1], matrix.shape[-1] // 2
    cos, sin = jnp.cos(jnp.pi * angle), jnp.sin(jnp.pi * angle)
    first, second = matrix[..., :pairs], matrix[..., half : half + pairs]
    parts = (
        cos * first - sin * second,
        matrix[..., pairs:half],
        sin * first + cos * second,
        matrix[..., half + pairs :],
    )
    return jnp.concatenate(parts, axis=-1)


@jax.custom_jvp
def angles(
    start: Float[Array, "batch heads pairs"],
    increments: Float[Array, "batch length heads pairs"],
    starts: Bool[Array, "batch length"] | None,
) -> Float[Array, "batch length heads pairs"]:
    """Returns the angle at each token, from -1 to 1: the sum of the increments of its segment up to and with its own.

    Args:
        start: angle before the first token.
        increments: angle that each token adds.
        starts: marks the first token of each segment, except the first token of all where it continues ``start``.
    """
    first, terms = _to_fixed_point(start)[:, None], _to_fixed_point(increments)
    total = jnp.cumsum(terms, axis=1, dtype=terms.dtype)
    if starts is None:
        return _from_fixed_point(first + total, start.dtype)
    latest = jax.lax.cummax(jnp.where(starts, jnp.arange(starts.shape[1]), -1), axis=1)[..., None, None]
    before = jnp.take_along_axis(total - terms, jnp.maximum(latest, 0), axis=1)
    return _from_fixed_point(total + jnp.where(latest < 0, first, -before), start.dtype)


@angles.defjvp
def _angles_jvp(primals, tangents):
    starts = primals[2]
    start, increments, _ = tangents
    if starts is None:
        return angles(*primals), start[:, None] + jnp.cumsum(increments, axis=1)
    segment = jnp.cumsum(starts, axis=1)
    same = jnp.tril(segment[:, :, None] == segment[:, None, :]).astype(start.dtype)
    tangent = jnp.einsum("bts,bs...->bt...", same, increments, precision=jax.lax.Precision.HIGHEST)
    return angles(*primals), tangent + jnp.where((segment == 0)[..., None, None], start[:, None], 0)


@jax.custom_jvp
def angle_sum(
    increments: Float[Array, "batch length heads pairs"], counts: Bool[Array, "batch length"]
) -> Float[Array, "batch heads pairs"]:
    """Returns the sum of the increments of those tokens that count, from -1 to 1."""
    terms = jnp.where(counts[..., None, None], _to_fixed_point(increments), 0)
    return _from_fixed_point(jnp.sum(terms, axis=1, dtype=terms.dtype), increments.dtype)


@angle_sum.defjvp
def _angle_sum_jvp(primals, tangents):
    return angle_sum(*primals), jnp.sum(jnp.where(primals[1][..., None, None], tangents[0], 0), axis=1)


def wrap(angle: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Returns the same angle between -1 and 1 half-turns."""
    return angle - 2 * jnp.round(angle / 2)


def _to_fixed_point(angle: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
    """Half-turns as integers of the same width, of which a full turn takes the whole range."""
    bits = jnp.finfo(angle.dtype).bits
    scaled = jnp.round(wrap(angle) * 2.0 ** (bits - 1))
    largest = jnp.nextafter(jnp.asarray(2.0 ** (bits - 1), angle.dtype), 0)
    return jnp.minimum(scaled, largest).astype(f"int{bits}")


def _from_fixed_point(angle: Int[Array, "*batch"], dtype: jnp.dtype) -> Float[Array, "*batch"]:
    return angle.astype(dtype) * 2.0 ** (1 - jnp.finfo(dtype).bits)
