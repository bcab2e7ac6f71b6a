"""How a call is cut: as the SSD operator's, but that a block walks with one head, whose B and C are its own."""

from __future__ import annotations

import dataclasses

from pallas_kernels.ssd.mosaic_gpu import plan as ssd_plan
from pallas_kernels.ssd.mosaic_gpu.plan import Plan
from pallas_kernels.trapezoidal_ssd.mosaic_gpu import backward

_BLOCKS = 4 * ssd_plan.MULTIPROCESSORS
"""Of the backward kernel: with two a multiprocessor it takes 5 to 6 % longer."""
_LEAST_HEADS = 12
"""Of such a block: each begins with nothing in shared memory."""

MAX_STATE = 256
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
    stages = min(backward.most_stages(state, pairs), heads // groups)
    # With two chunks in shared memory two blocks share a multiprocessor, of a state of 128.
    walk = (1, 2)
    chosen = ssd_plan.choose(batch, chunks, heads, groups, state)
    splits = max(chosen.splits, _splits(batch * chunks * groups, heads // groups))
    return dataclasses.replace(chosen, forward=walk, states=walk, stages=stages, splits=splits)


def _splits(blocks: int, members: int) -> int:
    """Pieces of a group's heads in the backward kernel: alike as blocks are, some take longer, which many even out."""
    return ssd_plan.divisor(members, at_most=min(_BLOCKS // blocks, members // _LEAST_HEADS))
