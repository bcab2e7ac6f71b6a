"""The selective scan out of XLA operations: any backend, any dtype, memory for a state per chunk.

The sequence is cut into chunks, and where that pays, these into smaller ones. The backward pass keeps the state before
each chunk and recomputes what lies within it.

Inside the smallest chunks the recurrence is solved in one of two ways:

- on a CPU one token after the other, unrolled, so that a token's decays are computed, used and forgotten in cache;
- elsewhere by ``jax.lax.associative_scan``, whose few large operations keep a parallel machine busy.

At batch 8, length 512, 512 channels, state 16 in float32, a forward pass, and a forward and a backward pass, took this
many milliseconds of processor time (Xeon with AVX-512, spread over two cores, jax 0.12.0): token after token in chunks
of 64 and 4, 32 and 194; not unrolled, 33 and 269; by associative scans over chunks of 16, 165 and 841. Chunks of 8
inside those of 64 were no faster than of 4, and compiled for twice as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from pallas_kernels.implementation import backend
from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.inputs import Inputs
from pallas_kernels.sharding import vary_like

_CHUNK_SIZES = {"cpu": (64, 4)}
_DEFAULT_CHUNK_SIZES = (128,)


class _Tokens(NamedTuple):
    """What changes with every token, the length first. A row is a group of channels of one sequence."""

    x: Float[Array, "length rows members"]
    delta: Float[Array, "length rows members"]
    B: Inexact[Array, "length rows state"]
    C: Inexact[Array, "length rows state"]
    z: Float[Array, "length rows members"] | None
    starts: Bool[Array, "length rows"] | None


class _Parameters(NamedTuple):
    """What all tokens share; of a single row where there is one group only."""

    A: Inexact[Array, "rows_or_1 state members"]
    D: Float[Array, "rows_or_1 members"] | None
    delta_bias: Float[Array, "rows_or_1 members"] | None


def unsupported_reason(inputs: Inputs, *, delta_softplus: bool) -> str | None:
    """Runs everywhere."""
    del inputs, delta_softplus


def selective_scan(inputs: Inputs, *, delta_softplus: bool) -> tuple[jax.Array, jax.Array]:
    """Computes y and the final state; see ``Inputs``."""
    batch, _, channels = inputs.x.shape
    groups, state = inputs.B.shape[2:]
    members = channels // groups

    def per_token(array: jax.Array, size: int = members) -> jax.Array:
        return jnp.moveaxis(array, 1, 0).reshape(-1, batch * groups, size)

    def per_channel(array: jax.Array, *sizes: int) -> jax.Array:
        array = array.reshape(groups, members, *sizes)
        return array if groups == 1 else jnp.concatenate([array] * batch)

    starts = None
    if inputs.segment_ids is not None:
        starts = jnp.repeat(segment_starts(inputs.segment_ids).T, groups, axis=1)
    tokens = _Tokens(
        x=per_token(inputs.x),
        delta=per_token(inputs.delta),
        B=per_token(inputs.B, state),
        C=per_token(inputs.C, state),
        z=None if inputs.z is None else per_token(inputs.z),
        starts=starts,
    )
    parameters = _Parameters(
        A=jnp.swapaxes(per_channel(inputs.A.astype(inputs.state_dtype), state), 1, 2),
        D=None if inputs.D is None else per_channel(inputs.D.astype(inputs.real_dtype)),
        delta_bias=None if inputs.delta_bias is None else per_channel(inputs.delta_bias.astype(inputs.real_dtype)),
    )
    if inputs.initial_state is None:
        h = vary_like(jnp.zeros((batch * groups, state, members), inputs.state_dtype), inputs.x)
    else:
        h = jnp.swapaxes(inputs.initial_state.reshape(batch * groups, members, state), 1, 2)

    solve = _solve_sequentially if backend() == "cpu" else _solve_associatively
    chunk_sizes = _CHUNK_SIZES.get(backend(), _DEFAULT_CHUNK_SIZES)
    chunk = functools.partial(_chunk, parameters=parameters, delta_softplus=delta_softplus, solve=solve)
    h, y = _scan_chunks(chunk, h, tokens, chunk_sizes)

    y = jnp.moveaxis(y.reshape(-1, batch, channels), 0, 1)
    return y, jnp.swapaxes(h, 1, 2).reshape(batch, channels, state)


def _scan_chunks(
    chunk: Callable[[jax.Array, _Tokens], tuple[jax.Array, jax.Array]],
    h: jax.Array,
    tokens: _Tokens,
    sizes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Carries the state through chunks of the first size, these being cut into chunks of the next, then the rest."""
    if not sizes:
        return chunk(h, tokens)
    size, *smaller = sizes
    scan = functools.partial(_scan_chunks, chunk, sizes=tuple(smaller))
    length = tokens.x.shape[0]
    whole = length - length % size
    ys = []
    if whole:
        chunks = jax.tree.map(lambda array: array[:whole].reshape(-1, size, *array.shape[1:]), tokens)
        # A loop keeps its recomputation apart from the forward pass without the barriers that cost a tenth of the time.
        h, y = jax.lax.scan(jax.checkpoint(scan, prevent_cse=False), h, chunks)
        ys.append(y.reshape(whole, *y.shape[2:]))
    if whole < length:
        h, y = jax.checkpoint(scan)(h, jax.tree.map(lambda array: array[whole:], tokens))
        ys.append(y)
    return h, jnp.concatenate(ys)


