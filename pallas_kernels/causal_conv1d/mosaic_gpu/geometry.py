"""How a causal convolution is cut: into blocks of channels, stretches of tokens, and chunks of a stretch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, register_tile

Layout = Any

MAX_WIDTH = 8
MAX_VECTOR = 8
_SMS = 132


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The piece of the problem that one block (a warpgroup) works on.

    Every warp walks a stretch of tokens of its own, the four of a block one after another in the sequence. A lane owns
    ``vector`` neighbouring channels: it loads and stores them at once, and keeps what the filter remembers of earlier
    tokens in registers. A row is what the warps of a block hold of one step: (4 stretches, channels).
    """

    vector: int
    """Channels a lane."""
    steps: int
    """Tokens of a stretch that are loaded and stored together, a chunk."""
    stages: int
    """Chunks in shared memory at once: one in use, one on its way out, the others on their way in."""
    chunks: int
    """Chunks a stretch."""
    unroll: int
    """Steps whose inputs are loaded before the first of them is computed."""

    @property
    def channels(self) -> int:
        return LANES * self.vector

    @property
    def stretch(self) -> int:
        """Tokens a warp walks over."""
        return self.chunks * self.steps

    @property
    def tokens(self) -> int:
        """Tokens a block works on."""
        return WARPS * self.stretch

    @property
    def row_shape(self) -> tuple[int, int]:
        return WARPS, self.channels

    @functools.cached_property
    def row_layout(self) -> Layout:
        """Of a row in registers: a stretch a warp, and neighbouring channels in neighbouring lanes."""
        tiles = [(WARPS, self.channels), (1, self.channels), (1, self.vector)]
        return register_tile(tiles, warp_dims=(-6,), lane_dims=(-3,), vector_dim=-1)

    @property
    def channel_layout(self) -> Layout:
        """Of one number a channel, in every warp."""
        return self.row_layout.reduce((0,))

    @property
    def stretch_layout(self) -> Layout:
        """Of one number a stretch, in every lane of its warp."""
        return self.row_layout.reduce((1,))


def forward(batch: int, length: int, channels: int) -> Geometry:
    """Geometry of the forward kernel for a problem."""
    return _choose(batch, length, channels, blocks_per_sm=16)


def backward(batch: int, length: int, channels: int) -> Geometry:
    """Geometry of the backward kernel: half as many blocks, each of which has sums of its own to leave."""
    return _choose(batch, length, channels, blocks_per_sm=8)


def _choose(batch: int, length: int, channels: int, blocks_per_sm: int) -> Geometry:
    """Small blocks, of which several share an SM, with stretches as long as leaves enough of them.

    Every stretch also needs a few tokens of its neighbours, so long ones read less.
    """
    vector, steps = 4, 8
    columns = batch * -(-channels // (LANES * vector))
    chunks = 2
    while columns * (length // (WARPS * steps * 2 * chunks)) >= blocks_per_sm * _SMS:
        chunks *= 2
    chunks = min(chunks, -(-length // (WARPS * steps)))
    return Geometry(vector, steps, stages=min(4, chunks), chunks=chunks, unroll=8)
