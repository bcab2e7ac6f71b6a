"""How a call is cut: heads a block, stages, parts of the length, splits of the heads; docs/ssd_kernels.md measures."""

from __future__ import annotations

import dataclasses

from pallas_kernels.ssd.mosaic_gpu.blocks import AHEAD, CHANNELS, CHUNK, TOKEN_ROWS

MULTIPROCESSORS = 132
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
    """Pieces of the length that run at the same time, in both."""
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
    forward = _forward(members, state)
    parts = _parts(batch * groups * -(-members // forward[0]), chunks)
    states = _walk(batch * heads * parts, members, state)
    slots = CHUNK * CHANNELS * 2 * 2 + CHANNELS * state * 2 * 2 + TOKEN_ROWS * CHUNK * 4
    fixed = 2 * CHUNK * state * 2 + 5 * CHUNK * CHUNK * 2
    return Plan(
        forward=forward,
        states=states,
        parts=parts,
        stages=max(1, min(2, members, (_SHARED_MEMORY - fixed) // slots)),
        splits=_splits(batch * chunks * groups, members),
    )


def _forward(members: int, state: int) -> tuple[int, int]:
    """Heads and stages of the forward kernel."""
    square = CHUNK * CHANNELS * 2
    for heads in (2, 1) if members > 1 and state <= 128 else (1,):
        for stages in (3, 2):
            stage = 2 * CHUNK * state * 2 + heads * (square + TOKEN_ROWS * CHUNK * 4)
            fixed = heads * (AHEAD * (square + 2 * CHUNK * 4) + CHANNELS * state * 2)
            if stages * stage + fixed <= _SHARED_MEMORY:
                return heads, stages
    raise ValueError(f"no plan for a state of {state}")


def _walk(units: int, members: int, state: int) -> tuple[int, int]:
    """Warpgroups and stages of the kernel that walks over the chunks for their states.

    Args:
        units: heads times batch times parts.
        members: heads of a group.
        state: size of the state.
    """
    most = 3 if state <= 128 else 2
    if units <= 2 * MULTIPROCESSORS:
        most = 1 if units <= MULTIPROCESSORS else 2
    for warpgroups in range(min(most, members), 0, -1):
        for stages in (3, 2):
            each = stages * (CHUNK * CHANNELS * 2 + TOKEN_ROWS * CHUNK * 4) + CHANNELS * state * 2
            if stages * CHUNK * state * 2 + warpgroups * each <= _SHARED_MEMORY:
                return warpgroups, stages
    raise ValueError(f"no plan for a state of {state}")


def _parts(blocks: int, chunks: int) -> int:
    """Parts of the length, where the blocks of the forward kernel are too few to fill the GPU."""
    if 2 * blocks > MULTIPROCESSORS:
        return 1
    # Fewer chunks than these are not worth the walk that finds out what each part begins with.
    chunks_per_part = max(-(-chunks * blocks // MULTIPROCESSORS), 4)
    return -(-chunks // chunks_per_part)


def _splits(blocks: int, members: int) -> int:
    """Splits of the heads, where the chunks are too few to fill the GPU."""
    return divisor(members, at_most=min(MULTIPROCESSORS // blocks, members // 2))


def divisor(number: int, *, at_most: int) -> int:
    """The greatest divisor that is at most so large, or 1."""
    return next((found for found in range(at_most, 0, -1) if number % found == 0), 1)
