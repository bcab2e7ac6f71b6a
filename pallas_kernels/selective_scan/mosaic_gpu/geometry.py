"""How a selective scan is cut: into blocks of channels, chunks of steps, and registers of a lane."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, register_tile

Layout = Any

MAX_STATE = 256
MAX_TOKEN_CHANNELS = 64
KEEP_LANES = 32
"""Numbers a chunk in "keep": at least the steps of a chunk, and enough bytes for a bulk copy."""
SAVED_STEPS = 16
"""The forward kernel saves a state every so many steps for the backward kernel."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Shape of the piece of the problem that one warpgroup holds, and how many of these make a block.

    A register tile is (state_lanes, tile_channels, states_per_lane): each lane owns ``states_per_lane`` states of one
    channel; the lanes of a warp are ``state_lanes`` by ``32 // state_lanes`` channels, and the 4 warps take further
    channels. A warpgroup owns ``tiles`` of these, side by side along the channels, so that the values of B and C,
    which all channels share, are loaded once for ``tiles`` channels.
    """

    state: int
    """States of a channel, a power of two from 4."""
    tiles: int
    """Register tiles of a warpgroup."""
    warpgroups: int = 1
    """Warpgroups of a block. They share B and C, which keeps them in step: warpgroups that do not wait for each other
    end one after the other, since the hardware prefers the oldest, and the last ones have the multiprocessor alone."""
    steps: int = 16
    """Steps of a chunk: what is loaded, prepared and stored together. ``SAVED_STEPS`` in the backward kernel, a
    multiple of it in the forward kernel."""
    piece_steps: int = 4
    """Steps whose states the backward kernel holds in registers; of those before it keeps every such state."""
    summed_steps: int = 8
    """Steps after which the backward kernel sums the terms of dB and dC over the channels."""
    stages: int = 2
    """Chunks in shared memory at once, one in use and the others on their way."""
    shared_stages: int = 4
    """The same for what warpgroups share: how far the first may be ahead of the last."""
    unroll: int = 2
    """Steps whose operands are loaded before the first of them is computed, except in the backward kernel."""

    @property
    def state_lanes(self) -> int:
        """Lanes that share a channel: four states a lane where that is possible, sixteen at most."""
        return {4: 1, 8: 2, 16: 4, 32: 8, 64: 8, 128: 16, 256: 32}[self.state]

    @property
    def states_per_lane(self) -> int:
        return self.state // self.state_lanes

    @property
    def tile_channels(self) -> int:
        return WARPS * LANES // self.state_lanes

    @property
    def channels(self) -> int:
        """Of a warpgroup."""
        return self.tiles * self.tile_channels

    @property
    def block_channels(self) -> int:
        return self.warpgroups * self.channels

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        return self.state_lanes, self.tile_channels, self.states_per_lane

    @property
    def padded_channels(self) -> int:
        """Pitch of per-lane partial sums, such that the lanes of a warp store theirs to different banks.

        A multiple of four: matrix stores want rows of 16 aligned bytes.
        """
        return self.channels + max(LANES // self.state_lanes, 4)

    @functools.cached_property
    def state_layout(self) -> Layout:
        """Of a register tile."""
        lanes, channels, states = self.tile_shape
        tiles = [(lanes, channels, states), (lanes, channels // WARPS, states), (1, 1, states)]
        return register_tile(tiles, warp_dims=(-8,), lane_dims=(-6, -5), vector_dim=-1)

    @property
    def channel_layout(self) -> Layout:
        """Of one number a channel of a register tile, in every lane that owns states of the channel."""
        return self.state_layout.reduce((0, 2))

    @property
    def matrix_layout(self) -> Layout:
        """Of a row of B or C, (state_lanes, states_per_lane), in every lane that owns these states of some channel."""
        return self.state_layout.reduce((1,))

    @property
    def token_channels(self) -> int:
        """Channels of a token tile: element-wise work goes over (steps, token_channels) at a time.

        A power of two, as wide as the block allows: narrow rows of 16-bit data share banks.
        """
        widest = min(self.channels & -self.channels, MAX_TOKEN_CHANNELS)
        return max(widest, self.tile_channels)

    @functools.cached_property
    def token_rows(self) -> int:
        """Steps of a token tile that all lanes together hold one of each."""
        rows = min(self.steps // WARPS, LANES)
        while self.token_channels * rows // LANES > 4:  # 16 bytes of float32
            rows //= 2
        return WARPS * rows

    @functools.cached_property
    def token_layout(self) -> Layout:
        """Of a token tile: neighbouring lanes own neighbouring channels, as wide as shared memory reads."""
        width, rows = self.token_channels, self.token_rows // WARPS
        tiles = [(self.token_rows, width), (rows, width), (1, width * rows // LANES)]
        return register_tile(tiles, warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1)

    @property
    def token_channel_layout(self) -> Layout:
        """Of one number a channel of a token tile."""
        return self.token_layout.reduce((0,))

    @functools.cached_property
    def channel_sum_layout(self) -> Layout:
        """Of (summed_steps, *tile_shape) when it is summed over its channels.

        A warp takes whole steps, two at once where it has the lanes, so that more of a sum is within a lane.
        """
        lanes, _, states = self.tile_shape
        at_once = 2 if LANES // lanes >= 8 and self.summed_steps >= 2 * WARPS else 1
        channels = LANES // lanes // at_once
        tiles = [(WARPS * at_once, lanes, channels, states), (at_once, lanes, channels, states), (1, 1, 1, states)]
        return register_tile(tiles, warp_dims=(-12,), lane_dims=(-8, -7, -6), vector_dim=-1)

    def token_tiles(self) -> list[slice]:
        """Channels of the block, one token tile after the other."""
        return [slice(c, c + self.token_channels) for c in range(0, self.channels, self.token_channels)]

    def register_tiles(self) -> list[slice]:
        """Channels of the block, one register tile after the other."""
        return [slice(c, c + self.tile_channels) for c in range(0, self.channels, self.tile_channels)]
