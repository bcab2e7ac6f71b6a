"""One call: the way from the shapes of ``Inputs`` to those that the kernels take, and back."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.batching import Arrays
from pallas_kernels.ssd.mosaic_gpu import parts, plan, states, tokens
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, STATE_UNIT, Problem
from pallas_kernels.ssd.mosaic_gpu.plan import Plan


class Call:
    """Shapes of one call, and how it is cut.

    Heads are cut into pieces of ``CHANNELS`` channels, which decay alike. What does not fill these, a chunk or the
    kernels' state is padded with zeros.
    """

    def __init__(self, arrays: Arrays, chosen: Plan | None = None, *, rank: int = 1) -> None:
        self.rank, self.own_weights = rank, "own_weight" in arrays
        self.pairs = arrays["angles"].shape[-1] if "angles" in arrays else 0
        self.batch, self.length, self.heads, self.head_dim = arrays["x"].shape
        self.groups, self.state = arrays["B"].shape[2:]
        self.pieces = math.ceil(self.head_dim / CHANNELS)
        self.chunks = math.ceil(self.length / CHUNK)
        self.padded_state = math.ceil(self.state / STATE_UNIT) * STATE_UNIT
        sizes = self.batch, self.chunks, self.heads * self.pieces, self.groups, self.padded_state
        self.plan = chosen or plan.choose(*sizes)

    def problem(self, walk: tuple[int, int]) -> Problem:
        """The problem as cut for a kernel with these warpgroups and stages."""
        heads = self.heads * self.pieces
        sizes = self.batch, self.chunks, heads, self.pieces, self.groups, self.padded_state
        return Problem(*sizes, *walk, self.plan.parts, self.rank, self.own_weights, self.pairs)

    def prepared(self, arrays: Arrays, *names: str) -> Arrays:
        """The named arrays as kernels take them, those that are there, and "tokens"."""
        packed = arrays.get("tokens")
        if packed is None:
            packed = tokens.pack(arrays["delta"], arrays["log_decay"], arrays.get("own_weight"))
        prepared = {"tokens": packed}
        for name in names:
            if name in ("x", "dy"):
                prepared[name] = self.pad_tokens(arrays[name])
            elif name in ("B", "C"):
                padded = _pad(_pad(arrays[name], 1, self.chunks * CHUNK), 3, self.padded_state)
                prepared[name] = padded.reshape(self.batch, -1, self.groups * self.padded_state)
            elif name in arrays:
                prepared[name] = _pad(arrays[name], 1, self.pieces * CHANNELS).reshape(-1, CHANNELS)
        return prepared

    def starts(self, inputs: Arrays, outside: jax.Array | None, *, reverse: bool) -> Arrays:
        """Returns "start" for a walk, given the state before the sequence, or its gradient after it; None is zero."""
        if outside is not None:
            outside = self.pad_state(outside)
        if self.plan.parts == 1:
            return {} if outside is None else {"start": outside[:, None]}
        walk = self.problem(self.plan.states)
        ends = states.scan(walk, inputs, reverse=reverse, save=False)["end"]
        if outside is None:
            outside = jnp.zeros_like(ends[:, 0])
        totals = _pad(inputs["tokens"][:, : self.heads, :, 0, -1], 2, self.plan.parts * walk.chunks_per_part)
        log_decay = jnp.sum(totals.reshape(self.batch, self.heads, self.plan.parts, walk.chunks_per_part), axis=-1)
        log_decay = jnp.swapaxes(jnp.repeat(log_decay, self.pieces, axis=1), 1, 2)
        return {"start": parts.starts(ends, outside, log_decay, reverse=reverse)}

    def pad_tokens(self, array: jax.Array) -> jax.Array:
        """(batch, length, heads, head_dim) to (batch, chunks · CHUNK, heads · CHANNELS)."""
        padded = _pad(_pad(array, 1, self.chunks * CHUNK), 3, self.pieces * CHANNELS)
        return padded.reshape(self.batch, self.chunks * CHUNK, -1)

    def trim_tokens(self, array: jax.Array, like: jax.Array) -> jax.Array:
        """Undoes ``pad_tokens``."""
        by_head = array.reshape(self.batch, self.chunks * CHUNK, self.heads, -1)
        return by_head[:, : self.length, :, : self.head_dim].astype(like.dtype)

    def by_head(self, array: jax.Array) -> jax.Array:
        """Sums numbers of heads, (batch, heads or more, …), over the pieces of each."""
        if self.pieces == 1:
            return array
        by_piece = array[:, : self.heads * self.pieces].reshape(self.batch, self.heads, self.pieces, *array.shape[2:])
        return jnp.sum(by_piece, axis=2)

    def trim_numbers(self, array: jax.Array) -> jax.Array:
        """Numbers of these tokens and heads, of those of more."""
        return array[:, : self.length, : self.heads]

    def pad_state(self, array: jax.Array) -> jax.Array:
        """(batch, heads, head_dim, state) to (batch, heads, CHANNELS, state)."""
        padded = _pad(_pad(array, 2, self.pieces * CHANNELS), 3, self.padded_state)
        return padded.reshape(self.batch, -1, CHANNELS, self.padded_state)

    def trim_state(self, array: jax.Array) -> jax.Array:
        """Undoes ``pad_state``."""
        joined = array.reshape(self.batch, self.heads, -1, self.padded_state)
        return joined[:, :, : self.head_dim, : self.state]

    def trim_matrix(self, array: jax.Array) -> jax.Array:
        """(batch, chunks · CHUNK, groups · padded state) to (batch, length, groups, state)."""
        return array.reshape(self.batch, -1, self.groups, self.padded_state)[:, : self.length, :, : self.state]

    def trim_channels(self, array: jax.Array) -> jax.Array:
        """(batch, heads · CHANNELS) to (batch, heads, head_dim)."""
        return array.reshape(self.batch, self.heads, -1)[:, :, : self.head_dim]


def _pad(array: jax.Array, dim: int, size: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, size - array.shape[dim])
    return jnp.pad(array, widths) if widths[dim][1] else array
