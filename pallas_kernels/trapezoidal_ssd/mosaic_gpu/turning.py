"""The rotation around the kernels: B and C turned by the angle since the start, so that the state stands still.

In the kernels' view the state after token t is turned by the sum of all angles up to t, which changes no output. Their
gradients do not come of that view: a sum over all later tokens of terms that nearly cancel drowns in rounding. The
gradient of an angle is made of what passes through its token instead: from the tokens of its chunk, and, for all later
chunks at once, from the state after its chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batching import Arrays
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK
from pallas_kernels.trapezoidal_ssd.rotation import cumulative_angle, rotate, turn_by


def tokens_per_chunk(arrays: Arrays) -> int:
    """Tokens of a chunk of the kernels, given inputs with several rows a token."""
    return CHUNK * arrays["theta"].shape[1] // arrays["x"].shape[1]


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum in float32."""
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def angles(
    step_size: Float[Array, "batch length heads"], theta: Float[Array, "batch length pairs"], tokens: int
) -> Float[Array, "batch length heads pairs"]:
    """Returns the angle from the start of the sequence to each token and with it, in half-turns.

    Within chunks of ``tokens`` they are added up by a matrix product, the way that XLA has one kernel for; over the
    chunks as numbers that wrap.
    """
    batch, length, heads = step_size.shape
    increments = step_size[..., None] * theta[:, :, None]
    cut = _cut(increments - 2 * jnp.round(increments / 2), tokens)
    within = product("ts,bcshp->bcthp", jnp.tril(jnp.ones((tokens, tokens))), cut)
    ends = cumulative_angle(within[:, :, -1])
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    return (within + starts[:, :, None]).reshape(batch, -1, heads, theta.shape[2])[:, :length]


def turned(arrays: Arrays, angle: Float[Array, "batch length heads pairs"]) -> Arrays:
    """Returns "B" and "C" of every head, (batch, length · rows, heads, state): with bias, turned, rounded."""
    turn = turn_by(angle[:, :, None])
    results = {}
    for name in ("B", "C"):
        matrix, bias = arrays[name], arrays.get(f"{name}_bias")
        batch, length, groups, rows, state = matrix.shape
        by_head = jnp.repeat(jnp.swapaxes(matrix, 2, 3), angle.shape[2] // groups, axis=3).astype(jnp.float32)
        if bias is not None:
            by_head = by_head + jnp.swapaxes(bias, -3, -2)
        # In float32, for gradients that have not been rounded; the kernels' numbers nevertheless.
        results[name] = rotate(by_head, turn, matrix.dtype).reshape(batch, length * rows, -1, state)
    return results


def turn_states(
    states: Float[Array, "batch heads head_dim state"], angle: Float[Array, "batch heads pairs"]
) -> Float[Array, "batch heads head_dim state"]:
    """Turns states, or their gradients, by an angle a pair."""
    return rotate(states, turn_by(angle[:, :, None]))


def turn_gradients(
    states: Float[Array, "batch pieces chunks 64 padded_state"],
    dstates: Float[Array, "batch pieces chunks 64 padded_state"],
    final_state: Float[Array, "batch pieces 64 padded_state"],
    pieces: int,
    state: int,
    pairs: int,
) -> Float[Array, "batch chunks heads pairs"]:
    """Returns the gradient of an angle by which what comes after a chunk is turned against what comes before.

    Args:
        states: state before each chunk.
        dstates: gradient of the state after each chunk.
        final_state: state after the last one.
        pieces: of a head, each with some of its channels.
        state: components of the state without padding.
        pairs: of components that rotate.
    """
    after = jnp.concatenate([states[:, :, 1:], final_state[:, :, None].astype(states.dtype)], axis=2)
    first, second = slice(pairs), slice(state // 2, state // 2 + pairs)

    def along(gradient: slice, component: slice) -> jax.Array:
        return jnp.sum(dstates[..., gradient].astype(jnp.float32) * after[..., component].astype(jnp.float32), axis=3)

    of_pieces = along(first, second) - along(second, first)
    by_head = jnp.sum(of_pieces.reshape(of_pieces.shape[0], -1, pieces, *of_pieces.shape[2:]), axis=2)
    return jnp.pi * jnp.swapaxes(by_head, 1, 2)


def increment_gradients(
    dangle: Float[Array, "batch length heads pairs"], turns: Float[Array, "batch chunks heads pairs"], tokens: int
) -> Float[Array, "batch length heads pairs"]:
    """Returns the gradients of each token's angle, given those of the sums up to each token of what its chunk sees."""
    batch, length, heads, pairs = dangle.shape
    later = product("ts,bcshp->bcthp", jnp.triu(jnp.ones((tokens, tokens))), _cut(dangle, tokens))
    return (later + turns[:, :, None]).reshape(batch, -1, heads, pairs)[:, :length]


def _cut(array: jax.Array, tokens: int) -> jax.Array:
    """(batch, length, …) to (batch, chunks, tokens, …)."""
    chunks = -(-array.shape[1] // tokens)
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, chunks * tokens - array.shape[1])
    return jnp.pad(array, padding).reshape(array.shape[0], chunks, tokens, *array.shape[2:])
