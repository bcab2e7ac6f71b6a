"""A chunk of a state-space dual model out of XLA operations: what the operators of this form share.

The chunked form of Dao and Gu, "Transformers are SSMs", 2024, section 6: within a chunk the outputs are those of masked
attention, a matrix product; what came before reaches the chunk through the state.

Matrix products take bfloat16 where x, B and C all are; they then round the weights that they are given, once each.
Everything else, and every sum, is float32.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.implementation import backend

_CHUNK_SIZES = {"cpu": 64}
_DEFAULT_CHUNK_SIZE = 128


def default_chunk_size() -> int:
    """Tokens of a chunk that suit the current backend."""
    return _CHUNK_SIZES.get(backend(), _DEFAULT_CHUNK_SIZE)


def cut[Tokens](tokens: Tokens, size: int) -> Tokens:
    """Cuts (batch, length, ...) arrays into chunks of this size, stacked in front: (chunks, batch, size, ...).

    The last chunk is filled up with zeros: tokens without a decay and of weight zero, which leave the state alone.
    """

    def cut_array(array: jax.Array) -> jax.Array:
        length = array.shape[1]
        chunks = math.ceil(length / size)
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, chunks * size - length)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(array.shape[0], chunks, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(cut_array, tokens)


def join(chunks: Any, length: int) -> Any:
    """Undoes ``cut``: returns (batch, length, ...) arrays."""
    return jax.tree.map(
        lambda array: jnp.moveaxis(array, 0, 1).reshape(array.shape[1], -1, *array.shape[3:])[:, :length], chunks
    )


def operand_dtype(*operands: jax.Array) -> jnp.dtype:
    """What products of these matrices round their operands to: bfloat16 where all are that, else float32 at least."""
    dtype = jnp.result_type(*operands)
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(dtype, jnp.float32)


def chunk(
    h: Float[Array, "batch groups members head_dim state"],
    *,
    x: Float[Array, "batch length groups members rank head_dim"],
    log_decay: Float[Array, "batch length groups members"],
    weight: Float[Array, "batch length groups members"],
    own_weight: Float[Array, "batch length groups members"] | None = None,
    B: Float[Array, "batch length groups rank state"],
    C: Float[Array, "batch length groups rank state"],
    starts: Bool[Array, "batch length"] | None,
    dtype: jnp.dtype,
) -> tuple[
    Float[Array, "batch groups members head_dim state"], Float[Array, "batch length groups members rank head_dim"]
]:
    """Computes the state after a chunk, and the chunk's outputs, in the dtype of ``h``.

    For each member of a group, with the state zero at each start of a segment::

        h[t] = exp(log_decay[t]) h[t-1] + weight[t] sum_r x[t, r] B[t, r]^T
        y[t, r] = h[t] C[t, r]

    Args:
        h: state before the chunk.
        x: inputs, one a rank.
        log_decay: logarithm of what each token leaves of the state before.
        weight: what each token's input is multiplied by.
        own_weight: the weight with which a token's input enters the token's own output, if it is another one.
        B: input matrices, one a rank, the same for all members of a group.
        C: output matrices, likewise.
        starts: marks the first token of each segment, except the chunk's first token where it continues ``h``.
        dtype: what matrix products round their operands to, see ``operand_dtype``.
    """
    product = _product(dtype)
    between, from_start, to_end = _decays(log_decay, starts)

    weights = between * jnp.moveaxis(weight, 1, -1)[..., None, :]
    if own_weight is not None:
        own = jnp.moveaxis(own_weight, 1, -1)[..., None, :]
        weights = jnp.where(jnp.eye(x.shape[1], dtype=bool), own, weights)
    # Indices: tokens q and s, ranks r and i.
    attention = product("bqgrn,bsgin->bgqrsi", C, B)[:, :, None] * weights[..., :, None, :, None]
    y = product("bgmqrsi,bsgmip->bqgmrp", attention, x)
    y = y + from_start[..., None, None] * product("bqgrn,bgmpn->bqgmrp", C, h)
    increment = product("bsgmip,bsgin->bgmpn", x * (to_end * weight)[..., None, None], B)
    return from_start[:, -1, :, :, None, None] * h + increment, y


def _product(dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """Returns an einsum that rounds its operands to bfloat16 if they are to be that, and sums in float32 at least."""
    if dtype == jnp.bfloat16:
        return _einsum_of_rounded
    return functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum_of_rounded(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return _einsum_bfloat16(spec, a, b)


def _einsum_of_rounded_forward(spec, a, b):
    return _einsum_bfloat16(spec, a, b), (a, b)


def _einsum_of_rounded_backward(spec, operands, gradient):
    # The transpose that JAX knows would round the gradients of float32 operands to bfloat16 as well.
    a, b = operands
    of_a, of_b, of_output = re.split(",|->", spec)
    return (
        _einsum_bfloat16(f"{of_output},{of_b}->{of_a}", gradient, b).astype(a.dtype),
        _einsum_bfloat16(f"{of_a},{of_output}->{of_b}", a, gradient).astype(b.dtype),
    )


_einsum_of_rounded.defvjp(_einsum_of_rounded_forward, _einsum_of_rounded_backward)


def _einsum_bfloat16(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _decays(
    log_decay: Float[Array, "batch length groups members"], starts: Bool[Array, "batch length"] | None
) -> tuple[
    Float[Array, "batch groups members length length"],
    Float[Array, "batch length groups members"],
    Float[Array, "batch length groups members"],
]:
    """Returns what is left of a state between tokens of a chunk, from their decays; nothing of another segment.

    In this order: at each token (first of the two lengths) of what each one (second) added, zero for later ones; at
    each token of the state before the chunk; at the last token of what each one added.
    """
    total = _cumulative(log_decay)
    length = log_decay.shape[1]
    by_head = jnp.moveaxis(total, 2, -1)
    between = jnp.sum(by_head[..., :, None] - by_head[..., None, :], axis=0)
    from_start = jnp.sum(total, axis=0)
    to_end = jnp.sum(total[:, :, -1:] - total, axis=0)

    visible = jnp.tril(jnp.ones((length, length), bool))
    if starts is not None:
        segment = jnp.cumsum(starts, axis=1)
        visible = visible & (segment[:, :, None] == segment[:, None, :])
        visible = visible[:, None, None]
        from_start = jnp.where((segment == 0)[..., None, None], from_start, -jnp.inf)
        to_end = jnp.where((segment == segment[:, -1:])[..., None, None], to_end, -jnp.inf)
    # Masked before the exponential, which would overflow for tokens that come later.
    return jnp.exp(jnp.where(visible, between, -jnp.inf)), jnp.exp(from_start), jnp.exp(to_end)


def _cumulative(
    log_decay: Float[Array, "batch length groups members"],
) -> Float[Array, "2 batch length groups members"]:
    """Returns two terms whose sum is the cumulative sum over the tokens, and whose differences are precise.

    Those of a cumulative sum in one float32 are not once it is large: behind a few tokens that forget everything, those
    that forget nothing would decay by rounding errors. The first term is the sum of numbers rounded such that it is
    exact, and so are its differences; the second, the sum of what rounding took, stays small.
    """
    info = jnp.finfo(log_decay.dtype)
    # Beyond this a decay is zero anyway.
    lowest = math.log(float(info.smallest_subnormal))
    log_decay = jnp.maximum(log_decay, lowest)
    unit = 2.0 ** (math.ceil(math.log2(-lowest * log_decay.shape[1])) - info.nmant)
    coarse = jax.lax.stop_gradient(jnp.round(log_decay / unit) * unit)
    return jnp.cumsum(jnp.stack([coarse, log_decay - coarse]), axis=2)
