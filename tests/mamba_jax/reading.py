"""A model that reads tokens, compiled once for each length, and what it takes to be likeliest next."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.models.language_model import LanguageModel


@jax.jit
def read(model: LanguageModel, tokens: jax.Array, state=None, segment_ids: jax.Array | None = None):
    """Logits and final state."""
    return model(tokens, state=state, segment_ids=segment_ids)


def likeliest_next(model: LanguageModel, ids: Sequence[int], room: int) -> int:
    """The token that is likeliest after up to ``room`` others.

    The model reads ``room`` tokens, however many there are: no logit depends on a later token, and one length is
    compiled once.
    """
    tokens = np.zeros((1, room), np.int32)
    tokens[0, : len(ids)] = ids
    return int(np.argmax(read(model, jnp.asarray(tokens))[0][0, len(ids) - 1]))
