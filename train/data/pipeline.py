"""Batches of packed examples for training and evaluation, as grain pipelines.

An example is the next ``sequence_length`` (input, target) pairs of a split's stream; documents follow each other
within it, numbered by ``segment_ids``. Position in the data is one number, the index of the next global batch: it is
the same on every process, does not depend on how many there are, and resuming from it is exact.

A batch is a dict of NumPy arrays, each (rows, sequence_length):
    tokens        int32    inputs; a document begins with the separator
    targets       int32    the token after each input; the last of a document is the separator
    segment_ids   int32    number of the input's document within the example, from 0
    loss_weights  float32  1, or 0 on padding after the end of the split

A target is never the token of another document than its input: the separator ends the one document as a target and
begins the next as an input. So nothing but padding is left out of the loss.

Where ``Task.name`` says so, examples are instead those that ``train.tasks.training`` makes of the split.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from train.config import DataConfig, TaskConfig
from train.data.stdlib import stdlib_corpus
from train.data.storage import read_corpus
from train.data.tokens import Corpus, Tokens
from train.errors import UserError
from train.tasks.training import TaskRows

Batch = dict[str, np.ndarray]

_TEXT = TaskConfig(name="text")

_ENDLESS = 1 << 52
"""Examples of an endless run; grain counts batches in floating point, where this is still exact."""


def load(data: DataConfig) -> Corpus:
    """The corpus ``Data.source`` names.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return stdlib_corpus() if data.source == "stdlib" else read_corpus(data.source)


def train_batches(
    data: DataConfig,
    tokens: Tokens,
    *,
    seed: int,
    task: TaskConfig = _TEXT,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Batches for ever: every epoch is all examples once, in a new order that the seed decides.

    Examples of a task are new ones for ever.

    Args:
        data: sequence length, global batch size and how far to read ahead.
        tokens: split to read.
        seed: from 0 to 2**32 - 1.
        task: what is made of the split.
        process_index: which of the ``process_count`` equal runs of consecutive rows of each global batch to read.
        process_count: parts a global batch is read in, one a process.

    Raises:
        UserError: the split is shorter than a sequence, or the batch does not divide by the processes.
    """
    identity = {
        "corpus": tokens.fingerprint,
        "seed": seed,
        "sequence_length": data.sequence_length,
        "global_batch_size": data.global_batch_size,
    }
    if task.name != "text":
        examples = TaskRows(task, data, tokens, seed=seed, is_training=True)
        identity["task"] = dataclasses.asdict(task)
    else:
        examples = _shuffled_examples(data, tokens, seed)
    rows = _Rows(examples, _ENDLESS, data, process_index, process_count)
    batches = grain.MapDataset.source(rows).batch(rows.per_process).to_iter_dataset(_read_options(data))
    return TrainBatches(iter(batches), identity)


def _shuffled_examples(data: DataConfig, tokens: Tokens, seed: int) -> grain.MapDataset[Batch]:
    if tokens.targets < data.sequence_length:
        raise UserError(
            f"Data.sequence_length = {data.sequence_length} is longer than the data: the training split of "
            f"{data.source!r} has {tokens.targets} tokens to predict; use a shorter sequence or more text."
        )
    return grain.MapDataset.source(_Examples(tokens, data.sequence_length)).seed(seed).shuffle().repeat()


def held_out_batches(
    data: DataConfig,
    tokens: Tokens,
    *,
    task: TaskConfig = _TEXT,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """Every target of the split once, in the order of the text; each ``iter`` of the result is a pass.

    The last batch is filled up with rows of ``loss_weights`` 0, so all have the same shape, and every process gets the
    same number of them. Arguments and errors are those of ``train_batches``, but a split shorter than a sequence is
    padded. Of a task there are ``Task.held_out_examples``, of the whole length, with the answers alone to predict.
    """
    if task.name == "text":
        examples = _Examples(tokens, data.sequence_length)
    else:
        count = task.held_out_examples
        examples = TaskRows(task, data, tokens, seed=seed, is_training=False, count=count)
    rows = _Rows(examples, len(examples), data, process_index, process_count)
    return grain.MapDataset.source(rows).batch(rows.per_process).to_iter_dataset(_read_options(data))


def held_out_bytes(corpus: Corpus) -> bytes:
    """The text of the held-out split as UTF-8 bytes, documents joined: what to compress for comparison."""
    documents = corpus.held_out.iter_documents()
    return b"".join(corpus.tokenizer.decode(ids).encode("utf-8") for ids in documents)


class TrainBatches(grain.DatasetIterator[Batch]):
    """Endless iterator over training batches whose state also says what it is a position in.

    The state is a JSON-able dict, equal on every process. It only fits the data it was taken from: another corpus (the
    standard library of another Python, say), seed or batch shape is refused, since the order would silently change.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], identity: dict[str, Any]):
        super().__init__(batches)
        self._batches = batches
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._batches.get_state(), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            UserError: the state was taken over other data, with another seed or with another batch shape.
        """
        differences = [
            f"{name} was {state.get(name)!r} and is {self._identity.get(name)!r}"
            for name in dict.fromkeys([*self._identity, *state])
            if name != "position" and state.get(name) != self._identity.get(name)
        ]
        if differences:
            raise UserError(
                f"the saved position in the data does not fit this run: {', '.join(differences)}; "
                "restore the data and settings of the saved run, or start a new one."
            )
        self._batches.set_state(state["position"])


class _Examples:
    """The stream cut into examples; the last is padded, so every target is in exactly one."""

    def __init__(self, tokens: Tokens, sequence_length: int):
        self._tokens = tokens
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-self._tokens.targets // self._sequence_length)

    def __getitem__(self, index: int) -> Batch:
        """The example; an ``index`` past the last gives one of nothing but padding."""
        begin = index * self._sequence_length
        ids = self._tokens.read(begin, begin + self._sequence_length + 1)
        scored = max(len(ids) - 1, 0)
        separator_id = self._tokens.tokenizer.separator_id
        window = np.full(self._sequence_length + 1, separator_id, np.int32)
        window[: len(ids)] = ids
        begins_document = window[:-1] == separator_id
        begins_document[0] = False
        begins_document[scored + 1 :] = False  # all padding is one segment
        return {
            "tokens": window[:-1],
            "targets": window[1:],
            "segment_ids": np.cumsum(begins_document, dtype=np.int32),
            "loss_weights": (np.arange(self._sequence_length) < scored).astype(np.float32),
        }


class _Rows:
    """The rows of one process, batch after batch, out of ``count`` examples."""

    def __init__(self, examples: Any, count: int, data: DataConfig, process_index: int, process_count: int):
        if data.global_batch_size % process_count:
            raise UserError(
                f"Data.global_batch_size = {data.global_batch_size} cannot be shared by {process_count} processes; "
                f"use a multiple of {process_count}."
            )
        self.per_process = data.global_batch_size // process_count
        self._examples = examples
        self._global_batch_size = data.global_batch_size
        self._first_row = process_index * self.per_process
        self._batches = -(-count // data.global_batch_size)

    def __len__(self) -> int:
        return self._batches * self.per_process

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, self.per_process)
        return self._examples[batch * self._global_batch_size + self._first_row + row]


def _read_options(data: DataConfig) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch)
