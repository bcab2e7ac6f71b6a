"""Batches hold every target once an epoch, in an order that only the seed decides, and resume exactly."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import pipeline
from train.data.storage import CorpusWriter
from train.data.tokenizer import ByteTokenizer, load_tokenizer
from train.data.tokens import Corpus, Tokens, join_documents, tokens_in_memory
from train.errors import UserError

SEPARATOR = 255
_REPOSITORY = Path(__file__).parents[3]


def _config(sequence_length: int, global_batch_size: int, read_threads: int = 2) -> DataConfig:
    return DataConfig(
        sequence_length=sequence_length, global_batch_size=global_batch_size, read_threads=read_threads, prefetch=2
    )


def _random_tokens(documents: int = 40, longest: int = 60) -> Tokens:
    texts = ["".join(random.choices("abcdef", k=random.randint(1, longest))) for _ in range(documents)]
    return tokens_in_memory(texts, ByteTokenizer())


def _pack(texts: list[str], length: int) -> list[list[tuple[int, int, int, float]]]:
    """The definition, document by document: rows of (token, target, segment, weight)."""
    pairs = [
        (token, target, document, 1.0)
        for document, text in enumerate(texts)
        for token, target in itertools.pairwise([SEPARATOR, *text.encode(), SEPARATOR])
    ]
    padding = [(SEPARATOR, SEPARATOR, len(texts), 0.0)] * (-len(pairs) % length)
    rows = list(itertools.batched(pairs + padding, length))
    return [[(token, target, segment - row[0][2], weight) for token, target, segment, weight in row] for row in rows]


def _rows(batch: pipeline.Batch) -> list[list[tuple[int, int, int, float]]]:
    columns = [batch[name].tolist() for name in ("tokens", "targets", "segment_ids", "loss_weights")]
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def _take(batches: pipeline.TrainBatches, count: int) -> list[pipeline.Batch]:
    return list(itertools.islice(batches, count))


def _assert_equal(left: list[pipeline.Batch], right: list[pipeline.Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


texts_of_any_size = st.lists(st.text("abcé", min_size=1, max_size=12), min_size=1, max_size=8)


@settings(max_examples=40)
@given(texts=texts_of_any_size, length=st.integers(1, 20), batch_size=st.integers(1, 6))
def test_the_held_out_split_is_read_once_in_order_and_padded(texts: list[str], length: int, batch_size: int):
    batches = pipeline.held_out_batches(_config(length, batch_size), tokens_in_memory(texts, ByteTokenizer()))
    expected = _pack(texts, length)
    for _ in range(2):  # every iter is a pass
        rows = [row for batch in batches for row in _rows(batch)]
        assert rows[: len(expected)] == expected
        assert len(rows) == -(-len(expected) // batch_size) * batch_size
        for padding in rows[len(expected) :]:
            assert padding == [(SEPARATOR, SEPARATOR, 0, 0.0)] * length


@settings(max_examples=40)
@given(texts=texts_of_any_size, length=st.integers(1, 20), batch_size=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_of_training_is_every_row_once(texts: list[str], length: int, batch_size: int, seed: int):
    tokens = tokens_in_memory(texts, ByteTokenizer())
    expected = _pack(texts, min(length, tokens.targets))
    batches = pipeline.train_batches(_config(min(length, tokens.targets), batch_size), tokens, seed=seed)
    size = len(expected)
    rows = [row for batch in _take(batches, -(-3 * size // batch_size)) for row in _rows(batch)]
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == sorted(expected)


def test_arrays_have_the_documented_names_shapes_and_dtypes():
    batch = next(pipeline.train_batches(_config(8, 3), _random_tokens(), seed=0))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((3, 8), "int32"),
        "targets": ((3, 8), "int32"),
        "segment_ids": ((3, 8), "int32"),
        "loss_weights": ((3, 8), "float32"),
    }


def test_every_epoch_and_every_seed_has_its_own_order():
    tokens = _random_tokens()
    config = _config(10, len(_pack_lengths(tokens, 10)))  # a batch is an epoch
    orders = [
        _rows(batch) for seed in (0, 1, 2) for batch in _take(pipeline.train_batches(config, tokens, seed=seed), 3)
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    _assert_equal(*(_take(pipeline.train_batches(config, tokens, seed=1), 3) for _ in range(2)))


def _pack_lengths(tokens: Tokens, length: int) -> range:
    return range(0, tokens.targets, length)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_the_global_batches_do_not_depend_on_the_number_of_processes(processes: int):
    tokens, config = _random_tokens(), _config(10, 6)
    for read in (
        lambda **process: _take(pipeline.train_batches(config, tokens, seed=5, **process), 30),
        lambda **process: list(pipeline.held_out_batches(config, tokens, **process)),
    ):
        parts = [read(process_index=index, process_count=processes) for index in range(processes)]
        joined = [
            {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
            for batch in zip(*parts, strict=True)
        ]
        _assert_equal(joined, read())


@settings(max_examples=20)
@given(before=st.integers(0, 12), ahead=st.integers(0, 5), threads=st.sampled_from([0, 2]))
def test_a_restored_iterator_continues_exactly(before: int, ahead: int, threads: int):
    tokens, config = _random_tokens(documents=6), _config(16, 4, threads)
    uninterrupted = pipeline.train_batches(config, tokens, seed=7)
    _take(uninterrupted, before)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = _take(uninterrupted, 5)
    restored = pipeline.train_batches(config, tokens, seed=7)
    _take(restored, ahead)  # wherever it was
    restored.set_state(state)
    _assert_equal(_take(restored, 5), expected)


def test_the_state_is_the_same_on_every_process():
    tokens = _random_tokens()
    states = []
    for index in range(2):
        batches = pipeline.train_batches(_config(10, 4), tokens, seed=0, process_index=index, process_count=2)
        _take(batches, 3)
        states.append(batches.get_state())
    assert states[0] == states[1]


def test_a_new_process_continues_exactly(tmp_path: Path):
    tokens, folder = _random_tokens(), tmp_path / "corpus"
    folder.mkdir()
    with CorpusWriter(folder, ByteTokenizer()) as writer:
        for split in ("train", "held_out"):
            ids = join_documents(list(tokens.iter_documents()), ByteTokenizer())
            writer.append(split, ids, documents=tokens.documents, text_bytes=tokens.text_bytes)
        writer.finish()
    batches = pipeline.train_batches(_config(10, 4), tokens, seed=3)
    _take(batches, 11)
    program = """
