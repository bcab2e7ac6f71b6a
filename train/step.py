"""One update of the parameters: loss, gradients, optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from mamba_jax import sharding
from mamba_jax.mixers.base import Leaf
from mamba_jax.models.language_model import LanguageModel
from pallas_kernels.implementation import backend
from train.config import Experiment
from train.loss import LossSums, cross_entropy
from train.optimizer import adamw, learning_rate

Batch = dict[str, jax.Array]
"""tokens, targets, segment_ids (int32) and loss_weights (float32), each (batch, length)."""

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes; with the data iterator, all that a run is."""

    step: Leaf
    """Batches seen, int32."""
    model: Leaf
    """The language model, its parameters float32."""
    optimizer: optax.OptState
    ema: Leaf
    """Moving average of the parameters, or None."""
    gradient_norm: Leaf
    """Moving average of the norm of the gradient (float32), which spikes are told by."""
    skipped: Leaf
    """Updates skipped so far, int32."""
    skipped_in_row: Leaf
    """Updates skipped since the last one that was not, int32."""

    @property
    def evaluated_model(self) -> LanguageModel:
        """The model that evaluation and generation use."""
        return self.model if self.ema is None else self.ema


def init_state(experiment: Experiment) -> TrainState:
    """State before the first step, decided by the seed alone. Call it under ``jax.jit`` and a mesh."""
    model: PyTree = experiment.model.build(nnx.Rngs(experiment.train.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        optimizer=adamw(experiment.optimizer, experiment.train.steps).init(model),
        ema=None if experiment.train.ema_decay is None else jax.tree.map(jnp.copy, model),
        gradient_norm=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def loss_sums(
    model: LanguageModel, batch: Batch, *, z_loss: float, chunk_size: int, unroll_layers: bool = False
) -> LossSums:
    """Loss of one batch, summed over its tokens."""
    hidden, _ = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"], unroll=unroll_layers)
    return cross_entropy(
        hidden,
        model.output_weight(),
        batch["targets"],
        batch["loss_weights"],
        z_loss=z_loss,
        chunk_size=chunk_size,
    )


def make_train_step(experiment: Experiment) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update; it reuses (donates) the memory of the state it is given."""
    config = experiment.train
    optimizer = adamw(experiment.optimizer, config.steps)
    rate = learning_rate(experiment.optimizer, config.steps)
    unroll_layers = backend() == "gpu" if config.unroll_layers is None else config.unroll_layers

    def objective(model: LanguageModel, batch: Batch) -> tuple[Float[Array, ""], LossSums]:
        sums = loss_sums(model, batch, z_loss=config.z_loss, chunk_size=config.loss_chunk, unroll_layers=unroll_layers)
        return sums.objective, sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, sums = _accumulate(
            lambda part: jax.grad(objective, has_aux=True)(state.model, part),
            state.model,
            batch,
            config.gradient_accumulation,
        )
        tokens = jnp.maximum(sums.weight, 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / tokens, gradients)
        loss, norm = sums.nll / tokens, optax.tree.norm(gradients)
        usable = jnp.isfinite(loss) & jnp.isfinite(norm) & ~_is_spike(norm, state, experiment.optimizer.spike_factor)

        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
        model = optax.apply_updates(state.model, updates)
        updated = TrainState(
            step=state.step,
            model=model,
            optimizer=optimizer_state,
            ema=None
            if config.ema_decay is None
            else optax.incremental_update(model, state.ema, 1.0 - config.ema_decay),
            gradient_norm=jnp.where(state.gradient_norm == 0, norm, 0.98 * state.gradient_norm + 0.02 * norm),
            skipped=state.skipped,
            skipped_in_row=jnp.zeros_like(state.skipped_in_row),
        )
        left_alone = dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_row=state.skipped_in_row + 1)
        new_state = jax.tree.map(lambda new, old: jnp.where(usable, new, old), updated, left_alone)
        new_state = dataclasses.replace(new_state, step=state.step + 1)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(rate(state.step - state.skipped), jnp.float32),
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        return new_state, metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(experiment: Experiment) -> Callable[[LanguageModel, Batch], LossSums]:
    """The jitted loss of a batch, without gradients."""
    return jax.jit(lambda model, batch: loss_sums(model, batch, z_loss=0.0, chunk_size=experiment.train.loss_chunk))


def _is_spike(norm, state: TrainState, factor: float | None):
    if factor is None:
        return jnp.zeros((), bool)
    # Zero until the first update: no history, no spike.
    return (state.gradient_norm > 0) & (norm > factor * state.gradient_norm)


def _accumulate(
    gradients_of: Callable[[Batch], tuple[LanguageModel, LossSums]], model: LanguageModel, batch: Batch, parts: int
) -> tuple[LanguageModel, LossSums]:
    """Sums (gradients, loss sums) over equal parts of the batch, one after the other."""
    if parts == 1:
        return gradients_of(batch)

    def split(x: jax.Array) -> jax.Array:
        # Part i takes every parts-th row, so that each device finds its share of every part at home.
        rows, length = sharding.spec_of(x)
        shape = (x.shape[0] // parts, parts, x.shape[1])
        by_part = jax.lax.reshape(x, shape, out_sharding=sharding.out_sharding(rows, None, length))
        return jnp.swapaxes(by_part, 0, 1)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, gradients_of(part)), None

    zero = jax.tree.map(jnp.zeros_like, model), LossSums(*jnp.zeros((3,), jnp.float32))
    total, _ = jax.lax.scan(add_part, zero, jax.tree.map(split, batch))
    return total
