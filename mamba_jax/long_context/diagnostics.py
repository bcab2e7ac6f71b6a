"""How far a layer sees: hidden attention, effective receptive field, cumulative decay, and which channels are global.

Equations are those of the LongMamba paper; hidden attention is from Ali et al. 2024 (arXiv:2403.01590), the effective
receptive field from DeciMamba (Ben-Kish et al. 2024, arXiv:2406.14528). All functions take one sequence, with delta
after its softplus; a frozen token has delta 0. Mamba-2's heads count as channels, its A as one number for all states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mamba_jax.long_context.attach import selective_places
from mamba_jax.mixers.selective import Selection, SelectiveMixer
from mamba_jax.models.language_model import LanguageModel
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd


def hidden_attention(
    delta: Float[Array, "length channels"],
    A: Float[Array, "channels *state"],
    B: Float[Array, "length *groups state"],
    C: Float[Array, "length *groups state"],
    channels: Int[Array, " chosen"],
    rows: Int[Array, " rows"] | None = None,
) -> Float[Array, "chosen rows length"]:
    """Weight alpha[i, j] of input j in output i (eq. 11), for some channels; zero above the diagonal.

    The rows times the scan's input x are its output y, without the skip connection D x and the gate. Memory grows with
    rows times length, once a channel chosen.

    Args:
        delta: step sizes.
        A: decay rates.
        B: input matrix.
        C: output matrix.
        channels: those to compute.
        rows: outputs i to compute; None for all.
    """
    num_channels = delta.shape[1]
    A = jnp.broadcast_to(A.reshape(A.shape[0], -1), (A.shape[0], B.shape[-1]))
    rows = jnp.arange(delta.shape[0]) if rows is None else rows
    causal = rows[:, None] >= jnp.arange(delta.shape[0])

    def of_channel(channel):
        elapsed = jnp.cumsum(delta[:, channel])
        between = jnp.where(causal, elapsed[rows, None] - elapsed[None, :], jnp.inf)

        def add_state(attention, state):
            A, B, C = state
            return attention + C[rows, None] * jnp.exp(A * between) * (delta[:, channel] * B)[None, :], None

        of_state = (A[channel], *(_of_channel(matrix, num_channels, channel).T for matrix in (B, C)))
        return jax.lax.scan(add_state, jnp.zeros_like(between), of_state)[0]

    return jax.lax.map(of_channel, channels)


def last_row_of_attention(
    delta: Float[Array, "length channels"],
    A: Float[Array, "channels *state"],
    B: Float[Array, "length *groups state"],
    C: Float[Array, "length *groups state"],
) -> Float[Array, "length channels"]:
    """Weight of every input in the last output (the last row of ``hidden_attention``), for all channels.

    Time grows with length·channels·state, memory with length·channels.
    """
    num_channels = delta.shape[1]
    A = jnp.broadcast_to(A.reshape(A.shape[0], -1), (A.shape[0], B.shape[-1]))
    # Summed from the end: the tokens that count most, the last ones, are the most exact.
    elapsed_after = jnp.cumsum(delta[::-1], axis=0)[::-1] - delta

    def add_state(attention, state):
        A, B, C = state
        B, C = _to_channels(B, num_channels), _to_channels(C, num_channels)
        return attention + C * jnp.exp(A * elapsed_after) * (delta * B), None

    states = (A.T, jnp.moveaxis(B, -1, 0), jnp.moveaxis(C[-1:], -1, 0))
    return jax.lax.scan(add_state, jnp.zeros_like(delta), states)[0]


def effective_receptive_field(
    delta: Float[Array, "length channels"],
    A: Float[Array, "channels *state"],
    B: Float[Array, "length *groups state"],
    C: Float[Array, "length *groups state"],
) -> Float[Array, " channels"]:
    """Mean distance of the tokens the last one attends to, in tokens (eq. 12 and 13); 0 where it attends to none."""
    weight = jnp.abs(last_row_of_attention(delta, A, B, C))
    # Divided by the largest first: the weights of a channel may all be tiny.
    weight = weight / jnp.maximum(jnp.max(weight, axis=0), jnp.finfo(weight.dtype).tiny)
    distance = jnp.arange(delta.shape[0] - 1, -1, -1, dtype=weight.dtype)
    total = jnp.sum(weight, axis=0)
    return jnp.where(total > 0, distance @ weight / jnp.where(total > 0, total, 1), 0)


def log_decay(delta: Float[Array, "*tokens channels"], A: Float[Array, "*rates"]) -> Float[Array, "*tokens channels"]:
    """Natural logarithm of what a token leaves of the state before it: log mean_n exp(delta A_n).

    Kept as a logarithm because the products that channels are told apart by, such as 1e-40, are no float32 numbers.

    Args:
        delta: step sizes.
        A: decay rates, (channels,) or (channels, state); or each token's own, (*tokens, channels, state).
    """
    A = A[:, None] if A.ndim == 1 else A
    return jax.nn.logsumexp(delta[..., None] * A, axis=-1) - math.log(A.shape[-1])


def log_cumulative_decay(
    delta: Float[Array, "length channels"], A: Float[Array, "*rates"]
) -> Float[Array, "length channels"]:
    """Natural logarithm of what is left of the initial state after each token (eq. 14); ``A`` as in ``log_decay``."""
    return jnp.cumsum(log_decay(delta, A), axis=0)


def is_global(
    log_decay: Float[Array | np.ndarray, "*layers channels"], threshold: float
) -> Bool[Array | np.ndarray, "*layers channels"]:
    """Marks channels whose state outlasts a training sequence (eq. 15); all others are local.

    Args:
        log_decay: natural logarithm of the cumulative decay over a sequence of the training length.
        threshold: decay Th, between 0 and 1, above which a channel is global.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold = {threshold} cannot be used: a decay above 0 and below 1, such as 1e-30.")
    return log_decay > math.log(threshold)