import json, sys
from train.config import DataConfig
from train.data import pipeline
folder, state = sys.argv[1:]
config = DataConfig(source=folder, sequence_length=10, global_batch_size=4)
batches = pipeline.train_batches(config, pipeline.load(config).train, seed=3)
batches.set_state(json.loads(state))
print(json.dumps([next(batches)["tokens"].tolist() for _ in range(5)]))
"""
    arguments = [sys.executable, "-c", program, str(folder), json.dumps(batches.get_state())]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=_REPOSITORY)
    assert json.loads(result.stdout) == [batch["tokens"].tolist() for batch in _take(batches, 5)]


def test_the_position_is_saved_and_restored_by_orbax(tmp_path: Path):
    tokens, config = _random_tokens(), _config(10, 4)
    batches = pipeline.train_batches(config, tokens, seed=3)
    _take(batches, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        restored = pipeline.train_batches(config, tokens, seed=3)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    _assert_equal(_take(restored, 5), _take(batches, 5))


def test_a_position_in_other_data_is_refused():
    tokens, config = _random_tokens(), _config(10, 4)
    state = pipeline.train_batches(config, tokens, seed=3).get_state()
    for other, message in [
        (pipeline.train_batches(config, _random_tokens(), seed=3), "corpus was '"),
        (pipeline.train_batches(config, tokens, seed=4), "seed was 3 and is 4"),
        (pipeline.train_batches(_config(9, 4), tokens, seed=3), "sequence_length was 10 and is 9"),
        (pipeline.train_batches(_config(10, 8), tokens, seed=3), "global_batch_size was 4 and is 8"),
    ]:
        with pytest.raises(UserError, match=message):
            other.set_state(state)


def test_a_sequence_longer_than_the_data_is_an_error():
    tokens = tokens_in_memory(["abc"], ByteTokenizer())
    next(pipeline.train_batches(_config(4, 2), tokens, seed=0))
    with pytest.raises(UserError, match=r"Data\.sequence_length = 5 is longer than the data: .* has 4 tokens"):
        pipeline.train_batches(_config(5, 2), tokens, seed=0)


def test_a_batch_that_processes_cannot_share_is_an_error():
    for read in (lambda *args, **kwargs: pipeline.train_batches(*args, seed=0, **kwargs), pipeline.held_out_batches):
        with pytest.raises(UserError, match=r"Data\.global_batch_size = 4 cannot be shared by 3 processes"):
            read(_config(8, 4), _random_tokens(), process_index=0, process_count=3)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_held_out_bytes_are_the_text(kind: str, bpe_file: Path):
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(str(bpe_file))
    texts = ["naïve 😀", "the dog", "\n"]
    tokens = tokens_in_memory(texts, tokenizer)
    held_out = pipeline.held_out_bytes(Corpus(tokens, tokens, tokenizer))
    assert held_out == "".join(texts).encode()
    assert len(held_out) == tokens.text_bytes


def test_the_weights_of_a_pass_count_the_targets_of_the_split():
    tokens = _random_tokens()
    batches = pipeline.held_out_batches(_config(7, 4), tokens)
    assert sum(batch["loss_weights"].sum() for batch in batches) == tokens.targets


def test_the_built_in_corpus_loads_by_name():
    corpus = pipeline.load(DataConfig(source="stdlib"))
    batch = next(pipeline.train_batches(_config(64, 2), corpus.train, seed=0))
    assert batch["tokens"].max() < corpus.tokenizer.vocab_size
