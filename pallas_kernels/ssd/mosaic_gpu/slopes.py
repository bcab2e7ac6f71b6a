"""What the backward kernels find out about each token of a head, and the kernel that makes gradients of it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu_compat import WARPS, plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu.blocks import CHUNK, OWN_WEIGHT, Problem
from pallas_kernels.ssd.mosaic_gpu.tokens import BY_HEAD, BY_TOKEN, HEADS, PITCH, STEPS, padded_heads


class Slopes(NamedTuple):
    """Numbers a token that the gradient of its decay is made out of, in the order in which kernels write them."""

    within: Any
    """What passes through the token's decay from tokens of the chunk before it to outputs from it on."""
    from_start: Any
    """What the token's output owes to the state before the chunk."""
    to_end: Any
    """What the state after the chunk owes to the token, for each unit of its step size."""
    to_outputs: Any
    """What outputs of the chunk owe to the token."""
    across: Any
    """Its sum over the chunk is what the state after the chunk owes to the one before, but for the decay between."""
    own: Any = None
    """What the token's own outputs owe to it, where it has an own weight."""


def _names(*, own_weights: bool) -> tuple[str, ...]:
    return Slopes._fields if own_weights else Slopes._fields[:-1]


def array_type(p: Problem) -> jax.ShapeDtypeStruct:
    """Type of all slopes: (batch, heads or more, chunks, the fields of ``Slopes`` that are there, CHUNK)."""
    names = _names(own_weights=p.own_weights)
    return jax.ShapeDtypeStruct((p.batch, padded_heads(p.heads), p.chunks, len(names), CHUNK), jnp.float32)


def put(slopes: Any, name: str, numbers: jax.Array) -> None:
    """Writes one of the fields of ``Slopes``, a number a token, given a reference to those of a head and chunk."""
    store(slopes.at[Slopes._fields.index(name)], numbers)


def gradients(
    slopes: Float[Array, "batch some_heads chunks fields 64"], tokens: Float[Array, "batch padded_heads chunks rows 64"]
) -> dict[str, Float[Array, "batch padded_length padded_heads"]]:
    """Gradients of the arguments of ``tokens.pack``.

    A decay multiplies what passes through it: from tokens of its chunk before it, or from the state before the chunk,
    to outputs of its chunk from it on, or to the state after the chunk. Each of the four is added up by itself. (The
    whole is also a cumulative sum of what outputs owe to states less what these owe to inputs, but that one loses its
    digits wherever little passes.)

    Args:
        slopes: of each head.
        tokens: what ``tokens.pack`` has made.
    """
    batch, heads, chunks, rows, _ = tokens.shape
    slopes = jnp.pad(slopes, [(0, heads - slopes.shape[1] if dim == 1 else 0) for dim in range(5)])
    inputs = {
        name: array.reshape(batch, heads, chunks, -1, WARPS, STEPS)
        for name, array in (("slopes", slopes), ("tokens", tokens))
    }
    own_weights = rows > OWN_WEIGHT
    results: list[str] = ["delta", "log_decay"]
    if own_weights:
        results.append("own_weight")
    outputs = dict.fromkeys(results, jax.ShapeDtypeStruct((batch, chunks, WARPS, STEPS, heads), jnp.float32))
    turned = ("within", "from_start", "into_end", "across", *(name for name in results if name != "log_decay"))
    scratch = {
        **{name: plgpu.SMEM((WARPS, STEPS, PITCH), jnp.float32) for name in turned},
        "sums": plgpu.SMEM((3, WARPS, PITCH), jnp.float32),
    }

    def token_gradients(gmem: Refs, smem: Refs) -> None:
        batch, chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        heads = pl.ds(lax.axis_index("heads") * HEADS, HEADS)

        def by_token(name: str, row: int) -> jax.Array:
            return plgpu.load(gmem[name].at[batch, heads, chunk, row], layout=BY_TOKEN, optimized=False)

        # In memory a head's tokens follow each other, in the results a token's heads do.
        found = Slopes(*(by_token("slopes", i) for i in range(slopes.shape[3])))
        delta = by_token("tokens", 2)
        to_others = found.to_outputs - found.own if own_weights else found.to_outputs
        values = {
            "within": found.within,
            "from_start": found.from_start,
            "into_end": delta * found.to_end,
            "across": found.across,
            "delta": found.to_end + to_others / delta,
        }
        if own_weights:
            values["own_weight"] = found.own / by_token("tokens", OWN_WEIGHT)
        for name, value in values.items():
            store(smem[name].at[:, :, :HEADS].transpose((2, 0, 1)), value)
        synchronize()

        def steps(name: str) -> list[jax.Array]:
            return [plgpu.load(smem[name].at[:, i, :HEADS], layout=BY_HEAD, optimized=False) for i in range(STEPS)]

        def put(name: str, i: int, value: jax.Array) -> None:
            store(gmem[name].at[batch, chunk, :, i, heads], value)

        within, from_start, into_end = (steps(name) for name in ("within", "from_start", "into_end"))
        # First the sums of each warp's tokens, then those of the tokens before and after them.
        for place, terms in enumerate((from_start, into_end, steps("across"))):
            store(smem["sums"].at[place, :, :HEADS], functools.reduce(jnp.add, terms))
        synchronize()
        warp = plgpu.broadcasted_iota(jnp.int32, (WARPS, HEADS), 0, layout=BY_HEAD)

        def spread(numbers: jax.Array) -> jax.Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (WARPS, HEADS), (1,)), BY_HEAD)

        def by_head(ref: Any) -> jax.Array:
            return plgpu.load(ref, layout=BY_HEAD.reduce(0), optimized=False)

        def sum_of(place: int, other: int) -> jax.Array:
            return spread(by_head(smem["sums"].at[place, other, :HEADS]))

        others = range(WARPS)
        later = functools.reduce(jnp.add, (jnp.where(warp < other, sum_of(0, other), 0.0) for other in others))
        before = functools.reduce(jnp.add, (jnp.where(warp > other, sum_of(1, other), 0.0) for other in others))
        decay = jnp.exp2(spread(by_head(gmem["tokens"].at[batch, heads, chunk, 0, WARPS - 1, STEPS - 1])))
        across = decay * functools.reduce(jnp.add, (sum_of(2, other) for other in others))
        until_before = [before]
        for term in into_end[:-1]:
            until_before.append(until_before[-1] + term)
        from_here = later
        for i in reversed(range(STEPS)):
            from_here = from_here + from_start[i]
            put("log_decay", i, within[i] + (from_here + until_before[i]) + across)
        for name in results:
            if name != "log_decay":
                for i, value in enumerate(steps(name)):
                    put(name, i, value)

    grid = {"batch": batch, "chunk": chunks, "heads": heads // HEADS}
    made = launch("ssd", token_gradients, inputs, outputs, scratch, grid)
    return {name: array.reshape(batch, chunks * CHUNK, heads) for name, array in made.items()}
