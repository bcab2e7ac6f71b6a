"""Token embeddings, which may double as the output layer."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba_jax import sharding


class Embedding(nnx.Module):
    """A vector for each token of a vocabulary, float32 of shape (vocabulary, width)."""

    def __init__(self, vocab_size: int, width: int, *, weight_init: Initializer, rngs: nnx.Rngs):
        shape = (vocab_size, width)
        out_sharding = sharding.out_sharding(*sharding.partition_spec(shape, (sharding.TENSOR, sharding.FSDP)))
        self.weight = nnx.Param(weight_init(rngs.params(), shape, jnp.float32, out_sharding=out_sharding))

    def __call__(self, tokens: Int[Array, "*batch"], dtype: DTypeLike) -> Float[Array, "*batch width"]:
        """Looks tokens up; the vectors are sharded as the tokens are."""
        # A lookup in a table sharded over the vocabulary would need a sum over the mesh: cheaper to gather the table.
        # Rounding after the lookup, not before, keeps the sum of the gradients of a frequent token in float32.
        table = sharding.reshard(self.weight[...], (None, None))
        out_sharding = sharding.out_sharding(*sharding.spec_of(tokens), None)
        return table.at[tokens].get(out_sharding=out_sharding).astype(dtype)

    def output_weight(self, dtype: DTypeLike) -> Float[Array, "width vocabulary"]:
        """The table as the weight of an output layer, sharded over the vocabulary along ``tensor``."""
        return sharding.gather(self.weight[...].astype(dtype)).T
