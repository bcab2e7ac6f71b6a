"""The SSD operator out of XLA operations: any backend, any dtype, memory for a state per chunk.

The chunked form of Dao and Gu, "Transformers are SSMs", 2024, section 6: within a chunk the outputs are those of masked
attention, a matrix product; what came before reaches the chunk through the state. The backward pass keeps the state
before each chunk and recomputes what lies within it.

Matrix products take bfloat16 where x, B and C all are; they then round the weights that they are given, once each.
Everything else, and every sum, is float32.

At batch 2, length 1024, 8 heads of 64, one group, state 128 in float32, a forward pass, and a forward and a backward
pass, took this many milliseconds of processor time in chunks of 32, 64, 128 and 256 (Xeon with AVX-512, jax 0.12.0):
22, 21, 26 and 37; 71, 66, 79 and 134.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.implementation import backend
from pallas_kernels.segments import segment_starts
from pallas_kernels.sharding import vary_like
from pallas_kernels.ssd.inputs import Inputs

_CHUNK_SIZES = {"cpu": 64}
_DEFAULT_CHUNK_SIZE = 128


class _Tokens(NamedTuple):
    """What changes with every token."""

    x: Float[Array, "*chunks batch length groups members head_dim"]
    delta: Float[Array, "*chunks batch length groups members"]
    """Step sizes: after bias, softplus and limits."""
    B: Float[Array, "*chunks batch length groups state"]
    C: Float[Array, "*chunks batch length groups state"]
    z: Float[Array, "*chunks batch length groups members head_dim"] | None
    starts: Bool[Array, "*chunks batch length"] | None


def unsupported_reason(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus, delta_limit, chunk_size


def ssd(
    inputs: Inputs, *, delta_softplus: bool, delta_limit: tuple[float, float], chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    batch, length, heads, head_dim = inputs.x.shape
    groups, state = inputs.B.shape[2:]

    def by_group(array: jax.Array, dim: int) -> jax.Array:
        return array.reshape(*array.shape[:dim], groups, heads // groups, *array.shape[dim + 1 :])

    tokens = _Tokens(
        x=by_group(inputs.x, 2),
        delta=by_group(inputs.step_sizes(delta_softplus=delta_softplus, delta_limit=delta_limit), 2),
        B=inputs.B,
        C=inputs.C,
        z=None if inputs.z is None else by_group(inputs.z, 2),
        starts=None if inputs.segment_ids is None else segment_starts(inputs.segment_ids),
    )
    h = inputs.initial_state
    if h is None:
        h = vary_like(jnp.zeros((batch, heads, head_dim, state), inputs.real_dtype), inputs.x)
    chunk = functools.partial(
        _chunk,
        A=by_group(inputs.A.astype(inputs.real_dtype), 0),
        D=None if inputs.D is None else by_group(inputs.D.astype(inputs.real_dtype), 0),
    )
    chunk_size = chunk_size or _CHUNK_SIZES.get(backend(), _DEFAULT_CHUNK_SIZE)
    # A loop keeps its recomputation apart from the forward pass: no barriers are needed.
    chunk = jax.checkpoint(chunk, prevent_cse=False)
    h, y = jax.lax.scan(chunk, by_group(h, 1), _cut(tokens, min(chunk_size, length)))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, head_dim)[:, :length]
    return y, h.reshape(batch, heads, head_dim, state)


def _cut(tokens: _Tokens, size: int) -> _Tokens:
    """Stacks chunks of this size. The last is filled up with tokens of step size zero, which leave the state alone."""
    length = tokens.x.shape[1]
    chunks = math.ceil(length / size)

    def cut(array: jax.Array) -> jax.Array:
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, chunks * size - length)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(array.shape[0], chunks, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(cut, tokens)


def _chunk(
    h: Float[Array, "batch groups members head_dim state"],
    tokens: _Tokens,
    *,
    A: Float[Array, "groups members"],
    D: Float[Array, "groups members head_dim"] | None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the state after a chunk, and the chunk's outputs."""
    x, delta, B, C, z, starts = tokens
    product = _product(x, B, C)
    between, from_start, to_end = _decays(delta * A, starts)

    weights = product("bqgn,bsgn->bgqs", C, B)[:, :, None] * between * jnp.moveaxis(delta, 1, -1)[..., None, :]
    y = product("bgmqs,bsgmp->bqgmp", weights, x)
    y = y + from_start[..., None] * product("bqgn,bgmpn->bqgmp", C, h)
    increment = product("bsgmp,bsgn->bgmpn", x * (to_end * delta)[..., None], B)
    h = from_start[:, -1, :, :, None, None] * h + increment

    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(h.dtype))
    return h, y.astype(x.dtype)


def _product(*operands: jax.Array) -> Callable[..., jax.Array]:
    """Returns an einsum that takes bfloat16 where all of these are, and sums in float32 at least."""
    dtype = jnp.result_type(*operands)
    if dtype == jnp.bfloat16:
        return lambda spec, a, b: jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
    dtype = jnp.promote_types(dtype, jnp.float32)
    return lambda spec, a, b: jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)


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
