"""DeciMamba: some layers leave out all but the tokens with the largest steps, so that those above read less.

From Ben-Kish et al. 2024 (arXiv:2406.14528), where it is defined for one sequence at a time. Here a batch is decimated
row by row, padding first, and the last token always stays, so that there is always something to go on from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from mamba_jax import settings, sharding
from mamba_jax.long_context.attach import require_layers_that_can_freeze, selective_mixers
from mamba_jax.mixers.selective import FROZEN
from mamba_jax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class DeciMambaConfig:
    layers: tuple[int, ...] = (12,)
    """Layers that leave out tokens, by their numbers from the bottom, ascending."""
    base_length: int = 2000
    """Tokens that the first of these layers keeps (the paper's L_base)."""
    beta: float = 0.5
    """Tokens that each of these layers keeps, as a share of what the one before it does."""
    min_length: int = 20
    """Tokens that each of these layers keeps at least."""
    keep_last: int = 1
    """Last tokens that are always kept, such as those whose loss is measured."""

    def __post_init__(self):
        ascending = list(self.layers) == sorted(set(self.layers)) and min(self.layers, default=-1) >= 0
        settings.require(ascending, self, "layers", "one or more, ascending, from 0")
        settings.require(0 < self.beta <= 1, self, "beta", "above 0, at most 1")
        settings.at_least_one(self, "base_length", "min_length", "keep_last")

    def kept(self, layer: int, length: int) -> int:
        """Tokens that this layer passes on, of ``length`` that it sees."""
        if layer not in self.layers:
            return length
        wanted = int(self.base_length * self.beta ** self.layers.index(layer))
        return min(length, max(wanted, self.min_length, self.keep_last))


def apply_decimamba(model: LanguageModel, config: DeciMambaConfig = DeciMambaConfig()) -> DecimatedLanguageModel:
    """A copy of a model, sharing its parameters, whose prefill leaves out tokens; decoding leaves out none.

    Raises:
        ValueError: a layer to decimate is not there, has no delta or cannot leave out tokens, or one has an extender.
    """
    pattern = model.config.pattern
    if config.layers[-1] >= model.config.num_layers:
        raise ValueError(
            f"DeciMamba.layers = {config.layers} cannot be used: the model's layers are 0 to "
            f"{model.config.num_layers - 1}."
        )
    mixers = selective_mixers(model)
    without_delta = [layer for layer in config.layers if layer % len(pattern) not in mixers]
    if without_delta:
        raise ValueError(
            f"layer {without_delta[0]} of a model of pattern {pattern!r} has no delta to choose tokens by: "
            f"choose among the places {list(mixers)} of the pattern."
        )
    require_layers_that_can_freeze(model)
    if any(mixer.extender is not None for mixer in mixers.values()):
        raise ValueError(
            "the model has extenders, which count the tokens of the whole text, but layers above one that leaves out "
            "tokens do not see it: take them out first (without_extenders)."
        )
    return DecimatedLanguageModel(model, config)


class DecimatedLanguageModel(LanguageModel):
    """A language model that leaves out tokens when it is called, and none in ``step``.

    Which tokens stay depends on all of them: a logit before the last is no prediction from the tokens up to it. A token
    that is left out goes no further than the layer that leaves it out, and its logits are those of the residual stream
    there. ``state`` is as without decimation, and a call that is given one decimates its own tokens only.

    In a row with several segments (packed documents, or padding) those of the last token's are kept before all others.
    """

    def __init__(self, model: LanguageModel, decimation: DeciMambaConfig):
        self.config = model.config
        self.embedding = model.embedding
        self.blocks = model.blocks
        self.norm = model.norm
        self.head = model.head
        self.decimation = decimation

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        *,
        state: Any = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        unroll: bool = False,
    ) -> tuple[Float[Array, "batch length width"], Any]:
        x = self.embed(tokens)
        states = (None,) * len(self.config.pattern) if state is None else state
        left: list[tuple[Array, Array]] = []
        new_states = []
        for repeats, decimates in self._runs(tokens.shape[1]):
            blocks, states_of_run = jax.tree.map(
                lambda stacked, run=repeats: stacked[run], (tuple(self.blocks), states)
            )
            if not decimates:
                x, run_states = self._repeat_blocks(x, blocks, states_of_run, segment_ids, unroll=unroll)
            else:
                x, run_states, segment_ids, left_here = self._decimate(
                    repeats.start, x, blocks, states_of_run, segment_ids
                )
                left += left_here
            new_states.append(run_states)
        for before, kept in reversed(left):
            x = _put_back(before, kept, x)
        return self.output(x), jax.tree.map(lambda *runs: jnp.concatenate(runs), *new_states)

    def map_mixers(self, function, tokens):
        raise ValueError(
            "the layers of a decimated model see sequences of different lengths, which cannot be put in one array: "
            "measure the model that it was made of."
        )

    def _runs(self, length: int) -> Iterator[tuple[slice, bool]]:
        """Repeats of the pattern in their order: one in which tokens are left out, or as many without as follow."""
        per_repeat = len(self.config.pattern)
        first = 0
        for repeat in range(self.config.repeats):
            layers = range(repeat * per_repeat, (repeat + 1) * per_repeat)
            if min(self.decimation.kept(layer, length) for layer in layers) < length:
                if first < repeat:
                    yield slice(first, repeat), False
                yield slice(repeat, repeat + 1), True
                first = repeat + 1
                length = min(self.decimation.kept(layer, length) for layer in layers)
        if first < self.config.repeats:
            yield slice(first, self.config.repeats), False

    def _decimate(self, repeat: int, x, blocks, states, segment_ids):
        """One repeat of the pattern, layer by layer; also what it made of tokens before it left some out."""
        left, new_states = [], []
        for place, stacked in enumerate(zip(blocks, states, strict=True)):
            block, state = jax.tree.map(lambda leaf: leaf[0], stacked)
            count = self.decimation.kept(repeat * len(self.config.pattern) + place, x.shape[1])
            if count == x.shape[1]:
                x, state = block(x, state=state, segment_ids=segment_ids)
            else:
                kept = _kept_tokens(block, x, state, segment_ids, count, self.decimation.keep_last)
                x, state = _read_only(block, kept, x, state, segment_ids)
                left.append((x, kept))
                x = _take(x, kept)
                segment_ids = None if segment_ids is None else _take(segment_ids, kept)
            new_states.append(jax.tree.map(lambda leaf: leaf[None], state))
        return x, tuple(new_states), segment_ids, left


