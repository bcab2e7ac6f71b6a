"""Sums over the lanes that share a channel, several at once.

A sum by shuffles leaves the same number in every lane, after two instructions a lane doubled. Where several sums are
wanted, lanes can share them out instead: of two, each lane keeps one and hands its partner's part of the other over, so
one shuffle does for both. With four lanes a channel, six sums take 5 shuffles in place of 12, 18 instructions of 24.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, arith, interpreted, ir, llvm, plgpu, store, utils, vector
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry


def store_sums(g: Geometry, ref: Any, parts: Sequence[jax.Array]) -> None:
    """Sums arrays over the lanes of each channel and stores the sums side by side.

    Args:
        g: geometry.
        ref: a row of shared memory, (parts · tile_channels,).
        parts: (state_lanes, tile_channels) each: register tiles, already summed over the states of a lane.
    """
    if interpreted():
        store(ref, jnp.concatenate([jnp.sum(part, axis=0) for part in parts]))
        return
    layouts = [g.state_layout.reduce((2,))] * len(parts)
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts))(functools.partial(_store_sums, g))(ref, *parts)


def _store_sums(g: Geometry, _: Any, ref: Any, *parts: Any) -> None:
    word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
    thread = utils.thread_idx()
    lane = arith.andi(thread, utils.c(LANES - 1, word))
    sums = [_only_number(part) for part in parts]
    # Where in the row a lane's sum belongs, which depends on the lane once the sums are shared out.
    places = [utils.c(i * g.tile_channels, word) for i in range(len(parts))]
    channels = LANES // g.state_lanes
    distance = channels
    while distance < LANES:
        is_upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, utils.c(distance, word)), utils.c(0, word))
        halved_sums, halved_places = [], []
        for i in range(0, len(sums) - 1, 2):
            kept, given = arith.select(is_upper, sums[i + 1], sums[i]), arith.select(is_upper, sums[i], sums[i + 1])
            halved_sums.append(arith.addf(kept, utils.shfl_bfly(given, distance)))
            halved_places.append(arith.select(is_upper, places[i + 1], places[i]))
        if len(sums) % 2:
            halved_sums.append(arith.addf(sums[-1], utils.shfl_bfly(sums[-1], distance)))
            halved_places.append(places[-1])
        sums, places = halved_sums, halved_places
        distance *= 2
    warp = arith.remui(arith.shrui(thread, utils.c(5, word)), utils.c(WARPS, word))
    first = arith.muli(warp, utils.c(channels, word))
    channel = arith.addi(first, arith.andi(lane, utils.c(channels - 1, word)))
    row = utils.memref_ptr(ref)
    for total, place in zip(sums, places, strict=True):
        llvm.store(total, utils.getelementptr(row, [arith.addi(place, channel)], number))


def _only_number(part: Any) -> Any:
    """The one number that a lane holds of an array."""
    (register,) = part.registers.flat
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, dynamic_position=[], static_position=[0])
    return register
