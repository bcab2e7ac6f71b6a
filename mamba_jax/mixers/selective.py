"""What mixers with a step size delta share: a place where an extender changes their decay, and what their scans see."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mamba_jax import sharding
from mamba_jax.mixers.base import Leaf, Mixer
from pallas_kernels.segments import segment_starts

FROZEN = -1e4
"""Delta before bias and softplus of a token that leaves the state as it is: the softplus is exactly 0 in float32."""


@runtime_checkable
class Extender(Protocol):
    """Changes a layer's step sizes and decay rates, before the scan, so that its state lasts for more tokens.

    It sees each token with its position and nothing of the other tokens. So a whole prefill, a prefill in chunks and
    decoding token by token give the same result.
    """

    @property
    def A_scale(self) -> Float[Array, ""] | None:
        """Multiplies the decay rates A, and not what enters the state; None leaves them as they are."""
        ...

    def __call__(
        self,
        delta: Float[Array, "batch length channels"],
        bias: Float[Array, " channels"],
        position: Int[Array, "batch length"],
    ) -> Float[Array, "batch length channels"]:
        """Maps step sizes to those the scan uses.

        Args:
            delta: step sizes before bias and softplus.
            bias: added to them before the softplus.
            position: place of each token in its document, from 1.

        Returns:
            Step sizes before bias and softplus, in ``delta``'s dtype; ``FROZEN`` where the token is left out.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """What the scan of a layer sees. ``channels`` are Mamba-2's heads, where all channels of a head share a delta."""

    x: Leaf
    """Input, (batch, length, channels) or (batch, length, heads, head_dim); with a rank R above 1 (Mamba-3), that of
    each rank, (batch, length, heads, R, head_dim)."""
    delta: Leaf
    """Step sizes after extender, bias and softplus, (batch, length, channels) in float32."""
    A: Leaf
    """Decay rates: (channels, state), or (channels,) where one rate is that of the whole state; (batch, length,
    channels, 1) where that rate is each token's own."""
    B: Leaf
    """Input matrix, (batch, length, state) or (batch, length, groups, state), or (batch, length, groups, R, state).
    That of a state that rotates is turned by the angle so far, so that the state need not be."""
    C: Leaf
    """Output matrix, of the same shape as ``B``, and turned like it."""
    weight: Leaf | None = None
    """What each token's input enters the state with, (batch, length, channels); None where that is ``delta``."""
    own_weight: Leaf | None = None
    """What it enters the token's own output with; None where that is ``delta``."""

    @property
    def rank(self) -> int:
        """Inputs and outputs of a channel."""
        return self.B.shape[3] if self.B.ndim == 5 else 1

    def until(self, length: int) -> Selection:
        """What the scan sees of the first ``length`` tokens."""
        first = {
            field.name: value[:, :length]
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None and (field.name != "A" or value.ndim == 4)
        }
        return dataclasses.replace(self, **first)


@runtime_checkable
class SelectiveMixer(Mixer, Protocol):
    """A mixer that steps its state by a delta of each token's own."""

    extender: Extender | None
    """Changes delta and A before the scan; None leaves them as trained."""
    delta_floor: float
    """Least step size that the scan takes, whatever the extender says. Above 0, no token can be left out."""

    def selection(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Any = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Selection:
        """What the scan sees when ``__call__`` is given the same. Its states have the ``position`` of ``extend``."""
        ...


def extend(
    extender: Extender | None,
    delta: Float[Array, "batch length channels"],
    bias: Float[Array, " channels"],
    *,
    position: Int[Array, " batch"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Int[Array, " batch"] | None]:
    """Applies an extender to the next tokens of a sequence.

    Args:
        extender: what to apply; None returns ``delta`` itself, and no position.
        delta: step sizes before bias and softplus.
        bias: added to them before the softplus.
        position: tokens of the document before these; None where they are its first.
        segment_ids: number of the document each token belongs to; the position restarts at each change.

    Returns:
        The changed step sizes, and the position of the last token.
    """
    if extender is None:
        return delta, None
    batch_size, length, _ = delta.shape
    began = _beginnings(batch_size, length, position, segment_ids)
    # The last position by itself: an extender that asks for no other does not pay for them.
    return extender(delta, bias, _positions(began)), length - jnp.max(began, axis=1)


def extended_rates(extender: Extender | None, A: Float[Array, "*rates"]) -> Float[Array, "*rates"]:
    """Decay rates, of channels or of tokens, as an extender changes them; ``A`` itself where it does not."""
    return A if extender is None or extender.A_scale is None else extender.A_scale * A


def init_position(extender: Extender | None, batch_size: int) -> Int[Array, " batch"] | None:
    """Position before the first token, as ``extend`` takes it and a mixer's ``init_state`` keeps it."""
    if extender is None:
        return None
    return sharding.reshard(jnp.zeros((batch_size,), jnp.int32), (sharding.BATCH,))


def document_positions(
    batch_size: int,
    length: int,
    before: Int[Array, " batch"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Int[Array, "batch length"]:
    """Place of each token in its document, from 1.

    Args:
        batch_size: rows.
        length: tokens of each row.
        before: tokens of the first token's document that came earlier; None for none.
        segment_ids: number of the document each token belongs to; None where each row is of one document.
    """
    return _positions(_beginnings(batch_size, length, before, segment_ids))


def _beginnings(batch_size, length, before, segment_ids) -> Int[Array, "batch length"]:
    """The index of each token that begins a document; elsewhere that at which the first one began, perhaps below 0."""
    before = jnp.zeros((batch_size,), jnp.int32) if before is None else before
    began = sharding.reshard(jnp.broadcast_to(-before[:, None], (batch_size, length)), (sharding.BATCH, None))
    if segment_ids is None:
        return began
    # Few integers: brought together, so that running along a sharded sequence needs no exchange of its own.
    starts = segment_starts(sharding.reshard(segment_ids, (sharding.BATCH, None)))
    return jnp.where(starts, jnp.arange(length, dtype=jnp.int32), began)


def _positions(began: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    index = jnp.arange(began.shape[1], dtype=jnp.int32)
    return sharding.reshard(index - jax.lax.cummax(began, axis=1) + 1, (sharding.BATCH, None))
