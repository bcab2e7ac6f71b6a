"""Counted costs against what XLA counts in the compiled operators."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import causal_conv1d, gated_rms_norm, selective_scan, ssd, trapezoidal_ssd
from pallas_kernels.causal_conv1d import flops as conv_flops
from pallas_kernels.gated_rms_norm import flops as norm_flops
from pallas_kernels.selective_scan import flops as scan_flops
from pallas_kernels.ssd import flops as ssd_flops
from pallas_kernels.trapezoidal_ssd import flops as trapezoidal_ssd_flops
from pallas_kernels.trapezoidal_ssd.rotation import rotate, turn_by

BATCH, CHANNELS = 2, 64


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(function).lower(*arrays).compile().cost_analysis()
    return analysis["flops"], analysis.get("transcendentals", 0)


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


def test_products_of_ssd():
    length, heads, head_dim, state = 32, 3, 8, 16

    def through_a_state(x, B, C):
        return jnp.einsum("tn,hpn->thp", C, jnp.einsum("thp,tn->hpn", x, B))

    def gradients(x, B, C, dy):
        return jax.vjp(through_a_state, x, B, C)[1](dy)

    sizes = length, heads, head_dim, state
    of_heads, matrix = (length, heads, head_dim), (length, state)
    assert ssd_flops.forward_products(1, *sizes) == counted(through_a_state, of_heads, matrix, matrix)[0]
    assert ssd_flops.backward_products(1, *sizes) == counted(gradients, of_heads, matrix, matrix, of_heads)[0]
    assert trapezoidal_ssd_flops.forward_products(1, *sizes, rank=4) == 4 * ssd_flops.forward_products(1, *sizes)
    assert trapezoidal_ssd_flops.backward_products(1, *sizes, rank=4) == 4 * ssd_flops.backward_products(1, *sizes)


def trapezoidal_token(h, angle, x, z, delta, A, lambda_, for_next, B, C, theta, D, delta_bias, biases, mimo):
    """A token with one update of the state, which holds already what the token before would add now."""
    delta = jax.nn.softplus(delta + delta_bias)
    angle = angle + delta[..., None] * theta[:, None]
    turn = turn_by(angle[..., None, :])
    B, C = (rotate(matrix + bias, turn) for matrix, bias in zip((B, C), biases, strict=True))
    x, z = x[..., None, :], None if z is None else z[..., None, :]
    if mimo is not None:
        x, z = x * mimo[0], None if z is None else z * mimo[1]
    own = lambda_ * delta
    weighted = (own + for_next)[..., None, None] * x
    update = jnp.sum(weighted[..., None] * B[..., None, :], axis=2)
    h = jnp.exp(delta * A)[..., None, None] * h + update
    y = jnp.einsum("bhpn,bhrn->bhrp", h, C)
    y = y - jnp.einsum("bhri,bhip->bhrp", for_next[..., None, None] * jnp.einsum("bhrn,bhin->bhri", C, B), x)
    y = y + D[:, None, None] * x
    if z is not None:
        y = y * (z * jax.nn.sigmoid(z))
    return (y[:, :, 0] if mimo is None else jnp.sum(y * mimo[2], axis=2)), h, angle, (1 - lambda_) * delta


@pytest.mark.parametrize("state", [16, 64])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_trapezoidal_ssd(gated, rank, state):
    heads, head_dim, pairs = 4, 16, state // 4
    per_token, per_head = (BATCH, heads, head_dim), (BATCH, heads)
    matrix = (BATCH, 1, rank, state)
    shapes = (
        (BATCH, heads, head_dim, state), (BATCH, heads, pairs), per_token, per_token if gated else None, per_head,
        per_head, per_head, per_head, matrix, matrix, (BATCH, pairs), (heads,), (heads,), (2, heads, rank, state),
        None if rank == 1 else (3, heads, rank, head_dim),
    )  # fmt: skip
    arrays = [None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    # Not compiled: a fusion may compute what it needs twice.
    analysis = jax.jit(trapezoidal_token).lower(*arrays).cost_analysis()
    options = {"pairs": pairs, "rank": rank, "gated": gated}
    count = trapezoidal_ssd_flops.forward(BATCH, 1, heads, head_dim, state, **options)
    assert count == pytest.approx(analysis["flops"], rel=0.1)

    x, z, B, biases = ((shape[0], 1, *shape[1:]) for shape in (per_token, per_token, matrix, per_head))
    operands = (x, biases, biases, B, B, biases, (BATCH, 1, pairs), (heads,), z if gated else None, (heads,))

    def operator(*arrays):
        return trapezoidal_ssd.trapezoidal_ssd(
            *arrays[:-1], delta_bias=arrays[-1], delta_softplus=True, implementation="reference"
        )

    arrays = [None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in operands]
    exponentials = jax.jit(operator).lower(*arrays).cost_analysis()["transcendentals"]
    assert trapezoidal_ssd_flops.exponentials(BATCH, 1, heads, head_dim, **options) == exponentials


def test_causal_conv1d():
    def convolve(x, weight, bias):
        return causal_conv1d.causal_conv1d(x, weight, bias, activation="silu", implementation="xla")

    flops, exponentials = counted(convolve, (BATCH, 100, CHANNELS), (4, CHANNELS), (CHANNELS,))
    assert conv_flops.forward(BATCH, 100, CHANNELS, 4) == pytest.approx(flops, rel=0.1)
    assert conv_flops.exponentials(BATCH, 100, CHANNELS) == exponentials


def test_gated_rms_norm():
    per_token, sizes = (BATCH, 10, 4, 16), (BATCH, 10, 4, 16)

    def norm(x, z, weight):
        return gated_rms_norm.gated_rms_norm(x, z, weight, implementation="reference")

    def gradients(x, z, weight, dy):
        return jax.vjp(norm, x, z, weight)[1](dy)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (per_token, per_token, per_token[2:], per_token)]
    # Not compiled: a fusion may compute what it needs twice.
    forward, backward = (jax.jit(f).lower(*a).cost_analysis() for f, a in ((norm, arrays[:3]), (gradients, arrays)))
    assert norm_flops.forward(*sizes) == pytest.approx(forward["flops"], rel=0.05)
    assert norm_flops.backward(*sizes) == pytest.approx(backward["flops"], rel=0.15)
    # XLA counts a root a head as well.
    roots = BATCH * 10 * 4
    assert norm_flops.exponentials(*sizes) == forward["transcendentals"] - roots == backward["transcendentals"] - roots


def test_bytes_are_those_of_the_arrays_read_and_written():
    # KERNELS: (8, 2048, 5120, 16) moves 671 MB of x, delta, z and y in bfloat16.
    moved = scan_flops.forward_bytes(8, 2048, 5120, 16, itemsize=2)
    assert moved == pytest.approx(671e6, rel=0.01)
    assert scan_flops.backward_bytes(8, 2048, 5120, 16, itemsize=2) == pytest.approx(7 / 4 * 671e6, rel=0.01)
    assert conv_flops.forward_bytes(8, 2048, 5120, itemsize=2) == pytest.approx(671e6 / 2, rel=0.01)
    assert conv_flops.backward_bytes(8, 2048, 5120, itemsize=2) == pytest.approx(671e6 * 3 / 4, rel=0.01)
    assert norm_flops.forward_bytes(8, 2048, 80, 64, itemsize=2) == pytest.approx(3 / 4 * 671e6, rel=0.01)
    assert norm_flops.backward_bytes(8, 2048, 80, 64, itemsize=2) == pytest.approx(5 / 4 * 671e6, rel=0.01)
    # KERNELS: (8, 2048, 80 heads of 64, 1 group, state 128) moves 335 MB of x and y. The rest is little.
    assert 1 < ssd_flops.forward_bytes(8, 2048, 80, 64, 128, itemsize=2) / 335e6 < 1.1
    assert 3 / 2 < ssd_flops.backward_bytes(8, 2048, 80, 64, 128, itemsize=2) / 335e6 < 1.6
    # The same shape for Mamba-3: z as well, and a scalar or two a head.
    moved = trapezoidal_ssd_flops.forward_bytes(8, 2048, 80, 64, 128, pairs=32, itemsize=2)
    assert 3 / 2 < moved / 335e6 < 1.7
    ungated = trapezoidal_ssd_flops.forward_bytes(8, 2048, 80, 64, 128, pairs=32, itemsize=2, gated=False)
    assert 2 * (moved - ungated) == pytest.approx(335e6, rel=0.01)
