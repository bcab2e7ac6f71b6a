"""Text generation: prefill in the parallel form, decode in the recurrent one, with a state of constant size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from mamba_jax import sharding
from mamba_jax.mixers.base import Leaf
from mamba_jax.models.decoder import Decoder
from mamba_jax.models.language_model import LanguageModel

Prompt = Sequence[int] | Integer[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: temperature first, then top_k, then top_p."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from this many most likely tokens; None draws from all."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to at least this (arXiv:1904.09751); None draws from all."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature} cannot be used: 0 (most likely token) or above.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} cannot be used: at least 1, or None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} cannot be used: above 0 and at most 1, or None for all tokens.")


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        model: a language model; under a mesh its parameters may be sharded.
        prompts: token ids, at least one each; lengths may differ and do not affect each other's results.
        max_new_tokens: tokens after which a continuation ends.
        sampling: how tokens are drawn.
        stop_tokens: tokens that end a continuation.
        seed: decides the draws; the draws of a prompt depend on its place in ``prompts``, not on the other prompts.
        prefill_chunk: read prompts this many tokens at a time, so that the memory a prompt takes on the device does not
            grow with its length; None reads the whole at once.

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        ValueError: an empty prompt, or a token beyond the model's vocabulary.
    """
    # All tokens in one compiled loop, so in one part: the host is asked only at the end.
    parts = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seed=seed,
        tokens_at_a_time=max_new_tokens,
        prefill_chunk=prefill_chunk,
    )
    return next(parts, [[] for _ in prompts])


def stream(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    tokens_at_a_time: int = 8,
    prefill_chunk: int | None = None,
) -> Iterator[list[list[int]]]:
    """Like ``generate``, but yields the new tokens of each prompt as they come, ``tokens_at_a_time`` for each of them.

    The tokens do not depend on ``tokens_at_a_time``. A prompt that has met a stop token yields empty lists after it.
    """
    if max_new_tokens < 0 or tokens_at_a_time < 0:
        raise ValueError("max_new_tokens and tokens_at_a_time must be 0 or more.")
    logits, state = prefill_prompts(model, prompts, chunk_size=prefill_chunk)
    stops = jnp.asarray(sorted(stop_tokens), jnp.int32)
    carry = _Decoding(logits, state, finished=jnp.zeros((len(prompts),), bool), position=jnp.zeros((), jnp.int32))
    key = jax.random.key(seed)
    remaining = max_new_tokens
    while remaining > 0:
        count = min(tokens_at_a_time, remaining)
        carry, new_tokens, lengths = _decode(model, carry, key, stops, sampling, count)
        yield [row[:length].tolist() for row, length in zip(np.asarray(new_tokens), np.asarray(lengths), strict=True)]
        remaining -= count
        if np.all(carry.finished):
            return


def prefill_prompts(
    model: LanguageModel, prompts: Sequence[Prompt], *, chunk_size: int | None = None
) -> tuple[Float[Array, "batch vocabulary"], Any]:
    """Logits after the last token of each prompt, and the state there.

    Args:
        model: a language model.
        prompts: token ids, at least one each; lengths may differ.
        chunk_size: tokens of each prompt on the device at a time; None for all.

    Raises:
        ValueError: an empty prompt, a token beyond the model's vocabulary, or a chunk of none.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} cannot be used: at least 1 token, or None for the whole prompt.")
    # Padding changes no result, so lengths are rounded up and few of them are compiled.
    longest = _rounded_up(max(map(len, prompts)))
    if chunk_size is None or longest <= chunk_size:
        tokens, segment_ids = _left_padded(prompts, longest, model.config.vocab_size)
        return prefill(model, _placed(tokens), _placed(segment_ids))
    longest = -(-longest // chunk_size) * chunk_size
    tokens, segment_ids = _left_padded(prompts, longest, model.config.vocab_size)
    # A change between documents that falls between two chunks is one that no chunk can see.
    begins = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    logits: Any = None
    state = model.init_state(len(prompts))
    for first in range(0, longest, chunk_size):
        chunk = np.s_[:, first : first + chunk_size]
        logits, state = continue_prefill(
            model, _placed(tokens[chunk]), _placed(segment_ids[chunk]), state, jnp.asarray(begins[:, first])
        )
    return logits, state


@functools.partial(jax.jit, donate_argnames="state")
def continue_prefill(
    model: LanguageModel,
    tokens: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    state: Any,
    begins: Bool[Array, " batch"],
) -> tuple[Float[Array, "batch vocabulary"], Any]:
    """``prefill`` that goes on from a state, whose memory it reuses; rows that begin a document here forget theirs."""

    def forget(kept, initial):
        return jnp.where(begins.reshape(1, -1, *[1] * (kept.ndim - 2)), initial, kept)

    state = jax.tree.map(forget, state, model.init_state(tokens.shape[0]))
    hidden, state = model.hidden(tokens, state=state, segment_ids=segment_ids)
    return model.logits(hidden[:, -1]), state


@jax.jit
def prefill(
    model: LanguageModel, tokens: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch vocabulary"], Any]:
    """Logits after the last token of each row, and the state there, from the parallel form."""
    hidden, state = model.hidden(tokens, segment_ids=segment_ids)
    return model.logits(hidden[:, -1]), state


def sample(key: PRNGKeyArray, logits: Float[Array, "batch vocabulary"], sampling: Sampling) -> Int[Array, " batch"]:
    """Draws a token for each row, each row with randomness of its own."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = jnp.where(_in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Decoding:
    """Where a batch of continuations stands between two tokens."""

    logits: Leaf
    """Scores of the next token, (batch, vocabulary)."""
    state: Any
    finished: Leaf
    """Rows that have met a stop token, (batch,)."""
    position: Leaf
    """New tokens so far."""


