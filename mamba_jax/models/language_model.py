"""A causal language model: embeddings, a stack of mixers in residual blocks, a norm, and an output layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba_jax import initializers, settings, sharding
from mamba_jax.layers.embedding import Embedding
from mamba_jax.layers.linear import Linear
from mamba_jax.layers.norm import RMSNorm
from mamba_jax.mixers import MIXER_CONFIGS, MixerConfig

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass of a block keeps: everything, the results of matrix products, or its input alone."""


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    vocab_size: int = 256
    """Rows of the embedding; at least the tokenizer's vocabulary (256 for bytes), best a multiple of 8."""
    width: int = 256
    """Channels of the residual stream."""
    pattern: str = "M"
    """Layers from bottom to top, a letter of LanguageModel.layers each."""
    repeats: int = 4
    """Times the pattern is stacked; it is compiled once, however often it is repeated."""
    layers: Mapping[str, MixerConfig] = dataclasses.field(
        default_factory=lambda: {letter: config() for letter, config in MIXER_CONFIGS.items()}, hash=False
    )
    """What each letter of the pattern stands for."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in each RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding as the output layer too."""
    residual_in_float32: bool = True
    """Keep the residual stream in float32 rather than in the compute dtype."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of matrix products and activations; parameters and states stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What each block recomputes in the backward pass to save memory: nothing, all but matrix products, everything."""

    def __post_init__(self):
        settings.at_least_one(self, "vocab_size", "width", "repeats")
        unknown = sorted(set(self.pattern) - set(self.layers))
        letters = f"one or more letters of LanguageModel.layers ({', '.join(sorted(self.layers))})"
        lacks = f", which lacks {unknown}" if unknown else ""
        settings.require(bool(self.pattern) and not unknown, self, "pattern", letters + lacks)
        settings.above_zero(self, "norm_epsilon")
        settings.require(self.remat in REMAT_POLICIES, self, "remat", f"one of {', '.join(REMAT_POLICIES)}")

    @property
    def num_layers(self) -> int:
        return len(self.pattern) * self.repeats

    def build(self, rngs: nnx.Rngs) -> LanguageModel:
        """Makes a model with fresh parameters, sharded over the current mesh. Call it under ``jax.jit``."""
        return LanguageModel(self, rngs=rngs)


