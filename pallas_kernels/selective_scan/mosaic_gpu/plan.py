"""Which geometry a problem gets: what was fastest on an H200; docs/kernels.md has the measurements."""

from __future__ import annotations

import dataclasses

from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry

_MULTIPROCESSORS = 132
"""Of an H100 or H200. Others are not far from it, and a plan for the wrong number is only somewhat slower."""


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


def forward(batch: int, length: int, channels: int, groups: int, state: int) -> Plan:
    """Plan of the forward kernel.

    Args:
        batch: size of the batch.
        length: tokens of a sequence.
        channels: channels of all groups, as padded by ``padded_channels``.
        groups: groups of channels.
        state: states of a channel, as padded by ``padded_state``.
    """
    geometries = _geometries(state, unroll=4)
    geometry, single = _largest_that_fits(channels // groups, geometries), geometries[-1]
    num_blocks = batch * channels // geometry.channels
    if 4 * batch * channels // single.channels < 3 * _MULTIPROCESSORS:
        # A quarter of the GPU would have nothing to do: then it pays to read the input twice.
        num_chunks = -(-length // geometry.steps)
        return Plan(geometry, max(min(8 * _MULTIPROCESSORS // num_blocks, num_chunks // 8), 1))
    if num_blocks >= 4 * _MULTIPROCESSORS:
        return Plan(geometry, 1)
    # Too few blocks to share them out evenly: rather more of half the size, with longer chunks where shared memory has
    # room for them.
    return Plan(dataclasses.replace(single, steps=32 if state <= 32 else 16), 1)


def backward(batch: int, length: int, channels: int, groups: int, state: int) -> Plan:
    """Plan of the backward kernel; the arguments are those of ``forward``."""
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
