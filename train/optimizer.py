"""AdamW with its schedule, from optax."""

from __future__ import annotations

import jax
import optax
from flax import nnx
from jaxtyping import PyTree

from train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step of a run of ``steps`` steps: linear warm-up, then the schedule of the config."""
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    after = max(steps - config.warmup_steps, 1)
    decay_steps = min(max(round(steps * config.decay_fraction), 1), after)
    match config.schedule:
        case "cosine":
            main = optax.cosine_decay_schedule(peak, after, config.final_learning_rate_ratio)
        case "wsd":
            main = optax.linear_schedule(peak, final, decay_steps, transition_begin=after - decay_steps)
        case "constant":
            main = optax.constant_schedule(peak)
    # Counted from 1, so that the first update is not lost to a rate of zero.
    warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [config.warmup_steps]) if config.warmup_steps else main


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm and AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def decayed(parameters: PyTree) -> PyTree:
    """True for each parameter that weight decay acts on: all but those made with ``weight_decay=False``."""

    def decays(variable):
        decay = variable.get_metadata().get("weight_decay", True)
        return jax.tree.map(lambda _: decay, variable)

    return jax.tree.map(decays, parameters, is_leaf=lambda x: isinstance(x, nnx.Variable))
