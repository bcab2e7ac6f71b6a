"""Has a model answer prompts, or tell how likely a text's last tokens are, in memory that lengths do not decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from mamba_jax.generation import Sampling, generate, prefill_prompts
from mamba_jax.models.decoder import Decoder
from mamba_jax.models.language_model import LanguageModel
from train.data.tokenizer import Tokenizer
from train.tasks.example import Example


@dataclasses.dataclass(frozen=True)
class Reading:
    """How prompts are read."""

    chunk: int | None
    """Tokens of a prompt at a time; None for all, where a method needs to see them together."""
    tokens_at_a_time: int
    """Tokens on the device at a time, over the prompts of a batch."""

    def batches[Item](self, items: Sequence[Item], length: int) -> list[list[Item]]:
        """Items of this length in batches of one size, so that one is compiled; the last is filled with its last item.

        What exceeds the items, in order, is to be dropped.
        """
        most = max(1, self.tokens_at_a_time // min(length, self.chunk or length))
        count = -(-len(items) // most)
        size = -(-len(items) // count)
        filled = [*items, *[items[-1]] * (count * size - len(items))]
        return [filled[first : first + size] for first in range(0, len(filled), size)]


def answers(
    model: LanguageModel, examples: Sequence[Example], tokenizer: Tokenizer, reading: Reading, *, max_new_tokens: int
) -> list[str]:
    """What the model says to each prompt, always taking the likeliest token, up to the separator."""
    texts: list[str] = []
    for batch in reading.batches(examples, max(example.length for example in examples)):
        rows = generate(
            model,
            [example.prompt for example in batch],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.0),
            stop_tokens=[tokenizer.separator_id],
            prefill_chunk=reading.chunk,
        )
        # Where the model's vocabulary is larger than the tokenizer's, the tokens beyond it stand for nothing.
        texts += [tokenizer.decode([token for token in row if token < tokenizer.vocab_size]) for row in rows]
    return texts[: len(examples)]


def losses_of_last(
    model: LanguageModel, windows: Sequence[Int32[np.ndarray, " length"]], reading: Reading, *, last: int
) -> list[float]:
    """Mean negative log-likelihood, in nats, of the last tokens of each window given all before them.

    Args:
        model: a language model, extended or not.
        windows: tokens, all of one length.
        reading: how to read those before the last.
        last: tokens to be predicted, at the end of each window.
    """
    losses: list[float] = []
    for batch in reading.batches(windows, len(windows[0])):
        logits, state = prefill_prompts(model, [window[:-last] for window in batch], chunk_size=reading.chunk)
        targets = jnp.asarray(np.stack([window[-last:] for window in batch]))
        losses += _loss_of_steps(model, logits, state, targets).tolist()
    return losses[: len(windows)]


@jax.jit
def _loss_of_steps(
    model: LanguageModel, logits: Float[Array, "batch vocabulary"], state: Any, targets: Int[Array, "batch last"]
) -> Float[Array, " batch"]:
    """The targets are decoded, whatever their likelihood: a method that shortens prompts leaves them all in."""
    decoder = Decoder(model)

    def step(carry, target):
        logits, states = carry
        log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=-1)[:, 0]
        return decoder.step(target, states), -log_probability

    _, losses = jax.lax.scan(step, (logits, decoder.split(state)), targets.T)
    return jnp.mean(losses, axis=0)
