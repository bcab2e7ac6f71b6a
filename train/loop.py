"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jax.experimental import multihost_utils

from mamba_jax.models.language_model import LanguageModelConfig
from train.checkpoint import Checkpointer
from train.config import ConfigError, Experiment, TrainConfig
from train.data import pipeline
from train.errors import UserError
from train.evaluate import evaluate
from train.mesh import initialize_distributed, make_mesh, shard_batch
from train.metrics import MetricsWriter
from train.step import Metrics, init_state, make_eval_step, make_train_step


def run(experiment: Experiment, workdir: pathlib.Path, *, overwrite: bool = False) -> None:
    """Trains from the newest checkpoint in ``workdir``, or from the start, to the last step.

    Raises:
        UserError: the settings do not fit the data, the devices or the workdir, or training diverged.
    """
    initialize_distributed()
    mesh = make_mesh(experiment.mesh)
    settings, data = experiment.train, experiment.data
    _require_layers_that_fit(experiment.model)
    corpus = pipeline.load(data)
    corpus.require_vocabulary(experiment.model.vocab_size)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    task, seed = experiment.task, settings.seed
    batches = pipeline.train_batches(data, corpus.train, task=task, seed=seed, **process)
    held_out = pipeline.held_out_batches(data, corpus.held_out, task=task, seed=seed, **process)

    with (
        jax.set_mesh(mesh),
        Checkpointer(workdir, experiment, overwrite=overwrite, tokenizer=corpus.tokenizer.describe()) as checkpointer,
        _termination_requests() as is_terminated,
    ):
        initialize = jax.jit(functools.partial(init_state, experiment))
        restored = checkpointer.restore_latest(jax.eval_shape(initialize), batches)
        start, state = restored or (0, initialize())
        train_step, eval_step = make_train_step(experiment), make_eval_step(experiment)
        flops_per_token = 3 * state.model.flops(data.sequence_length) / data.sequence_length

        with MetricsWriter(workdir, experiment.metrics, first_step=start, total_steps=settings.steps) as metrics:
            report = _Report(metrics, experiment, flops_per_token)
            for step in range(start + 1, settings.steps + 1):
                state, step_metrics = train_step(state, shard_batch(mesh, next(batches)))
                report.step(step, step_metrics)

                is_last, stopping = step == settings.steps, is_terminated(step)
                scores = None
                if is_last or step % settings.eval_every == 0:
                    with report.paused():
                        scores = evaluate(
                            eval_step,
                            state.evaluated_model,
                            held_out,
                            corpus.held_out,
                            mesh,
                            max_batches=settings.eval_batches,
                        )
                        metrics.write(step, scores)
                if is_last or stopping or step % experiment.checkpoint.every_steps == 0:
                    with report.paused():
                        checkpointer.save(step, state, batches, scores)
                if stopping and not is_last:
                    checkpointer.wait()
                    metrics.say(f"stopped at step {step} as asked; run the same command again to go on from there.")
                    return
            metrics.finish()


def _require_layers_that_fit(model: LanguageModelConfig) -> None:
    """Raises a ConfigError if a layer cannot have the model's width, which it learns only when it is built."""
    try:
        jax.eval_shape(lambda: model.build(nnx.Rngs(0)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


class _Report:
    """Reads the metrics of each step while the next one runs, and writes those that are due."""

    def __init__(self, metrics: MetricsWriter, experiment: Experiment, flops_per_token: float):
        self._metrics = metrics
        self._settings: TrainConfig = experiment.train
        self._max_skipped = experiment.optimizer.max_skipped
        self._tokens_per_step = experiment.data.global_batch_size * experiment.data.sequence_length
        self._flops_per_token = flops_per_token
        self._pending: tuple[int, Metrics] | None = None
        self._is_compiled = False
        self._restart()

    def step(self, step: int, step_metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched, and reads those of the one before."""
        self._flush()
        self._pending = step, step_metrics

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work that the speed of training does not include; the metrics so far are read before it."""
        self._flush()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, step_metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        self._steps_timed += 1
        if values.pop("skipped_in_row") >= self._max_skipped:
            raise UserError(_diverged(step, self._max_skipped))
        is_due = step in (1, self._settings.steps) or step % self._settings.log_every == 0
        # The first step of a process compiles: it says nothing about speed.
        if is_due and self._is_compiled:
            tokens_per_second = self._steps_timed * self._tokens_per_step / (time.perf_counter() - self._since)
            values |= self._metrics.speed(tokens_per_second, self._flops_per_token)
        if is_due:
            self._metrics.write(step, values)
        if is_due or not self._is_compiled:
            self._restart()
        self._is_compiled = True

    def _restart(self) -> None:
        self._steps_timed = 0
        self._since = time.perf_counter()


def _diverged(step: int, skipped: int) -> str:
    return (
        f"training diverged: at step {step} the last {skipped} updates (Optimizer.max_skipped) had a loss or gradient "
        "that was not finite or spiked, and were skipped. The checkpoints before are intact: lower "
        "Optimizer.learning_rate, lengthen Optimizer.warmup_steps or lower Optimizer.clip_norm in a new workdir."
    )


@contextlib.contextmanager
def _termination_requests() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that says whether the process was asked to end (SIGTERM), as clusters do."""
    if jax.process_count() > 1:
        # All processes must stop at the same step; JAX's coordinator listens for the signal on each of them.
        yield multihost_utils.reached_preemption_sync_point
        return
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield lambda step: requested
    finally:
        signal.signal(signal.SIGTERM, previous)