@functools.partial(jax.jit, static_argnames=("sampling", "count"), donate_argnames="decoding")
def _decode(
    model: LanguageModel,
    decoding: _Decoding,
    key: PRNGKeyArray,
    stop_tokens: Int[Array, " stops"],
    sampling: Sampling,
    count: int,
) -> tuple[_Decoding, Int[Array, "batch count"], Int[Array, " batch"]]:
    """Draws up to ``count`` tokens a row; returns them with the number of them that precede a stop token."""
    batch_size = decoding.finished.shape[0]
    decoder = Decoder(model)

    def unfinished(carry):
        i, decoding, _, _ = carry
        return (i < count) & ~jnp.all(decoding.finished)

    def next_token(carry):
        i, decoding, tokens, lengths = carry
        token = sample(jax.random.fold_in(key, decoding.position), decoding.logits, sampling)
        finished = decoding.finished | jnp.any(token[:, None] == stop_tokens, axis=-1)
        logits, state = decoder.step(token, decoding.state)
        decoding = _Decoding(logits, state, finished, decoding.position + 1)
        return i + 1, decoding, tokens.at[:, i].set(token), lengths + ~finished

    start = (
        jnp.zeros((), jnp.int32),
        dataclasses.replace(decoding, state=decoder.split(decoding.state)),
        jnp.zeros((batch_size, count), jnp.int32),
        jnp.zeros((batch_size,), jnp.int32),
    )
    _, decoding, tokens, lengths = jax.lax.while_loop(unfinished, next_token, start)
    return dataclasses.replace(decoding, state=decoder.join(decoding.state)), tokens, lengths


def _in_nucleus(logits: Float[Array, "batch vocabulary"], top_p: float) -> Bool[Array, "batch vocabulary"]:
    """The fewest most likely tokens of each row whose probabilities reach ``top_p``; never none."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return logits >= smallest


def _left_padded(
    prompts: Sequence[Prompt], length: int, vocab_size: int
) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, "batch length"]]:
    """Prompts in one array, ending together, and segment ids that keep the padding out of the state."""
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give it at least one token, such as the tokenizer's separator.")
        ids = np.asarray(prompt)
        beyond = ids[(ids < 0) | (ids >= vocab_size)]
        if beyond.size:
            raise ValueError(
                f"prompt {row} has the token {beyond[0]}, but the model's vocabulary ends at {vocab_size - 1}."
            )
        tokens[row, length - len(ids) :] = ids
        segment_ids[row, length - len(ids) :] = 1
    return tokens, segment_ids


def _placed(rows: Int[np.ndarray, "batch length"]) -> Int[Array, "batch length"]:
    return sharding.reshard(jnp.asarray(rows), (sharding.BATCH, None))


def _rounded_up(length: int) -> int:
    """The next multiple of an eighth of the next power of two: at most an eighth longer, few different results."""
    granularity = max(16, (1 << (length - 1).bit_length()) // 8)
    return -(-length // granularity) * granularity
