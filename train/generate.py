"""Continues texts with a trained model, and prints them as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mamba_jax import generation
from train.checkpoint import load_for_inference
from train.data.tokenizer import tokenizer_from_description
from train.errors import UsageError


def run(
    checkpoint: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> None:
    """Prints each prompt with its continuation; a single one piece by piece, several one after the other.

    Args:
        checkpoint: a run's workdir, or the folder of one of its checkpoints.
        prompts: texts to continue; an empty one begins a text from nothing.
        max_new_tokens: tokens after which a continuation ends, unless the model ends it before.
        temperature: see ``generation.Sampling``.
        top_k: see ``generation.Sampling``.
        top_p: see ``generation.Sampling``.
        seed: decides the draws.
        stop: a continuation ends before the first of these texts in it.

    Raises:
        UserError: the checkpoint cannot be read.
        UsageError: a number is out of its range.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {max_new_tokens}: give at least 1.")
    try:
        sampling = generation.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    trained = load_for_inference(checkpoint)
    tokenizer = tokenizer_from_description(trained.tokenizer)
    _, model = trained.restore_model()
    parts = generation.stream(
        model,
        [[tokenizer.separator_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=[tokenizer.separator_id],
        seed=seed,
    )
    # Where the model's vocabulary is larger than the tokenizer's, the tokens beyond it stand for nothing.
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        tokens = (token for (row,) in parts for token in row if token < tokenizer.vocab_size)
        for piece in until_stop(tokenizer.decode_stream(tokens), stop):
            print(piece, end="", flush=True)
        print()
        return
    rows: list[list[int]] = [[] for _ in prompts]
    for part in parts:
        for row, tokens in zip(rows, part, strict=True):
            row += (token for token in tokens if token < tokenizer.vocab_size)
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), start=1):
        print(f"--- {number}\n{prompt}{''.join(until_stop([tokenizer.decode(row)], stop))}")


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of the pieces up to the first of the ``stop`` texts in it, each part as soon as it is sure to belong."""
    longest = max(map(len, stop), default=0)
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.find(text) for text in stop if text in held]
        if ends:
            yield held[: min(ends)]
            return
        # The last characters may be the beginning of a stop text.
        sure = len(held) - max(longest - 1, 0)
        if sure > 0:
            yield held[:sure]
            held = held[sure:]
    yield held
