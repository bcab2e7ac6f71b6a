"""The sums that the backward scan writes in instructions, which the interpreter cannot run: on lanes made of NumPy."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from pallas_kernels.selective_scan.mosaic_gpu import lane_sums
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry

THREADS = np.arange(128)
LANE, WARP = THREADS % 32, THREADS // 32


class Machine:
    """A warpgroup: every value is an array of what its 128 lanes hold, and a pointer counts elements."""

    def __init__(self):
        self.stored: dict[int, float] = {}
        self.shuffles = 0

    def install(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {
            "arith": types.SimpleNamespace(
                addf=np.add,
                addi=np.add,
                andi=np.bitwise_and,
                cmpi=lambda predicate, a, b: predicate(a, b),
                muli=np.multiply,
                remui=np.remainder,
                select=np.where,
                shrui=np.right_shift,
                CmpIPredicate=types.SimpleNamespace(ne=np.not_equal),
            ),
            "ir": types.SimpleNamespace(
                F32Type=types.SimpleNamespace(get=lambda: "f32"),
                IntegerType=types.SimpleNamespace(get_signless=str),
                VectorType=type(None),
            ),
            "llvm": types.SimpleNamespace(store=self.store),
            "utils": types.SimpleNamespace(
                c=lambda value, _: np.full(128, value),
                getelementptr=lambda pointer, index, _: pointer + index[0],
                memref_ptr=lambda _: np.zeros(128, int),
                shfl_bfly=self.shuffle,
                thread_idx=lambda: THREADS,
            ),
        }
        for name, value in names.items():
            monkeypatch.setattr(module, name, value, raising=False)

    def store(self, values: np.ndarray, places: np.ndarray) -> None:
        for value, place in zip(values, places, strict=True):
            assert self.stored.setdefault(int(place), value) == value, "two lanes store different numbers"

    def shuffle(self, values: np.ndarray, distance: int) -> np.ndarray:
        self.shuffles += 1
        return values[THREADS ^ distance]


@pytest.mark.parametrize("state", [4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_sums_over_lanes_are_shared_out(state, count, monkeypatch):
    g = Geometry(state, tiles=1)
    parts = np.random.default_rng(0).integers(-50, 50, (count, g.state_lanes, g.tile_channels))
    machine = Machine()
    machine.install(lane_sums, monkeypatch)
    channels = 32 // g.state_lanes
    registers = [part[LANE // channels, WARP * channels + LANE % channels] for part in parts]
    monkeypatch.setattr(lane_sums, "_only_number", lambda part: part)

    lane_sums._store_sums(g, None, None, *registers)

    np.testing.assert_array_equal([machine.stored[i] for i in range(count * g.tile_channels)], parts.sum(1).reshape(-1))
    assert len(machine.stored) == count * g.tile_channels


def test_six_sums_over_four_lanes_take_five_shuffles(monkeypatch):
    machine = Machine()
    machine.install(lane_sums, monkeypatch)
    monkeypatch.setattr(lane_sums, "_only_number", lambda _: np.zeros(128))
    lane_sums._store_sums(Geometry(16, tiles=1), None, None, *range(6))
    assert machine.shuffles == 5