def _chunk(
    h: jax.Array,
    tokens: _Tokens,
    *,
    parameters: _Parameters,
    delta_softplus: bool,
    solve: Callable[..., tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Computes the outputs of a few tokens, and the state after them."""
    dtype = parameters.A.real.dtype
    x = tokens.x.astype(dtype)
    delta = tokens.delta.astype(dtype)
    if parameters.delta_bias is not None:
        delta = delta + parameters.delta_bias
    if delta_softplus:
        delta = jax.nn.softplus(delta)
    h, y = solve(h, x, delta, tokens, parameters.A)
    if parameters.D is not None:
        y = y + parameters.D * x
    if tokens.z is not None:
        y = y * jax.nn.silu(tokens.z.astype(dtype))
    return h, y.astype(tokens.x.dtype)


def _solve_sequentially(
    h: jax.Array, x: jax.Array, delta: jax.Array, tokens: _Tokens, A: jax.Array
) -> tuple[jax.Array, jax.Array]:
    ys = []
    for t in range(x.shape[0]):
        start = None if tokens.starts is None else tokens.starts[t]
        decay, increment = _discretise(x[t], delta[t], A, tokens.B[t], start)
        h = decay * h + increment
        ys.append(_read_out(h, tokens.C[t]))
    return h, jnp.stack(ys)


def _solve_associatively(
    h: jax.Array, x: jax.Array, delta: jax.Array, tokens: _Tokens, A: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, increment = _discretise(x, delta, A, tokens.B, tokens.starts)
    decay, response = jax.lax.associative_scan(compose, (decay, increment))
    states = decay * h + response
    return states[-1], _read_out(states, tokens.C)


def _discretise(x, delta, A, B, starts) -> tuple[jax.Array, jax.Array]:
    """Returns what the state is multiplied by and what is added to it, (..., rows, state, members)."""
    decay = jnp.exp(delta[..., None, :] * A)
    if starts is not None:
        decay = jnp.where(starts[..., None, None], 0, decay)
    return decay, _einsum("...d,...n->...nd", delta * x, B.astype(A.dtype))


def _read_out(h: jax.Array, C: jax.Array) -> jax.Array:
    y = _einsum("...nd,...n->...d", h, C.astype(h.dtype))
    return 2 * y.real if jnp.iscomplexobj(y) else y


# Products with B and C are matrix products of rank one: as such, and not as sums of elementwise products, they are
# fast on a CPU in both directions. Elsewhere their precision must be asked for.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
