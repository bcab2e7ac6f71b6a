"""The sums that the backward scan writes in instructions, which the interpreter cannot run: on lanes made of NumPy."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan.mosaic_gpu import channel_sums, lane_sums
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry

THREADS = np.arange(128)
LANE, WARP = THREADS % 32, THREADS // 32


class Machine:
    """A warpgroup: every value is an array of what its 128 lanes hold, and a pointer counts elements."""

    def __init__(self, shared: np.ndarray):
        self.shared = shared.reshape(-1)
        self.stored: dict[int, float] = {}
        self.active = np.ones(128, bool)
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
                shli=np.left_shift,
                shrui=np.right_shift,
                truncf=lambda _, value: value,
                CmpIPredicate=types.SimpleNamespace(eq=np.equal, ne=np.not_equal, ult=np.less),
            ),
            "ir": types.SimpleNamespace(
                Attribute=types.SimpleNamespace(parse=str),
                BF16Type=types.SimpleNamespace(get=lambda: "bf16"),
                F32Type=types.SimpleNamespace(get=lambda: "f32"),
                IntegerType=types.SimpleNamespace(get_signless=str),
                MemRefType=lambda described: described,
                VectorType=type(None),
            ),
            "llvm": types.SimpleNamespace(
                StructType=types.SimpleNamespace(get_literal=tuple),
                extractvalue=lambda _, values, index: values[index[0]],
                inline_asm=self.assembly,
                store=self.store,
            ),
            "nvvm": types.SimpleNamespace(
                LdStMatrixEltType=types.SimpleNamespace(B16=16),
                MMALayout=types.SimpleNamespace(col="transposed"),
                ldmatrix=self.load_matrices,
            ),
            "utils": types.SimpleNamespace(
                c=lambda value, _: np.full(128, value),
                getelementptr=lambda pointer, index, _: pointer + index[0],
                memref_ptr=lambda _: np.zeros(128, int),
                shfl_bfly=self.shuffle,
                thread_idx=lambda: THREADS,
                when=self.when,
            ),
        }
        for name, value in names.items():
            monkeypatch.setattr(module, name, value, raising=False)

    @contextlib.contextmanager
    def when(self, condition: np.ndarray) -> Iterator[None]:
        self.active = condition
        yield
        self.active = np.ones(128, bool)

    def store(self, values: np.ndarray, places: np.ndarray) -> None:
        for value, place in zip(values[self.active], places[self.active], strict=True):
            assert self.stored.setdefault(int(place), value) == value, "two lanes store different numbers"

    def shuffle(self, values: np.ndarray, distance: int) -> np.ndarray:
        self.shuffles += 1
        return values[THREADS ^ distance]

    def load_matrices(self, rows: np.ndarray, *, num: int, layout: str, **_: Any) -> list[np.ndarray]:
        """ldmatrix.trans: lane i gets column i // 4, rows 2 (i % 4) and one more, of each matrix."""
        assert layout == "transposed"
        loaded = []
        for number in range(num):
            named = rows.reshape(4, 32)[:, 8 * number : 8 * number + 8]
            matrix = self.shared[named[..., None] + np.arange(8)]
            row, column = 2 * (LANE % 4)[:, None] + np.arange(2), (LANE // 4)[:, None]
            loaded.append(matrix[WARP[:, None], row, column])
        return loaded

    def assembly(self, _: Any, operands: Any, text: str, *__: Any, **___: Any) -> Any:
        """mov from %tid.x, and mma.m16n8k16, as PTX lays its matrices out."""
        if "%tid.x" in text:
            return THREADS
        left, right, sums = operands[:4], operands[4], operands[5:]
        row, pair = LANE // 4, 2 * (LANE % 4)
        a, b = np.zeros((4, 16, 16)), np.zeros((4, 16, 8))
        for part, (down, along) in zip(left, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
            for i in range(2):
                a[WARP, row + down, pair + along + i] = part[:, i]
        ones = np.where(right == 0x3F803F80, 1.0, np.where(right == 0, 0.0, np.nan))
        for down in (0, 1, 8, 9):
            b[WARP, pair + down, row] = ones
        product = a @ b
        places = ((0, 0), (0, 1), (8, 0), (8, 1))
        return [
            total + product[WARP, row + down, pair + along] for total, (down, along) in zip(sums, places, strict=True)
        ]


@pytest.mark.parametrize("state", [4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_sums_over_lanes_are_shared_out(state, count, monkeypatch):
    g = Geometry(state, tiles=1)
    parts = np.random.default_rng().integers(-50, 50, (count, g.state_lanes, g.tile_channels))
    machine = Machine(np.zeros(0))
    machine.install(lane_sums, monkeypatch)
    channels = 32 // g.state_lanes
    registers = [part[LANE // channels, WARP * channels + LANE % channels] for part in parts]
    monkeypatch.setattr(lane_sums, "_only_number", lambda part: part)

    lane_sums._store_sums(g, None, None, *registers)

    np.testing.assert_array_equal([machine.stored[i] for i in range(count * g.tile_channels)], parts.sum(1).reshape(-1))
    assert len(machine.stored) == count * g.tile_channels


def test_six_sums_over_four_lanes_take_five_shuffles(monkeypatch):
    machine = Machine(np.zeros(0))
    machine.install(lane_sums, monkeypatch)
    monkeypatch.setattr(lane_sums, "_only_number", lambda _: np.zeros(128))
    lane_sums._store_sums(Geometry(16, tiles=1), None, None, *range(6))
    assert machine.shuffles == 5


@pytest.mark.parametrize("state", [16, 32, 64])
@pytest.mark.parametrize("groups", [1, 3])
def test_sums_over_channels(state, groups, monkeypatch):
    g = Geometry(state, tiles=1)
    assert channel_sums.supported(g, jnp.bfloat16)
    terms = np.random.default_rng().integers(-9, 9, (g.summed_steps, 2, g.tile_channels, state))
    machine = Machine(terms)
    machine.install(channel_sums, monkeypatch)
    stride = groups * 2 * state
    target = types.SimpleNamespace(element_type="bf16", get_strides_and_offset=lambda: ([stride, state, 1], 0))

    channel_sums._store_sums(g, None, None, types.SimpleNamespace(type=target))

    places = stride * np.arange(g.summed_steps)[:, None] + np.arange(2 * state)
    got = [[machine.stored[place] for place in row] for row in places]
    np.testing.assert_array_equal(got, terms.sum(2).reshape(g.summed_steps, -1))
    assert len(machine.stored) == places.size


def test_other_shapes_and_types_are_summed_otherwise():
    assert not channel_sums.supported(Geometry(16, tiles=1), jnp.float32)
    assert not any(channel_sums.supported(Geometry(state, tiles=1), jnp.bfloat16) for state in (4, 8, 128, 256))
