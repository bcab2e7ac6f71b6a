"""The contract between a stack of layers and the mixers it is made of."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

Leaf = Any
"""An array in a registered dataclass: functions over pytrees put shapes, shardings and more in its place."""

State = Any
"""A pytree of arrays, all with the batch as their first dimension, whose size does not depend on the length."""


@runtime_checkable
class Mixer(Protocol):
    """Mixes information along a sequence, in two forms that compute the same function.

    Every implementation is an ``nnx.Module`` used as a plain pytree: arrays in ``nnx.Param``, everything else static.
    """

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length width"], State]:
        """Maps a whole sequence in the parallel form.

        Args:
            x: input sequence.
            state: state to start from, as an earlier call returned it; None starts from ``init_state``.
            segment_ids: number of the document each token belongs to. Nothing flows between neighbouring tokens of
                different documents; with a ``state``, the first token continues the document the state ended in.

        Returns:
            The output sequence and the state after its last token.
        """
        ...

    def step(self, x: Float[Array, "batch width"], state: State) -> tuple[Float[Array, "batch width"], State]:
        """Maps one token in the recurrent form; the same function as ``__call__`` on a sequence of length 1."""
        ...

    def init_state(self, batch_size: int) -> State:
        """State before the first token."""
        ...

    def flops(self, length: int) -> int:
        """Floating-point operations of a forward pass over one sequence of this length (a multiply-add counts two)."""
        ...


@runtime_checkable
class MixerConfig(Protocol):
    """Frozen dataclass of a mixer's settings; ``build`` makes the module."""

    def build(self, width: int, *, num_layers: int, compute_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> Mixer:
        """Makes a mixer.

        Args:
            width: channels of the residual stream.
            num_layers: layers of the whole model, which the output projection's initialisation depends on.
            compute_dtype: dtype of matrix products and activations; parameters and states stay float32.
            rngs: source of randomness for the initialisation.
        """
        ...
