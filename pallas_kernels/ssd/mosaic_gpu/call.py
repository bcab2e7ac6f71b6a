"""One call: the way from the shapes of ``Inputs`` to those that the kernels take, and back."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.batching import Arrays
from pallas_kernels.sharding import vary_like
from pallas_kernels.ssd.mosaic_gpu import parts, plan, states, tokens
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, STATE_UNIT, Problem
from pallas_kernels.ssd.mosaic_gpu.plan import Plan


class Call:
    """Shapes of one call, and how it is cut.

    Heads are cut into pieces of ``CHANNELS`` channels, which decay alike. What does not fill these, a chunk or the
    kernels' state is padded with zeros.
    """

    def __init__(self, arrays: Arrays, chosen: Plan | None = None) -> None:
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
        return Problem(self.batch, self.chunks, heads, self.groups, self.padded_state, *walk, self.plan.parts)

    def prepared(self, arrays: Arrays, *names: str) -> Arrays:
        """The named arrays as kernels take them, those that are there, and "tokens"."""
        numbers = [self.pad_numbers(arrays[name]) for name in ("delta", "log_decay")]
        prepared = {"tokens": tokens.pack(*numbers)}
        for name in names:
            if name in ("x", "dy"):
                prepared[name] = self.pad_tokens(arrays[name])
            elif name in ("B", "C"):
                padded = _pad(_pad(arrays[name], 1, self.chunks * CHUNK), 3, self.padded_state)
                prepared[name] = padded.reshape(self.batch, -1, self.groups * self.padded_state)
            elif name in arrays:
                prepared[name] = _pad(arrays[name], 1, self.pieces * CHANNELS).reshape(-1, CHANNELS)
        return prepared

    def starts(self, inputs: Arrays, outside: jax.Array | None, *, reverse: bool) -> jax.Array:
        """The state before each part, or its gradient after each part, given the one before or after all of them."""
        walk = self.problem(self.plan.states)
        like = inputs["dy" if reverse else "x"]
        zeros = vary_like(jnp.zeros(walk.part_states_type().shape, jnp.float32), like)
        if outside is None and self.plan.parts == 1:
            return zeros
        outside = zeros[:, 0] if outside is None else self.pad_state(outside)
        if self.plan.parts == 1:
            return outside[:, None]
        ends = states.scan(walk, inputs | {"start": zeros}, reverse=reverse, save=False)["end"]
        by_chunk = inputs["tokens"][:, :, :, 0, -1]
        log_decay = jnp.sum(by_chunk.reshape(self.batch, -1, self.plan.parts, walk.chunks_per_part), axis=-1)
        return parts.starts(ends, outside, jnp.swapaxes(log_decay, 1, 2), reverse=reverse)

    def pad_tokens(self, array: jax.Array) -> jax.Array:
        """(batch, length, heads, head_dim) to (batch, chunks · CHUNK, heads · CHANNELS)."""
        padded = _pad(_pad(array, 1, self.chunks * CHUNK), 3, self.pieces * CHANNELS)
        return padded.reshape(self.batch, self.chunks * CHUNK, -1)

    def trim_tokens(self, array: jax.Array, like: jax.Array) -> jax.Array:
        """Undoes ``pad_tokens``."""
        by_head = array.reshape(self.batch, self.chunks * CHUNK, self.heads, -1)
        return by_head[:, : self.length, :, : self.head_dim].astype(like.dtype)

    def pad_numbers(self, array: jax.Array) -> jax.Array:
        """(batch, length, heads) to (batch, heads, chunks, CHUNK)."""
        padded = jnp.swapaxes(_pad(array, 1, self.chunks * CHUNK), 1, 2)
        return jnp.repeat(padded.reshape(self.batch, self.heads, self.chunks, CHUNK), self.pieces, axis=1)

    def trim_numbers(self, array: jax.Array) -> jax.Array:
        """Transposes ``pad_numbers``: what was repeated is summed."""
        summed = jnp.sum(array.reshape(self.batch, self.heads, self.pieces, -1), axis=2)
        return jnp.swapaxes(summed[:, :, : self.length], 1, 2)

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
