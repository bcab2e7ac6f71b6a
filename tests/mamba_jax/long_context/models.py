"""Small models whose layers decide much about each token, so that leaving tokens out shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.mixers.mamba1 import Mamba1Config
from mamba_jax.mixers.mamba2 import Mamba2Config
from mamba_jax.mixers.mamba3 import Mamba3Config
from mamba_jax.models.language_model import LanguageModel, LanguageModelConfig
from tests.mamba_jax.meshes import on_current_mesh

VOCAB_SIZE = 40
TRAINING_LENGTH = 24


LAYERS = {
    "M": Mamba1Config(state_size=3),
    "2": Mamba2Config(state_size=3, head_dim=2, groups=2),
    "3": Mamba3Config(state_size=4, head_dim=2, groups=2),
}


def language_model(seed: int = 0, pattern: str = "M", repeats: int = 2, **layers) -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=VOCAB_SIZE,
        width=12,
        pattern=pattern,
        repeats=repeats,
        layers={**LAYERS, **layers},
        compute_dtype="float32",
    )
    model = config.build(nnx.Rngs(seed))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def on_mesh(model: LanguageModel) -> LanguageModel:
    """The model, sharded over the current mesh as its config says."""
    return on_current_mesh(model, lambda: model.config.build(nnx.Rngs(0)))


def tokens(seed: int, batch_size: int, length: int):
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, VOCAB_SIZE, jnp.int32)
