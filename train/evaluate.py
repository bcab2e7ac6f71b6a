"""Loss and bits per byte of a model on text it was not trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from mamba_jax.models.language_model import LanguageModel
from train.data.pipeline import Batch
from train.data.tokens import Tokens
from train.loss import LossSums
from train.mesh import shard_batch


def evaluate(
    eval_step: Callable[[LanguageModel, dict[str, jax.Array]], LossSums],
    model: LanguageModel,
    batches: Iterable[Batch],
    tokens: Tokens,
    mesh: Mesh,
    *,
    max_batches: int | None = None,
) -> dict[str, float]:
    """One pass over a split, or over its first ``max_batches`` batches.

    Returns:
        ``eval_loss``, nats a token, and ``eval_bits_per_byte`` of the text those tokens stand for.
    """
    total = None
    for batch in itertools.islice(batches, max_batches):
        sums = eval_step(model, shard_batch(mesh, batch))
        # Summed on the device, so that the next batch need not wait for this one.
        total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
    nll, weight = float(total.nll), float(total.weight)
    return {"eval_loss": nll / weight, "eval_bits_per_byte": tokens.bits_per_byte(nll, weight)}
