"""Counted costs against what XLA counts in the compiled operators."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import causal_conv1d, selective_scan, ssd
from pallas_kernels.causal_conv1d import flops as conv_flops
from pallas_kernels.selective_scan import flops as scan_flops
from pallas_kernels.ssd import flops as ssd_flops

BATCH, CHANNELS = 2, 64


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(function).lower(*arrays).compile().cost_analysis()
    return analysis["flops"], analysis["transcendentals"]


@pytest.mark.parametrize("state", [16, 64])
def test_selective_scan(state):
    # One token, since XLA counts the body of a loop once.
    token, matrix, per_channel = (BATCH, 1, CHANNELS), (BATCH, 1, state), (CHANNELS,)

    def scan(x, delta, A, B, C, D, z, delta_bias, initial_state):
        return selective_scan.selective_scan(
            x, delta, A, B, C, D, z,
            delta_bias=delta_bias, delta_softplus=True, initial_state=initial_state, implementation="reference",
        )  # fmt: skip

    initial_state = (BATCH, CHANNELS, state)
    flops, exponentials = counted(
        scan, token, token, (CHANNELS, state), matrix, matrix, per_channel, token, per_channel, initial_state
    )
    assert scan_flops.forward(BATCH, 1, CHANNELS, state) == pytest.approx(flops, rel=0.1)
    assert scan_flops.exponentials(BATCH, 1, CHANNELS, state) == exponentials


@pytest.mark.parametrize("state", [16, 64])
def test_ssd(state):
    heads, head_dim = 4, 16
    token, per_head, matrix = (BATCH, 1, heads, head_dim), (BATCH, 1, heads), (BATCH, 1, 1, state)

    def run(x, delta, A, B, C, D, delta_bias, initial_state):
        return ssd.ssd(
            x, delta, A, B, C, D,
            delta_bias=delta_bias, delta_softplus=True, initial_state=initial_state, implementation="reference",
        )  # fmt: skip

    initial_state = (BATCH, heads, head_dim, state)
    flops, exponentials = counted(run, token, per_head, (heads,), matrix, matrix, (heads,), (heads,), initial_state)
    assert ssd_flops.forward(BATCH, 1, heads, head_dim, state) == pytest.approx(flops, rel=0.1)
    assert ssd_flops.exponentials(BATCH, 1, heads) == exponentials


def test_causal_conv1d():
    def convolve(x, weight, bias):
        return causal_conv1d.causal_conv1d(x, weight, bias, activation="silu", implementation="xla")

    flops, exponentials = counted(convolve, (BATCH, 100, CHANNELS), (4, CHANNELS), (CHANNELS,))
    assert conv_flops.forward(BATCH, 100, CHANNELS, 4) == pytest.approx(flops, rel=0.1)
    assert conv_flops.exponentials(BATCH, 100, CHANNELS) == exponentials


def test_bytes_are_those_of_the_arrays_read_and_written():
    # KERNELS: (8, 2048, 5120, 16) moves 671 MB of x, delta, z and y in bfloat16.
    moved = scan_flops.forward_bytes(8, 2048, 5120, 16, itemsize=2)
    assert moved == pytest.approx(671e6, rel=0.01)
    assert scan_flops.backward_bytes(8, 2048, 5120, 16, itemsize=2) == pytest.approx(7 / 4 * 671e6, rel=0.01)
    assert conv_flops.forward_bytes(8, 2048, 5120, itemsize=2) == pytest.approx(671e6 / 2, rel=0.01)
    assert conv_flops.backward_bytes(8, 2048, 5120, itemsize=2) == pytest.approx(671e6 * 3 / 4, rel=0.01)
    # KERNELS: (8, 2048, 80 heads of 64, 1 group, state 128) moves 335 MB of x and y. The rest is little.
    assert 1 < ssd_flops.forward_bytes(8, 2048, 80, 64, 128, itemsize=2) / 335e6 < 1.1
    assert 3 / 2 < ssd_flops.backward_bytes(8, 2048, 80, 64, 128, itemsize=2) / 335e6 < 1.6
