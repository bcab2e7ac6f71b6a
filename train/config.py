"""What a run is: frozen, validated dataclasses, the only source of truth for every setting.

``train.gin`` binds gin files and ``--gin.NAME=VALUE`` options to these classes. The attribute docstrings below each
field are what ``mamba-jax configs`` prints; keep them to one sentence.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mamba_jax.models.language_model import LanguageModelConfig
from train.errors import UsageError


class ConfigError(UsageError, ValueError):
    """A setting that cannot be used; the message names the setting, its value and what is accepted."""


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r} cannot be used: {accepted}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    """Updates of the parameters in the whole run."""
    seed: int = 0
    """Seed of the initialisation and of the order of the data."""
    gradient_accumulation: int = 1
    """Parts a global batch is split into, one after the other, to save memory; the update is the same."""
    z_loss: float = 0.0
    """Weight of mean(log(sum(exp(logits)))**2), which keeps the logits from drifting (PaLM uses 1e-4)."""
    loss_chunk: int = 2048
    """Tokens a device turns into logits at a time; the logits of a whole batch are never in memory."""
    unroll_layers: bool | None = None
    """Compile every layer by itself instead of a loop over them: faster, but compiles longer; None does so on GPUs."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the parameters, used for evaluation; None keeps no average."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl and on the terminal."""
    eval_every: int = 250
    """Steps between evaluations on the held-out split; the last step is always evaluated."""
    eval_batches: int | None = None
    """Batches of an evaluation, the same ones every time; None evaluates the whole held-out split."""

    def __post_init__(self):
        _require(self.steps >= 1, "Train.steps", self.steps, "at least 1 step")
        _require(0 <= self.seed < 2**32, "Train.seed", self.seed, "an integer from 0 to 2**32 - 1")
        _require(self.gradient_accumulation >= 1, "Train.gradient_accumulation", self.gradient_accumulation, ">= 1")
        _require(self.z_loss >= 0, "Train.z_loss", self.z_loss, "a weight of 0 or more")
        _require(self.loss_chunk >= 1, "Train.loss_chunk", self.loss_chunk, "at least 1 token")
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "Train.ema_decay",
            self.ema_decay,
            "between 0 and 1, or None",
        )
        _require(self.log_every >= 1, "Train.log_every", self.log_every, "at least 1 step")
        _require(self.eval_every >= 1, "Train.eval_every", self.eval_every, "at least 1 step")
        _require(
            self.eval_batches is None or self.eval_batches >= 1,
            "Train.eval_batches",
            self.eval_batches,
            ">= 1, or None",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """'stdlib' (the running Python's own library source, as bytes), or a folder made by 'mamba-jax prepare'."""
    sequence_length: int = 1024
    """Tokens a training example predicts."""
    global_batch_size: int = 32
    """Examples an update sees, over all devices and accumulation steps."""
    read_threads: int = 4
    """Threads that read examples ahead of the training step."""
    prefetch: int = 8
    """Batches kept ready ahead of the training step."""

    def __post_init__(self):
        _require(bool(self.source), "Data.source", self.source, "'stdlib' or a folder made by 'mamba-jax prepare'")
        _require(self.sequence_length >= 1, "Data.sequence_length", self.sequence_length, "at least 1 token")
        _require(self.global_batch_size >= 1, "Data.global_batch_size", self.global_batch_size, "at least 1 example")
        _require(self.read_threads >= 0, "Data.read_threads", self.read_threads, "0 or more threads")
        _require(self.prefetch >= 1, "Data.prefetch", self.prefetch, "at least 1 batch")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    name: Literal["text", "passkey", "document_retrieval"] = "text"
    """What is made of the corpus: 'text' as it is, or prompts with 'passkey' or 'document_retrieval' hidden in it."""
    context_weight: float = 0.0
    """Weight of the loss on each token of a prompt, those of answers having 1; 0 trains on answers alone."""
    shortest_length: int | None = None
    """Half of Data.sequence_length, a quarter, ..., not below this, are drawn as lengths as well; None draws none."""
    curriculum_steps: int = 0
    """Steps in which longer examples join the shortest, length by length; 0 draws all lengths from the start."""
    held_out_examples: int = 128
    """Examples of an evaluation of answers, made of the held-out split."""

    def __post_init__(self):
        _require(self.context_weight >= 0, "Task.context_weight", self.context_weight, "a weight of 0 or more")
        shortest = self.shortest_length
        _require(shortest is None or shortest >= 1, "Task.shortest_length", shortest, "at least 1 token, or None")
        _require(self.curriculum_steps >= 0, "Task.curriculum_steps", self.curriculum_steps, "0 or more steps")
        _require(self.held_out_examples >= 1, "Task.held_out_examples", self.held_out_examples, "at least 1 example")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 6e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: 'cosine' to the final rate, 'wsd' (stable, then a linear decay at the end), or 'constant'."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero; a run of fewer steps stays in it."""
    decay_fraction: float = 0.2
    """Share of the run that the 'wsd' schedule spends decaying, at its end."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    b1: float = 0.9
    """AdamW's decay of the first moment."""
    b2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on A_log, D, the bias of delta, norms and other vectors."""
    clip_norm: float | None = 1.0
    """Global norm that gradients are clipped to; None clips nothing."""
    spike_factor: float | None = None
    """Skip an update whose gradient norm exceeds this many times its running average; None: only non-finite ones."""
    max_skipped: int = 10
    """Skipped updates in a row after which the run stops with an error."""

    def __post_init__(self):
        _require(self.learning_rate > 0, "Optimizer.learning_rate", self.learning_rate, "a rate above 0")
        _require(self.warmup_steps >= 0, "Optimizer.warmup_steps", self.warmup_steps, "0 or more steps")
        _require(0 < self.decay_fraction <= 1, "Optimizer.decay_fraction", self.decay_fraction, "above 0, at most 1")
        ratio = self.final_learning_rate_ratio
        _require(0 <= ratio <= 1, "Optimizer.final_learning_rate_ratio", ratio, "between 0 and 1")
        _require(0 <= self.b1 < 1, "Optimizer.b1", self.b1, "at least 0 and below 1")
        _require(0 <= self.b2 < 1, "Optimizer.b2", self.b2, "at least 0 and below 1")
        _require(self.epsilon > 0, "Optimizer.epsilon", self.epsilon, "above 0")
        _require(self.weight_decay >= 0, "Optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(
            self.clip_norm is None or self.clip_norm > 0, "Optimizer.clip_norm", self.clip_norm, "above 0, or None"
        )
        spike = self.spike_factor
        _require(spike is None or spike > 1, "Optimizer.spike_factor", spike, "above 1, or None")
        _require(self.max_skipped >= 1, "Optimizer.max_skipped", self.max_skipped, "at least 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints of lowest held-out loss that are kept as well."""

    def __post_init__(self):
        _require(self.every_steps >= 1, "Checkpoint.every_steps", self.every_steps, "at least 1 step")
        _require(self.keep_last >= 1, "Checkpoint.keep_last", self.keep_last, "at least 1")
        _require(self.keep_best >= 0, "Checkpoint.keep_best", self.keep_best, "0 or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    replica: int = 1
    """Copies of the whole model, each on its part of the batch; the slowest links may lie between them."""
    data: int = 1
    """Devices that share the batch and hold the whole model."""
    fsdp: int = 1
    """Devices that share the batch and shard parameters and optimizer state (ZeRO-3)."""
    tensor: int = 1
    """Devices that share the channels of each layer."""
    sequence: int = 1
    """Devices that share the length of each sequence, passing the state on."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            _require(size >= 1, f"Mesh.{field.name}", size, "at least 1 device")


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    tensorboard: bool = True
    """Write TensorBoard event files into the workdir."""
    wandb_project: str | None = None
    """Weights & Biases project to log to (needs the extra 'wandb'); None logs nothing there."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides what a run computes."""

    train: TrainConfig = TrainConfig()
    model: LanguageModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self):
        train, data, mesh = self.train, self.data, self.mesh
        _require(
            data.global_batch_size % train.gradient_accumulation == 0,
            "Data.global_batch_size",
            data.global_batch_size,
            f"a multiple of Train.gradient_accumulation ({train.gradient_accumulation})",
        )
        shards = mesh.replica * mesh.data * mesh.fsdp
        _require(
            data.global_batch_size // train.gradient_accumulation % shards == 0,
            "Data.global_batch_size",
            data.global_batch_size,
            f"divided by Train.gradient_accumulation ({train.gradient_accumulation}) it must be a multiple of the "
            f"{shards} shards of the batch (Mesh.replica x Mesh.data x Mesh.fsdp)",
        )
        _require(
            data.sequence_length % mesh.sequence == 0,
            "Data.sequence_length",
            data.sequence_length,
            f"a multiple of Mesh.sequence ({mesh.sequence})",
        )
        shortest = self.task.shortest_length
        _require(
            shortest is None or shortest <= data.sequence_length,
            "Task.shortest_length",
            shortest,
            f"at most Data.sequence_length ({data.sequence_length}), or None",
        )
