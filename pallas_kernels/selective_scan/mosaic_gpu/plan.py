"""Which geometry a problem gets: what was fastest on an H200; docs/kernels.md has the measurements."""

from __future__ import annotations

import dataclasses

from pallas_kernels.selective_scan.mosaic_gpu.geometry import KEEP_LANES, Geometry

_MULTIPROCESSORS = 132
"""Of an H100 or H200. Others are not far from it, and a plan for the wrong number is only somewhat slower."""
_SHARED_MEMORY = 227 * 1024
"""Bytes that a block may have."""
_MAX_WARPGROUPS = 5
"""Of a block, such that a lane has registers enough for eight states; for more, three."""
_SINGLE_TILE_COST = 1.15
"""Time for a channel in a warpgroup of one tile, relative to one of two tiles, which loads B and C half as often."""
_ALONE = 1.2
"""Time for the same work in warpgroups that are not in step, since the last ones have a multiprocessor alone."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a scan is cut."""

    geometry: Geometry
    num_parts: int
    """Parts of the length that run at the same time."""


def padded_state(state: int) -> int:
    """States of a channel that the kernels compute: a power of two from 4."""
    return max(4, 1 << (state - 1).bit_length())


def padded_channels(channels: int, state: int) -> int:
    """Channels of a group that the kernels compute: whole blocks of the smallest geometry."""
    block = _geometries(padded_state(state))[-1].channels
    return -(-channels // block) * block


def forward(batch: int, length: int, channels: int, groups: int, state: int, itemsize: int) -> Plan:
    """Plan of the forward kernel.

    Args:
        batch: size of the batch.
        length: tokens of a sequence.
        channels: channels of all groups, as padded by ``padded_channels``.
        groups: groups of channels.
        state: states of a channel, as padded by ``padded_state``.
        itemsize: bytes of a number of x, delta or z.
    """
    geometries = _geometries(state, unroll=4)
    geometry, single = _largest_that_fits(channels // groups, geometries), geometries[-1]
    num_blocks = batch * channels // geometry.channels
    if 4 * batch * channels // single.channels < 3 * _MULTIPROCESSORS:
        # A quarter of the GPU would have nothing to do: then it pays to read the input twice.
        num_chunks = -(-length // geometry.steps)
        return Plan(geometry, max(min(8 * _MULTIPROCESSORS // num_blocks, num_chunks // 8), 1))
    # Chunks of one tile are longer, where shared memory has room for them.
    single = dataclasses.replace(single, steps=32 if state <= 32 else 16)
    in_step = [
        dataclasses.replace(g, warpgroups=warpgroups)
        for g in (*geometries[:-1], single)
        for warpgroups in range(_MAX_WARPGROUPS if g.tiles * g.states_per_lane <= 8 else 3, 2, -1)
        if channels // groups % (warpgroups * g.channels) == 0
    ]
    in_step = [g for g in in_step if _forward_bytes(g, itemsize) <= _SHARED_MEMORY]
    best = min(in_step, key=lambda g: _forward_cost(g, batch * channels), default=None)
    alone = geometry if num_blocks >= 4 * _MULTIPROCESSORS else single
    if best is not None and _forward_cost(best, batch * channels) <= _ALONE * _cost_of_all(alone, batch * channels):
        return Plan(best, 1)
    return Plan(alone, 1)


def backward(batch: int, length: int, channels: int, groups: int, state: int, itemsize: int) -> Plan:
    """Plan of the backward kernel; the arguments are those of ``forward``."""
    del itemsize
    geometry = _largest_that_fits(channels // groups, _geometries(state))
    num_blocks = batch * channels // geometry.channels
    if num_blocks >= 2 * _MULTIPROCESSORS:
        return Plan(geometry, 1)
    # The pass over the parts costs little beside the backward kernel, of which a multiprocessor wants three blocks.
    num_chunks = -(-length // geometry.steps)
    num_parts = 3 * _MULTIPROCESSORS // num_blocks
    if num_chunks > 256 * num_parts:
        num_parts *= 2
    return Plan(geometry, max(min(num_parts, num_chunks // 4), 1))


def _geometries(state: int, unroll: int = 2) -> list[Geometry]:
    """Geometries for a number of states, the largest block first.

    A block takes at least the 8 channels that fill a row of a bulk copy, and at most what shared memory holds.
    """
    geometries = [Geometry(state, tiles, unroll=unroll) for tiles in (2, 1)]
    return [g for g in geometries if 8 <= g.channels <= 128]


def _largest_that_fits(channels: int, geometries: list[Geometry]) -> Geometry:
    return next(g for g in geometries if channels % g.channels == 0)


def _forward_bytes(g: Geometry, itemsize: int) -> int:
    """Shared memory of a block of the forward kernel, at most."""
    tokens = g.steps * g.channels
    streamed = (3 * g.stages + 1) * tokens * itemsize
    floats = 4 * (2 * tokens + g.steps * g.state_lanes * g.padded_channels + 2 * g.channels)
    shared = 4 * g.shared_stages * (2 * g.steps * g.state + KEEP_LANES)
    alignment = 12 * 1024
    return g.warpgroups * (streamed + floats) + shared + alignment


def _cost_of_all(g: Geometry, channels: int) -> float:
    """Time of so many channels if all multiprocessors shared them evenly."""
    return channels / _MULTIPROCESSORS * (_SINGLE_TILE_COST if g.tiles == 1 else 1.0)


def _forward_cost(g: Geometry, channels: int) -> float:
    """Time of so many channels in blocks that fill a multiprocessor each."""
    waves = -(-channels // g.block_channels // _MULTIPROCESSORS)
    return _cost_of_all(g, waves * _MULTIPROCESSORS * g.block_channels)
