"""The GPU kernels fence every exchange through shared memory, and the reader that says so sees where one does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.operators import OPERATORS
from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import launch
from pallas_kernels.ssd.mosaic_gpu import blocks
from tests.pallas_kernels.fences import unfenced

SSD_SHAPE = {"batch": 2, "length": 300, "heads": 6, "head_dim": 64, "groups": 1, "state": 128}
SSD_KERNELS = {f"ssd_{name}" for name in ("pack_tokens", "forward", "states", "backward", "token_gradients")}
TRAPEZOIDAL_KERNELS = {
    *("ssd_pack_tokens", "ssd_states", "ssd_token_gradients"),
    *(f"trapezoidal_ssd_{name}" for name in ("angles", "forward", "backward", "sum_heads")),
}
CASES = {
    "selective_scan": (
        {"batch": 2, "length": 300, "channels": 300, "state": 16},
        {"selective_scan_forward", "selective_scan_summarize_parts", "selective_scan_backward"},
    ),
    "causal_conv1d": (
        {"batch": 2, "length": 300, "channels": 300, "width": 4},
        {"causal_conv1d_forward", "causal_conv1d_backward"},
    ),
    "ssd": (SSD_SHAPE, SSD_KERNELS),
    "ssd of a large state": (SSD_SHAPE | {"state": 256}, SSD_KERNELS | {"ssd_matrix_gradient"}),
    "trapezoidal_ssd": (SSD_SHAPE | {"rank": 1, "pairs": 32}, TRAPEZOIDAL_KERNELS),
    "trapezoidal_ssd of a large state": (SSD_SHAPE | {"state": 256, "rank": 1, "pairs": 96}, TRAPEZOIDAL_KERNELS),
}
"""Shapes, and the kernels of a call and its gradient."""


@pytest.mark.usefixtures("any_hardware")
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_fence_every_exchange(name):
    shape, kernels = CASES[name]
    operator = OPERATORS[name.split()[0]]
    arrays = jax.eval_shape(lambda: operator.make(jax.random.key(0), shape))

    def loss(arrays):
        return jnp.sum(operator.call(arrays, implementation="mosaic_gpu").astype(float))

    # Without a gradient the kernels save nothing, and have fewer fences.
    read, found = unfenced(lambda arrays: (loss(arrays), jax.grad(loss)(arrays)), arrays)
    assert read == kernels
    assert not found


def run(body, *names):
    """Reads a kernel with the shared matrices of these names, and barriers, that can copy to a result."""
    scratch = {name: blocks.operand(64, 64, dtype=jnp.bfloat16) for name in names}
    scratch["barrier"] = plgpu.Barrier(num_arrivals=1)
    result = {"result": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)}

    def call(x):
        return launch("broken", body, {"x": x}, result, scratch, {"block": 1}, warpgroups=2)

    _, found = unfenced(call, jax.ShapeDtypeStruct((64, 64), jnp.bfloat16))
    return {(unfenced.first.kind, unfenced.second.kind) for unfenced in found}


def put(ref, number=1.0, shape=(64, 64)):
    store(ref, plgpu.layout_cast(jnp.full(shape, number, jnp.bfloat16), blocks.LAYOUT))


@pytest.mark.parametrize("fenced", [False, True])
class TestReader:
    def test_matrix_instructions_read_what_was_stored(self, fenced):
        def stores(gmem, smem):
            put(smem["a"])
            plgpu.commit_smem() if fenced else synchronize()
            blocks.product((smem["a"], smem["a"]))

        assert run(stores, "a") == (set() if fenced else {("store", "multiply")})

    def test_copies_read_what_was_stored(self, fenced):
        def copies(gmem, smem):
            put(smem["a"])
            plgpu.commit_smem() if fenced else synchronize()
            plgpu.copy_smem_to_gmem(smem["a"], gmem["result"])
            plgpu.wait_smem_to_gmem(0)

        assert run(copies, "a") == (set() if fenced else {("store", "copy")})

    def test_operands_are_overwritten(self, fenced):
        def overwrites(gmem, smem):
            blocks.product((smem["a"], smem["b"]))
            if fenced:
                synchronize()
            put(smem["b"])

        assert run(overwrites, "a", "b") == (set() if fenced else {("multiply", "store")})

    def test_operands_are_overwritten_in_the_next_round(self, fenced):
        def loops(gmem, smem):
            def step(i, carry):
                put(smem["a"], 2.0)
                plgpu.commit_smem()
                blocks.product((smem["a"], smem["a"]))
                if fenced:
                    synchronize()
                return carry

            lax.fori_loop(0, 5, step, None)

        assert run(loops, "a") == (set() if fenced else {("multiply", "store")})

    def test_what_is_copied_is_overwritten(self, fenced):
        def overwrites(gmem, smem):
            plgpu.copy_smem_to_gmem(smem["a"], gmem["result"])
            plgpu.wait_smem_to_gmem(0) if fenced else plgpu.commit_smem()
            put(smem["a"])

        assert run(overwrites, "a") == (set() if fenced else {("copy", "store")})

    def test_other_lanes_load_what_was_stored(self, fenced):
        def exchanges(gmem, smem):
            put(smem["a"])
            if fenced:
                synchronize()
            blocks.load(smem["a"].at[:, :32])

        assert run(exchanges, "a") == (set() if fenced else {("store", "load")})

    def test_what_other_lanes_load_is_overwritten(self, fenced):
        def exchanges(gmem, smem):
            blocks.load(smem["a"].at[:, :32])
            if fenced:
                synchronize()
            put(smem["a"])

        assert run(exchanges, "a") == (set() if fenced else {("load", "store")})

    def test_another_warpgroup_multiplies_what_was_stored(self, fenced):
        def roles(gmem, smem):
            def make():
                def step(i, carry):
                    put(smem["a"])
                    plgpu.commit_smem() if fenced else synchronize()
                    plgpu.barrier_arrive(smem["barrier"])
                    return carry

                lax.fori_loop(0, 1, step, None)

            def multiply():
                def step(i, carry):
                    plgpu.barrier_wait(smem["barrier"])
                    blocks.product((smem["a"], smem["a"]))
                    return carry

                lax.fori_loop(0, 1, step, None)

            lax.cond(lax.axis_index("warpgroup") == 0, make, multiply)

        assert run(roles, "a") == (set() if fenced else {("store", "arrive")})
