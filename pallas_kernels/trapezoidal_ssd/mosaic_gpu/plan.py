"""How a call is cut: as the SSD operator's, but that a block walks with one head, whose B and C are its own."""

from __future__ import annotations

import dataclasses

from pallas_kernels.mosaic_gpu_compat import MAX_SHARED_MEMORY
from pallas_kernels.ssd.mosaic_gpu import plan as ssd_plan
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, TOKEN_ROWS
from pallas_kernels.ssd.mosaic_gpu.plan import MULTIPROCESSORS, Plan
from pallas_kernels.trapezoidal_ssd.mosaic_gpu import backward

_SHARED_MEMORY = MAX_SHARED_MEMORY - 2048
"""Bytes of a block, less what barriers and reductions may take."""

MAX_STATE = 192
"""Of one more, the backward kernel's matrices would not fit into shared memory."""


def choose(batch: int, chunks: int, heads: int, groups: int, state: int, pairs: int) -> Plan:
    """Plan of a call.

    Args:
        batch: size of the batch.
        chunks: chunks of a sequence.
        heads: heads of all groups, of ``CHANNELS`` channels each.
        groups: groups of heads.
        state: size of the kernels' state.
        pairs: angles of a head and token.
    """
    once, stage = backward.shared_memory(state, pairs, TOKEN_ROWS + 1)
    stages = min(2, heads // groups, (_SHARED_MEMORY - once) // stage)
    # With two chunks in shared memory two blocks share a multiprocessor, of a state of 128.
    forward = (1, 2)
    chosen = ssd_plan.choose(batch, chunks, heads, groups, state)
    states = _states(batch * heads * chosen.parts, heads // groups, state, pairs)
    return dataclasses.replace(chosen, forward=forward, states=states, stages=stages)


def _states(units: int, members: int, state: int, pairs: int) -> tuple[int, int]:
    """Heads of a block and stages of the kernel that walks for the states.

    Three heads in a block have fewer registers each than one, so that more of them fit on a multiprocessor.

    Args:
        units: heads times batch times parts.
        members: heads of a group.
        state: size of the kernels' state.
        pairs: angles of a head and token.
    """
    heads, stages = 3, 2
    matrix = CHUNK * state * 2
    each = stages * (CHUNK * CHANNELS * 2 + (TOKEN_ROWS + 1) * CHUNK * 4 + CHUNK * pairs * 2) + 2 * matrix + state * 4
    fits = stages * matrix + heads * each <= _SHARED_MEMORY
    return (heads, stages) if fits and members >= heads and units >= 3 * MULTIPROCESSORS else (1, stages)
