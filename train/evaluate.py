"""Loss and bits per byte of a model on text it was not trained on."""

from __future__ import annotations

import functools
import itertools
import json
import lzma
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from mamba_jax.models.language_model import LanguageModel
from train.checkpoint import load_for_inference
from train.config import MeshConfig
from train.data import pipeline
from train.data.tokens import Tokens
from train.loss import LossSums
from train.mesh import make_mesh, shard_batch
from train.step import Batch, make_eval_step

_LARGEST_TEXT_FOR_XZ = 1 << 26
"""Bytes of held-out text that are compressed for comparison; more would take minutes."""


def evaluate(
    eval_step: Callable[[LanguageModel, Batch], LossSums],
    model: LanguageModel,
    batches: Iterable[pipeline.Batch],
    tokens: Tokens,
    mesh: Mesh,
    *,
    max_batches: int | None = None,
) -> dict[str, float]:
    """One pass over a split, or over its first ``max_batches`` batches.

    Returns:
        ``eval_loss``, nats a token, and ``eval_bits_per_byte`` of the text those tokens stand for.
    """
    # Summed on the device, so that the next batch need not wait for this one.
    sums = (eval_step(model, shard_batch(mesh, batch)) for batch in itertools.islice(batches, max_batches))
    total = functools.reduce(functools.partial(jax.tree.map, jax.numpy.add), sums)
    nll, weight = float(total.nll), float(total.weight)
    return {"eval_loss": nll / weight, "eval_bits_per_byte": tokens.bits_per_byte(nll, weight)}


def run(checkpoint: Path, *, output: Path | None = None) -> dict[str, int | float]:
    """Evaluates a checkpoint on the whole held-out split of the data it was trained on, and prints the result.

    Args:
        checkpoint: a run's workdir, or the folder of one of its checkpoints.
        output: file to write the result to, as JSON.

    Returns:
        What ``evaluate`` does; ``step``; and ``xz_bits_per_byte``, for comparison, unless the text is large.

    Raises:
        UserError: checkpoint or data cannot be read.
    """
    trained = load_for_inference(checkpoint)
    data = trained.experiment.data
    corpus = pipeline.load(data)
    corpus.require_vocabulary(trained.experiment.model.vocab_size)
    mesh = make_mesh(MeshConfig(data=math.gcd(data.global_batch_size, jax.local_device_count())), jax.local_devices())
    with jax.set_mesh(mesh):
        step, model = trained.restore_model()
        batches = pipeline.held_out_batches(data, corpus.held_out)
        scores = evaluate(make_eval_step(trained.experiment), model, batches, corpus.held_out, mesh)
    result = {"step": step, **scores}
    text = pipeline.held_out_bytes(corpus)
    if len(text) <= _LARGEST_TEXT_FOR_XZ:
        compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
        result["xz_bits_per_byte"] = 8 * len(compressed) / len(text)
    print(
        "  ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items()
        )
    )
    if output is not None:
        output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result
