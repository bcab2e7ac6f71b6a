"""Random inputs of operators."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


class RandomArrays:
    """Draws what operators take, with numbers that are the same in every run."""

    def __init__(self, *seed: int, dtype: str = "bfloat16") -> None:
        self._random = np.random.default_rng(seed)
        self._dtype = dtype

    def tokens(self, *dims):
        """Standard normal, in the dtype of what changes with every token."""
        return jnp.asarray(self._random.normal(size=dims)).astype(self._dtype)

    def floats(self, *dims):
        """Standard normal in float32."""
        return jnp.asarray(self._random.normal(size=dims), jnp.float32)

    def uniform(self, *dims, least=0.0, largest=1.0):
        """Uniform in float32."""
        return jnp.asarray(self._random.uniform(least, largest, size=dims), jnp.float32)

    def decay_rates(self, *dims, powers):
        """Minus e to a power between these, in float32."""
        return jnp.asarray(-np.exp(self._random.uniform(*powers, size=dims)), jnp.float32)

    def segment_ids(self, batch, length):
        """Up to three documents a sequence."""
        return jnp.asarray(np.sort(self._random.integers(0, 3, size=(batch, length))), jnp.int32)