class _OnlyKept(nnx.Module):
    """An extender: tokens that are not kept leave the state as it is."""

    A_scale = None

    def __init__(self, kept: Bool[Array, "batch length"]):
        self.kept = nnx.data(kept)

    def __call__(self, delta, bias, position):
        del bias, position
        return jnp.where(self.kept[..., None], delta, jnp.asarray(FROZEN, delta.dtype))


def _kept_tokens(block, x, state, segment_ids, count: int, keep_last: int) -> Int[Array, "batch kept"]:
    """Places, ascending, of ``count`` tokens: the last ones, and those with the largest norm of delta over channels."""
    delta = block.mixer.selection(block.normalise(x), state=state, segment_ids=segment_ids).delta
    importance = sharding.reshard(jnp.sum(jnp.square(delta), axis=-1), (sharding.BATCH, None))
    if segment_ids is not None:
        importance = jnp.where(segment_ids == segment_ids[:, -1:], importance, -1.0)
    importance = importance.at[:, -keep_last:].set(jnp.inf)
    return jnp.sort(jax.lax.top_k(importance, count)[1], axis=1)


def _read_only(block, kept, x, state, segment_ids):
    """The block, with all tokens reading its state and only the kept ones writing to it.

    For them it is the same as to scan them alone, behind the convolution of all tokens.
    """
    block = jax.tree.map(lambda leaf: leaf, block)
    is_kept = jax.vmap(lambda row: jnp.zeros(x.shape[1], bool).at[row].set(True))(kept)
    block.mixer.extender = _OnlyKept(is_kept)
    x, state = block(x, state=state, segment_ids=segment_ids)
    return x, dataclasses.replace(state, position=None)


def _take(rows: Shaped[Array, "batch length ..."], places: Int[Array, "batch kept"]) -> Shaped[Array, "batch kept ..."]:
    return jax.vmap(lambda row, places: row[places])(rows, places)


def _put_back(
    rows: Float[Array, "batch length width"], places: Int[Array, "batch kept"], values: Float[Array, "batch kept width"]
) -> Float[Array, "batch length width"]:
    return jax.vmap(lambda row, places, values: row.at[places].set(values))(rows, places, values)
