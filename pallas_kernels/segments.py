"""Boundaries of the documents packed into one sequence."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_starts(segment_ids: Int[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """Marks the tokens whose segment id differs from the token's before; never the first token."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)))
