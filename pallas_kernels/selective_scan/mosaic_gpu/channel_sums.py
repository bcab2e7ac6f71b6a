"""Sums of dB's and dC's terms over channels, on the tensor cores.

A sum over channels is a matrix product with ones. The instruction multiplies 16 × 16 by 16 × 8 numbers: the left matrix
holds the terms of 16 states and 16 channels, and the right one is all zeros but for a column of ones, a different one
for each step and each of dB and dC, so that the sums of all that a warp takes gather in the columns of one result.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_compat import LANES, WARPS, arith, interpreted, ir, llvm, nvvm, plgpu, utils
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry

_CHANNELS, _STATES = 16, 16
"""Of the left matrix."""


def supported(g: Geometry, dtype: Any) -> bool:
    """Whether terms of this type can be summed this way, here."""
    whole = g.tile_channels % _CHANNELS == 0 and g.state % _STATES == 0
    return dtype == jnp.bfloat16 and whole and g.summed_steps % WARPS == 0 and not interpreted()


def store_sums(g: Geometry, terms: Any, target: Any) -> None:
    """Sums terms over channels.

    Args:
        g: geometry.
        terms: shared memory, (summed_steps, 2, tile_channels, state_lanes, states_per_lane) bfloat16.
        target: device memory, (summed_steps, 2 · state_lanes, states_per_lane), bfloat16 or float32.
    """
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(functools.partial(_store_sums, g))(terms, target)


def _store_sums(g: Geometry, _: Any, terms: Any, target: Any) -> None:
    word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda value: utils.c(value, word)  # noqa: E731
    # Asked for anew each time: registers that kept what follows from it would be too many for three blocks.
    thread = llvm.inline_asm(word, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
    lane = arith.andi(thread, constant(LANES - 1))
    warp = arith.remui(arith.shrui(thread, constant(5)), constant(WARPS))
    steps = g.summed_steps // WARPS
    first_step = arith.muli(warp, constant(steps))

    # Of the four matrices of 8 × 8 that make the left one, lane i names row i % 8 of the i // 8-th.
    channel = arith.addi(arith.andi(lane, constant(7)), arith.shli(arith.shrui(lane, constant(4)), constant(3)))
    state = arith.andi(lane, constant(8))
    of_step = 2 * g.tile_channels * g.state
    offset = arith.addi(arith.muli(channel, constant(g.state)), state)
    offset = arith.addi(offset, arith.muli(first_step, constant(of_step)))
    base = utils.getelementptr(utils.memref_ptr(terms), [offset], ir.BF16Type.get())
    sums = [[utils.c(0.0, number)] * 4 for _ in range(g.state // _STATES)]
    for step in range(steps):
        for slot in range(2):
            column = arith.shrui(lane, constant(2))
            is_column = arith.cmpi(arith.CmpIPredicate.eq, column, constant(2 * step + slot))
            ones = arith.select(is_column, constant(0x3F803F80), constant(0))
            for first in range(0, g.tile_channels, _CHANNELS):
                for i in range(len(sums)):
                    place = step * of_step + (slot * g.tile_channels + first) * g.state + i * _STATES
                    matrix = _load_matrix(utils.getelementptr(base, [place], ir.BF16Type.get()))
                    sums[i] = _multiply_add(matrix, ones, sums[i])

    # Of a result lane i has rows i // 4 and 8 more, and columns 2 (i % 4) and one more: a step's dB and dC.
    strides, _ = ir.MemRefType(target.type).get_strides_and_offset()
    dtype = ir.MemRefType(target.type).element_type
    step = arith.andi(lane, constant(3))
    place = arith.muli(arith.addi(first_step, step), constant(strides[0]))
    place = arith.addi(place, arith.shrui(lane, constant(2)))
    pointer = utils.getelementptr(utils.memref_ptr(target), [place], dtype)
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, step, constant(steps))):
        for i, block in enumerate(sums):
            for j, total in enumerate(block):
                slot, half = j % 2, j // 2
                to = utils.getelementptr(pointer, [slot * g.state + i * _STATES + half * 8], dtype)
                llvm.store(total if dtype == number else arith.truncf(dtype, total), to)


def _load_matrix(pointer: Any) -> list[Any]:
    """Loads and transposes a matrix: four of 8 × 8, of which each lane names a row."""
    word = ir.IntegerType.get_signless(32)
    shape = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m = 8, n = 8>")
    element = nvvm.LdStMatrixEltType.B16
    result = nvvm.ldmatrix(pointer, layout=nvvm.MMALayout.col, num=4, shape=shape, elt_type=element)
    return [llvm.extractvalue(word, result, [i]) for i in range(4)]


def _multiply_add(matrix: list[Any], ones: Any, sums: list[Any]) -> list[Any]:
    """Adds a matrix's sum over its columns to a column of the sums."""
    number = ir.F32Type.get()
    result = llvm.inline_asm(
        llvm.StructType.get_literal([number] * 4),
        [*matrix, ones, *sums],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $8}, "
        "{$9, $10, $11, $12};",
        "=f,=f,=f,=f,r,r,r,r,r,f,f,f,f",
    )
    return [llvm.extractvalue(number, result, [i]) for i in range(4)]
