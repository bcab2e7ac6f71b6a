"""How a call is cut: heads a block, stages, parts of the length, splits of the heads; docs/ssd_kernels.md measures."""

from __future__ import annotations

import dataclasses

from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, TOKEN_ROWS

_MULTIPROCESSORS = 132
"""Of an H100 or H200. Others are not far from it, and a plan for the wrong number is only somewhat slower."""
_SHARED_MEMORY = 227 * 1024 - 2048
"""Bytes of a block, less what barriers and reductions may take."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers that the kernels leave open."""

    forward: tuple[int, int]
    """Heads that a block walks with in the forward kernel, and chunks in shared memory at once."""
    states: tuple[int, int]
    """The same for the kernel that walks for the states alone."""
    parts: int
    """Pieces of the length that run at the same time, in both; they divide the chunks."""
    stages: int
    """Heads in shared memory at once in the backward kernel."""
    splits: int
    """Pieces of a group's heads that run at the same time there; they divide these heads."""


def choose(batch: int, chunks: int, heads: int, groups: int, state: int) -> Plan:
    """Plan of a call.

    Args:
        batch: size of the batch.
        chunks: chunks of a sequence.
        heads: heads of all groups, of ``CHANNELS`` channels each.
        groups: groups of heads.
        state: size of each channel's state, as padded.
    """
    members = heads // groups
    forward = _walk(batch * heads, members, state, matrices=2, squares=1, masks=1)
    states = _walk(batch * heads, members, state, matrices=1, squares=0, masks=0)
    slots = CHUNK * CHANNELS * 2 * 2 + CHANNELS * state * 2 * 2 + TOKEN_ROWS * CHUNK * 4
    fixed = 2 * CHUNK * state * 2 + 5 * CHUNK * CHUNK * 2
    return Plan(
        forward=forward,
        states=states,
        parts=_parts(batch * heads, chunks),
        stages=max(1, min(3, members, (_SHARED_MEMORY - fixed) // slots)),
        splits=_splits(batch * chunks * groups, members),
    )


def _walk(units: int, members: int, state: int, *, matrices: int, squares: int, masks: int) -> tuple[int, int]:
    """Warpgroups and stages of a kernel that walks over the chunks.

    Args:
        units: heads times batch.
        members: heads of a group.
        state: size of the state.
        matrices: inputs that the warpgroups of a block share.
        squares: buffers of the size of a chunk's x that each warpgroup works with, besides one for a state.
        masks: such buffers of the block.
    """
    most = 3 if state <= 128 else 2
    if units <= 2 * _MULTIPROCESSORS:
        most = 1 if units <= _MULTIPROCESSORS else 2
    square = CHUNK * CHANNELS * 2
    for warpgroups in range(min(most, members), 0, -1):
        for stages in (3, 2):
            shared = stages * matrices * CHUNK * state * 2 + masks * square
            each = stages * (square + TOKEN_ROWS * CHUNK * 4) + CHANNELS * state * 2 + squares * square
            if shared + warpgroups * each <= _SHARED_MEMORY:
                return warpgroups, stages
    raise ValueError(f"no plan for a state of {state}")


def _parts(units: int, chunks: int) -> int:
    """Parts of the length, where the heads are too few to fill the GPU."""
    if 2 * units > _MULTIPROCESSORS:
        return 1
    wanted = max(1, min(3 * _MULTIPROCESSORS // units, chunks // 4))
    return next(parts for parts in range(wanted, 0, -1) if chunks % parts == 0)


def _splits(blocks: int, members: int) -> int:
    """Splits of the heads, where the chunks are too few to fill the GPU."""
    wanted = max(1, min(_MULTIPROCESSORS // blocks, members // 2))
    return next(splits for splits in range(wanted, 0, -1) if members % splits == 0)
