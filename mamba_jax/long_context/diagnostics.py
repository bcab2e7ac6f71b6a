"""How far a layer sees: hidden attention, effective receptive field, cumulative decay, and which channels are global.

Equations are those of the LongMamba paper; hidden attention is from Ali et al. 2024 (arXiv:2403.01590), the effective
receptive field from DeciMamba (Ben-Kish et al. 2024, arXiv:2406.14528). Delta is that after its softplus; a frozen
token has delta 0. Heads of Mamba-2 and Mamba-3 count as channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mamba_jax.long_context.attach import selective_places
from mamba_jax.mixers.selective import Selection, SelectiveMixer
from mamba_jax.models.language_model import LanguageModel

_EXACT = jax.lax.Precision.HIGHEST


def hidden_attention(
    selection: Selection, channels: Int[Array, " chosen"], rows: Int[Array, " rows"] | None = None
) -> Float[Array, "batch chosen rows length *ranks"]:
    """Weight alpha[i, j] of input j in output i (eq. 11), for some channels; zero above the diagonal.

    The rows times the scan's input ``selection.x`` are its output y, without skip connection, norm and gate. With a
    rank R above 1 each weight is a matrix, of R outputs by R inputs. Memory grows with rows times length, once a
    channel chosen.

    Args:
        selection: what a layer's scan sees.
        channels: those to compute.
        rows: outputs i to compute; None for all.
    """
    rows = jnp.arange(selection.delta.shape[1]) if rows is None else rows
    attention = _each_sequence(_attention, selection, channels, rows)
    return attention[..., 0, 0] if selection.rank == 1 else attention


def _attention(scan: _Scan, channels, rows) -> Float[Array, "chosen rows length rank rank"]:
    length, num_channels = scan.step.shape
    rank = scan.B.shape[2]
    causal = rows[:, None] >= jnp.arange(length)

    def of_channel(channel):
        elapsed = jnp.cumsum(scan.step[:, channel])
        between = jnp.where(causal, elapsed[rows, None] - elapsed[None, :], jnp.inf)
        is_own = rows[:, None] == jnp.arange(length)
        weight = jnp.where(is_own, scan.own_weight[:, channel], scan.weight[:, channel])

        def add_rate(attention, of_rate):
            A, B, C = of_rate
            decay = jnp.exp(A * between)[..., None, None]
            return attention + decay * jnp.einsum("irn,jsn->ijrs", C[rows], B, precision=_EXACT), None

        group = channel // (num_channels // scan.B.shape[1])
        of_rates = (scan.A[channel], *(jnp.moveaxis(matrix[:, group], 2, 0) for matrix in (scan.B, scan.C)))
        attention = jnp.zeros((*between.shape, rank, rank))
        return weight[..., None, None] * jax.lax.scan(add_rate, attention, of_rates)[0]

    return jax.lax.map(of_channel, channels)


def last_row_of_attention(selection: Selection) -> Float[Array, "batch length channels *ranks"]:
    """Weight of every input in the last output (the last row of ``hidden_attention``), for all channels.

    Time grows with length·channels·state, memory with length·channels and the size of B.
    """
    row = _each_sequence(_last_row, selection)
    return row[..., 0, 0] if selection.rank == 1 else row


def _last_row(scan: _Scan) -> Float[Array, "length channels rank rank"]:
    num_channels, groups, rank = scan.step.shape[1], *scan.B.shape[1:3]
    # Summed from the end: the tokens that count most, the last ones, are the most exact.
    elapsed_after = jnp.cumsum(scan.step[::-1], axis=0)[::-1] - scan.step

    def add_rate(attention, of_rate):
        A, B, C = of_rate
        products = jnp.einsum("grn,lgsn->lgrs", C, B, precision=_EXACT)
        decay = jnp.exp(A * elapsed_after)[..., None, None]
        return attention + decay * jnp.repeat(products, num_channels // groups, axis=1), None

    of_rates = (scan.A.T, jnp.moveaxis(scan.B, 3, 0), jnp.moveaxis(scan.C[-1], 2, 0))
    attention = jax.lax.scan(add_rate, jnp.zeros((*scan.step.shape, rank, rank)), of_rates)[0]
    weight = scan.weight.at[-1].set(scan.own_weight[-1])
    return weight[..., None, None] * attention


def weight_sizes(attention: Float[Array, "*dims"], rank: int) -> Float[Array, "*sizes"]:
    """Absolute value of each weight; of one that is a matrix, the root of the sum of its squares."""
    if rank == 1:
        return jnp.abs(attention)
    # Divided by the largest first: the squares of weights that are told apart may be no float32 numbers.
    largest = jnp.max(jnp.abs(attention), axis=(-2, -1), keepdims=True)
    ratios = attention / jnp.where(largest > 0, largest, 1)
    return largest[..., 0, 0] * jnp.sqrt(jnp.sum(jnp.square(ratios), axis=(-2, -1)))


def effective_receptive_field(selection: Selection) -> Float[Array, "batch channels"]:
    """Mean distance of the tokens the last one attends to, in tokens (eq. 12 and 13); 0 where it attends to none.

    Weights are those of ``weight_sizes``.
    """
    weight = weight_sizes(last_row_of_attention(selection), selection.rank)
    # Divided by the largest first: the weights of a channel may all be tiny.
    weight = weight / jnp.maximum(jnp.max(weight, axis=1, keepdims=True), jnp.finfo(weight.dtype).tiny)
    distance = jnp.arange(weight.shape[1] - 1, -1, -1, dtype=weight.dtype)
    total = jnp.sum(weight, axis=1)
    return jnp.where(
        total > 0, jnp.einsum("l,blc->bc", distance, weight, precision=_EXACT) / jnp.where(total > 0, total, 1), 0
    )


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
    return _each_sequence(functools.partial(_state_norms, every=every), selection)


def _state_norms(scan: _Scan, every: int) -> Float[Array, "samples channels"]:
    length, num_channels = scan.step.shape
    samples = length // every
    A = scan.A

    def cut(array):
        return array[: samples * every].reshape(samples, every, *array.shape[1:])

    def advance(state, chunk):
        x, step, B, weight, own_weight = chunk
        B = jnp.repeat(B, num_channels // B.shape[1], axis=1)
        elapsed_after = jnp.cumsum(step[::-1], axis=0)[::-1] - step
        left = weight[..., None] * jnp.exp(A * elapsed_after[..., None])
        entered = jnp.einsum("lckrp,lcrkn->cpkn", left[..., None, None] * x[:, :, None], B, precision=_EXACT)
        state = jnp.exp(A * jnp.sum(step, axis=0)[:, None])[:, None, :, None] * state + entered
        # What the last token leaves for the next one's step is not in its state yet.
        for_next = (weight[-1] - own_weight[-1])[:, None, None, None] * jnp.einsum("crp,crkn->cpkn", x[-1], B[-1])
        return state, jnp.linalg.norm((state - for_next).reshape(num_channels, -1), axis=-1)

    state = jnp.zeros((num_channels, scan.x.shape[-1], *scan.B.shape[3:]))
    chunks = jax.tree.map(cut, (scan.x, scan.step, scan.B, scan.weight, scan.own_weight))
    return jax.lax.scan(advance, state, chunks)[1]


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
            ``effective_receptive_field``, rather than collect selections: only one layer's are in memory at a time.

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


class _Scan(NamedTuple):
    """What the scans of all mixers have in common, for one sequence; the state comes apart by its decay rates."""

    x: Float[Array, "length channels rank head_dim"]
    step: Float[Array, "length channels"]
    """What the decay rates are multiplied by."""
    A: Float[Array, "channels rates"]
    B: Float[Array, "length groups rank rates states"]
    C: Float[Array, "length groups rank rates states"]
    weight: Float[Array, "length channels"]
    own_weight: Float[Array, "length channels"]


def _each_sequence(function: Callable[..., Any], selection: Selection, *arguments: Any) -> Any:
    """Applies a function of a ``_Scan`` to each sequence of a selection."""
    delta, A = selection.delta, selection.A
    if A.ndim == 4:  # Each token's own: then what decays is the step times it.
        step, A = -delta * A[..., 0], -jnp.ones((delta.shape[2], 1))
    else:
        step, A = delta, A.reshape(A.shape[0], -1)
    by_rank = (*delta.shape[:2], -1, selection.rank)

    def by_rate(matrix):
        return matrix.astype(jnp.float32).reshape(*by_rank, A.shape[1], matrix.shape[-1] // A.shape[1])

    scan = _Scan(
        x=selection.x.astype(jnp.float32).reshape(*delta.shape, selection.rank, -1),
        step=step,
        A=jnp.broadcast_to(A, (delta.shape[0], *A.shape)),
        B=by_rate(selection.B),
        C=by_rate(selection.C),
        weight=delta if selection.weight is None else selection.weight,
        own_weight=delta if selection.own_weight is None else selection.own_weight,
    )
    return jax.vmap(function, in_axes=(0, *(None,) * len(arguments)))(scan, *arguments)
