"""``Decoder`` against ``LanguageModel.step``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.mixers import Mamba1Config, Mamba2Config, Mamba3Config
from mamba_jax.models.decoder import Decoder
from mamba_jax.models.language_model import LanguageModelConfig

BATCH, REPEATS = 2, 3


def build(**changes):
    layers = {
        "M": Mamba1Config(state_size=4),
        "2": Mamba2Config(head_dim=8, state_size=4),
        "3": Mamba3Config(head_dim=8, state_size=4),
    }
    config = LanguageModelConfig(vocab_size=40, width=16, repeats=REPEATS, layers=layers, **changes)
    return config.build(nnx.Rngs(0))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["M", "2", "3", "M2"])
def test_it_computes_what_the_model_s_steps_do(pattern, compute_dtype, tie_embeddings):
    model = build(pattern=pattern, compute_dtype=compute_dtype, tie_embeddings=tie_embeddings)
    tokens = jax.random.randint(jax.random.key(0), (4, BATCH), 0, 40)

    @jax.jit
    def decode(model, token, states):
        return Decoder(model).step(token, states)

    decoder, state = Decoder(model), model.init_state(BATCH)
    states = decoder.split(state)
    step = jax.jit(lambda model, token, state: model.step(token, state))
    for token in tokens:
        got, states = decode(model, token, states)
        want, state = step(model, token, state)
        np.testing.assert_allclose(got, want, rtol=1e-5 if compute_dtype == "float32" else 2e-2, atol=1e-5)
    final = decoder.join(states)
    assert jax.tree.structure(final) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(final), jax.tree.leaves(state), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5 if compute_dtype == "float32" else 2e-2, atol=1e-5)


def test_joining_what_was_split_is_the_state_itself():
    model = build(pattern="M2")
    state = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype), model.init_state(BATCH)
    )
    decoder = Decoder(model)
    assert len(decoder.split(state)) == 2 * REPEATS
    jax.tree.map(np.testing.assert_array_equal, decoder.join(decoder.split(state)), state)


def test_a_step_rounds_no_weight_and_leaves_the_model_as_it_was():
    model = build(pattern="2", compute_dtype="bfloat16")
    before = [leaf.dtype for leaf in jax.tree.leaves(model)]
    decoder = Decoder(model)
    assert [leaf.dtype for leaf in jax.tree.leaves(model)] == before
    states = decoder.split(model.init_state(BATCH))
    program = str(jax.make_jaxpr(decoder.step)(jnp.zeros((BATCH,), jnp.int32), states))
    # The largest products, in and out of a layer and onto the vocabulary, meet weights that are rounded.
    for shape in ("16,2,4,8", "32,16", "16,40"):
        assert f"bf16[{shape}]" in program
        assert f"f32[{shape}]" not in program
