"""Which geometry a problem gets."""

from __future__ import annotations

import dataclasses

from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry

_SMS = 132
_SHARED_MEMORY = 232_448 - 4_096
"""Bytes a block may ask for on Hopper, less what the compiler takes for itself."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a scan is cut."""

    geometry: Geometry
    num_parts: int


def padded_state(state: int) -> int:
    """States of a channel that the kernels compute: a power of two from 4."""
    return max(4, 1 << (state - 1).bit_length())


def padded_channels(channels: int, state: int) -> int:
    """Channels of a group that the kernels compute: whole register tiles, of at least 8 channels together."""
    block = max(Geometry(padded_state(state), 1).tile_channels, 8)
    return -(-channels // block) * block


def forward(batch: int, length: int, channels: int, groups: int, state: int, token_bytes: int) -> Plan:
    """Plan of the forward kernel for padded channels and state."""
    return _plan(batch, length, channels, groups, state, token_bytes, max_tiles=2)


def backward(batch: int, length: int, channels: int, groups: int, state: int, token_bytes: int) -> Plan:
    """Plan of the backward kernel for padded channels and state."""
    return _plan(batch, length, channels, groups, state, token_bytes, max_tiles=2)


def _plan(batch, length, channels, groups, state, token_bytes, max_tiles) -> Plan:
    tile_channels = Geometry(state, 1).tile_channels
    tiles = max(t for t in range(1, max_tiles + 1) if channels // groups % (t * tile_channels) == 0)
    geometry = Geometry(state, tiles)
    num_blocks = batch * channels // geometry.channels
    num_chunks = -(-length // geometry.steps)
    num_parts = 1 if num_blocks >= _SMS else min(-(-2 * _SMS // num_blocks), max(1, num_chunks // 4))
    return Plan(geometry, num_parts)