class Block(nnx.Module):
    """x + mixer(norm(x))."""

    def __init__(self, mixer: MixerConfig, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mixer = mixer.build(
            config.width, num_layers=config.num_layers, compute_dtype=self.compute_dtype, rngs=rngs
        )

    def __call__(self, x, *, state, segment_ids):
        y, state = self.mixer(self.normalise(x), state=state, segment_ids=segment_ids)
        return x + y.astype(x.dtype), state

    def step(self, x, state):
        y, state = self.mixer.step(self.normalise(x), state)
        return x + y.astype(x.dtype), state

    def normalise(self, x):
        """What the mixer sees."""
        return self.norm(x).astype(self.compute_dtype)


class LanguageModel(nnx.Module):
    """Predicts each token from those before it.

    ``hidden`` and ``logits`` are apart so that a loss can turn few tokens into logits at a time; calling the model does
    both. The state of the whole model is a tuple with the stacked state of the blocks at each place of the pattern.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, weight_init=initializers.normal(0.02), rngs=rngs)
        # One stack a place in the pattern: parameters of all repeats in one array, with the repeat as first dimension.
        self.blocks = nnx.List(
            [
                jax.vmap(lambda key, letter=letter: Block(config.layers[letter], config, rngs=nnx.Rngs(key)))(
                    jax.random.split(rngs.params(), config.repeats)
                )
                for letter in config.pattern
            ]
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.head = None if config.tie_embeddings else self._untied_head(rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        state: Any = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length vocabulary"], Any]:
        """Logits (float32) of the token after each one, and the state after the last; see ``mixers.base.Mixer``."""
        hidden, state = self.hidden(tokens, state=state, segment_ids=segment_ids)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        *,
        state: Any = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        unroll: bool = False,
    ) -> tuple[Float[Array, "batch length width"], Any]:
        """What the output layer sees, in the compute dtype, and the state after the last token.

        ``unroll`` compiles every repeat of the pattern by itself instead of a loop over them: what the backward pass
        needs is then used where it is, while a loop copies it into and out of arrays of all repeats. It computes the
        same and compiles longer.
        """
        states = (None,) * len(self.config.pattern) if state is None else state
        x, state = self._repeat_blocks(self.embed(tokens), tuple(self.blocks), states, segment_ids, unroll=unroll)
        return self.output(x), state

    def step(self, token: Int[Array, " batch"], state: Any) -> tuple[Float[Array, "batch vocabulary"], Any]:
        """Logits (float32) of the token after this one, and the new state, in the recurrent form.

        Loops over tokens take ``mamba_jax.models.decoder``, which computes the same in less time.
        """

        def repeat(x, blocks_and_states):
            new_states = []
            for block, block_state in zip(*blocks_and_states, strict=True):
                x, block_state = block.step(x, block_state)
                new_states.append(block_state)
            return x, tuple(new_states)

        x, state = jax.lax.scan(repeat, self.embed(token), (tuple(self.blocks), state))
        return self.logits(self.output(x)), state

    def init_state(self, batch_size: int) -> Any:
        """State before the first token."""
        return tuple(jax.vmap(lambda block: block.mixer.init_state(batch_size))(blocks) for blocks in self.blocks)

    def map_mixers(self, function: Callable[[Any, Any], Any], tokens: Int[Array, "batch length"]) -> tuple[Any, ...]:
        """Runs the model and applies ``function(mixer, x)`` to each mixer and the sequence it sees.

        One layer at a time: what a function returns is all that is kept of it.

        Returns:
            For each place of the pattern, what the function returned there, stacked over the repeats.
        """

        def repeat(x, blocks):
            results = []
            for block in blocks:
                results.append(function(block.mixer, block.normalise(x)))
                x, _ = block(x, state=None, segment_ids=None)
            return x, tuple(results)

        return jax.lax.scan(repeat, self.embed(tokens), tuple(self.blocks))[1]

    def mixer_and_input(self, tokens: Int[Array, "batch length"], layer: int) -> tuple[Any, Any]:
        """The mixer of one layer, counted from the bottom, and the sequence it sees; runs the layers below it."""
        repeat, place = divmod(layer, len(self.config.pattern))
        below = jax.tree.map(lambda stacked: stacked[:repeat], tuple(self.blocks))
        x, _ = self._repeat_blocks(self.embed(tokens), below, (None,) * len(below), None)
        blocks = jax.tree.map(lambda stacked: stacked[repeat], tuple(self.blocks))
        for block in blocks[:place]:
            x, _ = block(x, state=None, segment_ids=None)
        return blocks[place].mixer, blocks[place].normalise(x)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """What the first block sees."""
        return self.embedding(tokens, jnp.float32 if self.config.residual_in_float32 else self._compute_dtype)

    def output(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """What the output layer sees of what comes out of the last block, in the compute dtype."""
        return self.norm(x).astype(self._compute_dtype)

    def logits(
        self, hidden: Float[Array, "*batch width"], weight: Float[Array, "width vocabulary"] | None = None
    ) -> Float[Array, "*batch vocabulary"]:
        """Scores of every token of the vocabulary, float32; ``weight`` is ``output_weight()`` where that is at hand."""
        weight = self.output_weight() if weight is None else weight
        return jnp.einsum(
            "...w,wv->...v",
            hidden,
            weight,
            preferred_element_type=jnp.float32,
            out_sharding=sharding.out_sharding(*sharding.spec_of(hidden)[:-1], sharding.spec_of(weight)[-1]),
        )

    def output_weight(self) -> Float[Array, "width vocabulary"]:
        """Weight of the output layer in the compute dtype, gathered over ``fsdp``."""
        if self.head is None:
            return self.embedding.output_weight(self._compute_dtype)
        return sharding.gather(self.head.weight[...].astype(self._compute_dtype))

    def flops(self, length: int) -> int:
        """Floating-point operations of a forward pass over one sequence, output layer included."""
        one_of_each = jax.eval_shape(lambda blocks: jax.tree.map(lambda stacked: stacked[0], blocks), self.blocks)
        mixers = self.config.repeats * sum(block.mixer.flops(length) for block in one_of_each)
        return mixers + 2 * length * self.config.width * self.config.vocab_size

    @property
    def _compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.compute_dtype)

    def _repeat_blocks(self, x, blocks, states, segment_ids, *, unroll=False):
        """Residual stream and states after stacked blocks, one or more of each place of the pattern."""

        def repeat(x, blocks_and_states):
            new_states = []
            for block, block_state in zip(*blocks_and_states, strict=True):
                x, block_state = block(x, state=block_state, segment_ids=segment_ids)
                new_states.append(block_state)
            return x, tuple(new_states)

        # Jitted, it is lowered once, however often it is repeated.
        repeat = jax.jit(self._checkpointed(repeat, prevent_cse=unroll))
        return jax.lax.scan(repeat, x, (blocks, states), unroll=unroll)

    def _checkpointed(self, repeat, *, prevent_cse):
        if self.config.remat == "none":
            return repeat
        # Inside a loop the compiler cannot merge the recomputation with the forward pass: no need to prevent it.
        return jax.checkpoint(repeat, policy=REMAT_POLICIES[self.config.remat], prevent_cse=prevent_cse)

    def _untied_head(self, rngs: nnx.Rngs) -> Linear:
        config = self.config
        return Linear(
            config.width,
            config.vocab_size,
            axes=(sharding.FSDP, sharding.TENSOR),
            weight_init=initializers.fan_in_uniform(config.width),
            compute_dtype=config.compute_dtype,
            rngs=rngs,
        )


def count_parameters(config: LanguageModelConfig) -> int:
    """Numbers a model with this configuration learns; nothing is computed."""
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(model))
