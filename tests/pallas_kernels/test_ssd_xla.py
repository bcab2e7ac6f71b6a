"""What the XLA implementation of the SSD operator promises beyond its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import ssd


def temporary_bytes(*, head_dim, state):
    """Memory that a gradient needs besides its inputs and outputs, at 4 heads and a length of 2048 in chunks of 64."""
    x = jax.ShapeDtypeStruct((1, 2048, 4, head_dim), jnp.float32)
    B = jax.ShapeDtypeStruct((1, 2048, 1, state), jnp.float32)
    delta, A = jax.ShapeDtypeStruct((1, 2048, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)

    def energy(x, delta, A, B, C):
        return jnp.sum(ssd(x, delta, A, B, C, implementation="xla", chunk_size=64) ** 2)

    compiled = jax.jit(jax.grad(energy, argnums=(0, 1, 2, 3, 4))).lower(x, delta, A, B, B).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_states_of_all_tokens_are_never_in_memory():
    growth = temporary_bytes(head_dim=64, state=64) - temporary_bytes(head_dim=64, state=32)
    assert growth < 0.05 * (4 * 2048 * 4 * 64 * 32)


def test_weights_of_all_chunks_are_never_in_memory_together():
    weights = 4 * 2048 * 4 * 64
    assert temporary_bytes(head_dim=1, state=1) < 0.5 * weights


def test_sums_of_low_precision_products_are_exact():
    # 301 is a sum that bfloat16 cannot hold.
    ones = jnp.ones((1, 301, 1, 1), jnp.bfloat16)
    _, state = ssd(
        ones, ones[..., 0], jnp.zeros(1), ones, ones, return_final_state=True, chunk_size=301, implementation="xla"
    )
    assert state.item() == 301
