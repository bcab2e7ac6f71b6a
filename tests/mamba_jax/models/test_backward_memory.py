"""What layers keep for the backward pass, where the GPU kernels are chosen: nothing large in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mamba_jax.layers.norm import RMSNorm
from mamba_jax.models.language_model import LanguageModelConfig
from pallas_kernels import implementation

BATCH, LENGTH, WIDTH = 2, 192, 256
HIDDEN = 2 * WIDTH


def kept(function, *arguments):
    """Types of the arrays that a function keeps for its backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments))


@pytest.mark.usefixtures("any_hardware")
@pytest.mark.parametrize("pattern", ["M", "2", "3"])
def test_no_token_s_channels_are_kept_in_float32(monkeypatch, pattern):
    # As where there is a GPU, the kernels are chosen.
    monkeypatch.setattr(implementation, "backend", lambda: "gpu")
    config = LanguageModelConfig(vocab_size=256, width=WIDTH, pattern=pattern, repeats=1, compute_dtype="bfloat16")
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.zeros((BATCH, LENGTH), jnp.int32)
    arrays = kept(lambda parameters: nnx.merge(graph, parameters, rest)(tokens), parameters)

    def is_of_tokens(array):
        return LENGTH in array.shape and array.size >= BATCH * LENGTH * HIDDEN

    assert any(is_of_tokens(array) and array.dtype == jnp.bfloat16 for array in arrays)
    assert not [array for array in arrays if is_of_tokens(array) and array.dtype == jnp.float32]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_norm_keeps_its_input_alone(dtype):
    graph, weight = nnx.split(RMSNorm(WIDTH))
    arrays = kept(lambda x, weight: nnx.merge(graph, weight)(x), jnp.zeros((BATCH, WIDTH), dtype), weight)
    assert sorted((array.shape, array.dtype.name) for array in arrays) == [
        ((BATCH, WIDTH), dtype),
        ((WIDTH,), "float32"),
    ]
