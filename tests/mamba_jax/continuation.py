"""What follows a prompt, by reading all of it anew for each token."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.models.language_model import LanguageModel


@jax.jit
def _logits(model: LanguageModel, tokens: jax.Array, last: jax.Array) -> jax.Array:
    return model(tokens)[0][0, last]


def likeliest_next(model: LanguageModel, ids: Sequence[int], room: int) -> int:
    """The token that is likeliest after up to ``room`` others.

    The model reads ``room`` tokens, however many there are: no logit depends on a later token, and one length is
    compiled once.
    """
    tokens = np.zeros((1, room), np.int32)
    tokens[0, : len(ids)] = ids
    return int(jnp.argmax(_logits(model, jnp.asarray(tokens), jnp.asarray(len(ids) - 1))))
