"""What the XLA implementation of the selective scan promises beyond its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selective_scan import selective_scan, xla


def temporary_bytes(state):
    """Memory that a gradient needs besides its inputs and outputs, at a length of 2048."""
    float32 = jnp.float32
    x = jax.ShapeDtypeStruct((2, 2048, 64), float32)
    A = jax.ShapeDtypeStruct((64, state), float32)
    B = jax.ShapeDtypeStruct((2, 2048, state), float32)

    def energy(x, delta, A, B, C):
        return jnp.sum(selective_scan(x, delta, A, B, C, implementation="xla") ** 2)

    compiled = jax.jit(jax.grad(energy, argnums=(0, 1, 2, 3, 4))).lower(x, x, A, B, B).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_states_of_all_tokens_are_never_in_memory():
    growth = temporary_bytes(32) - temporary_bytes(16)
    assert growth < 0.15 * (4 * 2 * 2048 * 64 * 16)


def test_solving_by_associative_scans_gives_the_same(monkeypatch):
    monkeypatch.setattr(xla, "_DEFAULT_CHUNK_SIZES", (8,))
    length = 21
    rng = np.random.default_rng(0)
    x, delta = (jnp.asarray(rng.normal(size=(2, length, 4)), jnp.float32) for _ in range(2))
    B, C = (jnp.asarray(rng.normal(size=(2, length, 3)), jnp.float32) for _ in range(2))
    A = -jnp.asarray(rng.random((4, 3)), jnp.float32)
    segment_ids = jnp.asarray(np.cumsum(rng.random((2, length)) < 0.1, axis=1))

    def run(x, A):
        y = selective_scan(x, delta, A, B, C, delta_softplus=True, segment_ids=segment_ids, implementation="xla")
        return jnp.sum(y**2), y

    results = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(xla, "backend", lambda backend=backend: backend)
        results.append(jax.grad(run, argnums=(0, 1), has_aux=True)(x, A))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)
