"""A language model in the recurrent form, prepared for a loop over tokens."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba_jax.layers.linear import Linear
from mamba_jax.models.language_model import LanguageModel

States = list[Any]
"""States of the layers, from bottom to top, each in arrays of its own: there, a loop changes them in place."""


class Decoder:
    """Computes what ``LanguageModel.step`` does, with all that is the same for every token done once.

    Make it outside the loop: it rounds the weights of matrix products to the compute dtype, and takes the layers out
    of the arrays that hold all repeats. The program has every layer by itself, so it compiles longer than a ``step``.
    """

    def __init__(self, model: LanguageModel):
        self._model = _rounded(model)
        self._output_weight = model.output_weight()
        self._layers = _unstack(tuple(self._model.blocks), model.config.repeats)

    def step(self, token: Int[Array, " batch"], states: States) -> tuple[Float[Array, "batch vocabulary"], States]:
        """Logits (float32) of the token after this one, and the new states."""
        # Jitted, layers of one kind are lowered once.
        step = jax.jit(lambda block, x, state: block.step(x, state))
        x, new_states = self._model.embed(token), []
        for block, state in zip(self._layers, states, strict=True):
            x, state = step(block, x, state)
            new_states.append(state)
        return self._model.logits(self._model.output(x), self._output_weight), new_states

    def split(self, state: Any) -> States:
        """States of the layers, from the state of the model."""
        return _unstack(state, self._model.config.repeats)

    def join(self, states: States) -> Any:
        """``split`` undone."""
        places = len(self._model.config.pattern)
        return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[i::places]) for i in range(places))


def _rounded(model: LanguageModel) -> LanguageModel:
    """A copy whose matrix products find their weights in the compute dtype."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, Linear):
            module.round()
    return copy


def _unstack(stacked_by_place: tuple[Any, ...], repeats: int) -> list[Any]:
    """The pattern's places of the first repeat, then of the second, and so on."""
    return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(repeats) for stacked in stacked_by_place]