def frozen_share(delta: Float[Array, "length channels"]) -> Float[Array, " channels"]:
    """Share of the tokens that leave a channel's state as it is."""
    return jnp.mean(delta == 0, axis=0)


def state_norms(selection: Selection, every: int) -> Float[Array, "batch samples channels"]:
    """Euclidean norm of each channel's, or each head's, state after ``every``, 2 ``every``, … tokens.

    Args:
        selection: what a layer's scan sees; tokens after the last multiple of ``every`` are not looked at.
        every: tokens between two states that are measured.
    """
    batch_size, length = selection.x.shape[:2]
    samples = length // every
    chunks = jax.tree.map(
        lambda array: jnp.moveaxis(
            array[:, : samples * every].reshape(batch_size, samples, every, *array.shape[2:]), 1, 0
        ),
        (selection.x, selection.delta, selection.B, selection.C),
    )
    scan = selective_scan if selection.A.ndim == 2 else ssd

    def advance(state, chunk):
        x, delta, B, C = chunk
        _, state = scan(x, delta, selection.A, B, C, initial_state=state, return_final_state=True)
        return state, jnp.linalg.norm(state.reshape(*state.shape[:2], -1), axis=-1)

    start = jnp.zeros((batch_size, *selection.x.shape[2:], selection.B.shape[-1]), jnp.float32)
    return jnp.moveaxis(jax.lax.scan(advance, start, chunks)[1], 0, 1)


def layers_with_attention(model: LanguageModel) -> list[int]:
    """Numbers, from the bottom, of the layers with a delta whose hidden attention can be computed.

    Not Mamba-3's: there a token's input enters the state at the next token's step too, and a head may have several.
    """

    def selections(model):
        return model.map_mixers(
            lambda mixer, x: mixer.selection(x) if isinstance(mixer, SelectiveMixer) else None,
            jnp.zeros((1, 1), jnp.int32),
        )

    of_places = jax.eval_shape(selections, model)
    has_attention = [selection is not None and selection.B is not None for selection in of_places]
    return [layer for layer in range(model.config.num_layers) if has_attention[layer % len(has_attention)]]


def selection_of_layer(model: LanguageModel, tokens: Int[Array, "batch length"], layer: int) -> Selection:
    """What the scan of one layer sees while the model reads; only the layers below it are run.

    Raises:
        ValueError: there is no such layer, or it has no delta.
    """
    pattern, places = model.config.pattern, selective_places(model)
    if not 0 <= layer < model.config.num_layers or layer % len(pattern) not in places:
        raise ValueError(
            f"layer {layer} cannot be looked into: choose one from 0 to {model.config.num_layers - 1} that has a "
            f"delta, at the places {places} of the pattern {pattern!r}."
        )
    return _selection_of_layer(model, tokens, layer)


@functools.partial(jax.jit, static_argnames="layer")
def _selection_of_layer(model: LanguageModel, tokens, layer: int) -> Selection:
    mixer, x = model.mixer_and_input(tokens, layer)
    return mixer.selection(x)


def collect(
    model: LanguageModel,
    tokens: Int[Array, "batch length"],
    measure: Callable[[Selection], Any] = lambda selection: selection,
) -> dict[int, Any]:
    """Measures every layer that has a delta while the model reads.

    Args:
        model: with an extender or without; the step sizes are those its scans use.
        tokens: what it reads.
        measure: applied to what the scan of a layer sees. At great lengths, measure here what is wanted, such as
            ``lambda s: effective_receptive_field(s.delta[0], s.A, s.B[0], s.C[0])``, rather than collect selections:
            only one layer's are in memory at a time.

    Returns:
        What ``measure`` returned, by number of the layer from the bottom.

    Raises:
        ValueError: no layer has a delta.
    """
    measured = _collect(model, tokens, measure)
    layers = {
        repeat * len(measured) + place: jax.tree.map(lambda stacked, repeat=repeat: stacked[repeat], results)
        for place, results in enumerate(measured)
        if results is not None
        for repeat in range(model.config.repeats)
    }
    if not layers:
        raise ValueError(f"model of pattern {model.config.pattern!r}: no layer has a delta. Use one with Mamba layers.")
    return dict(sorted(layers.items()))


def _collect(model, tokens, measure):
    def of_mixer(mixer, x):
        return measure(mixer.selection(x)) if isinstance(mixer, SelectiveMixer) else None

    return jax.jit(lambda model, tokens: model.map_mixers(of_mixer, tokens))(model, tokens)


def _of_channel(matrix, num_channels, channel):
    """B or C, (length, state) or (length, groups, state), as (length, state) for one channel."""
    return matrix if matrix.ndim == 2 else matrix[:, channel // (num_channels // matrix.shape[1])]


def _to_channels(row, num_channels):
    """One state's row of B or C, (length,) or (length, groups), in a form that broadcasts to (length, channels)."""
    return row[:, None] if row.ndim == 1 else jnp.repeat(row, num_channels // row.shape[1], axis=1)
