"""Rows of task examples: answers weigh 1, the context as much as asked for, and examples do not see each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.train.tasks.conftest import sentences
from train.config import ConfigError, DataConfig, Experiment, TaskConfig
from train.data import pipeline
from train.data.tokenizer import ByteTokenizer
from train.data.tokens import tokens_in_memory
from train.errors import UserError
from train.tasks.training import TaskRows

TOKENS = tokens_in_memory(sentences(0), ByteTokenizer())
DATA = DataConfig(sequence_length=1024, global_batch_size=3, read_threads=2, prefetch=2)


def _segments(row) -> list[dict[str, np.ndarray]]:
    """The examples of a row, without padding."""
    numbers = row["segment_ids"]
    parts = [{name: values[numbers == i] for name, values in row.items()} for i in range(numbers.max() + 1)]
    return [part for part in parts if part["loss_weights"].any()]


@pytest.mark.parametrize("name", ["passkey", "document_retrieval"])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_answer_weighs_one_and_the_context_what_is_asked_for(name, weight):
    task = TaskConfig(name=name, context_weight=weight, shortest_length=256 if name == "passkey" else 512)
    rows = TaskRows(task, DATA, TOKENS, seed=0, is_training=True)
    lengths = set()
    for index in range(20):
        row = rows[index]
        assert all(values.shape == (1024,) for values in row.values())
        for part in _segments(row):
            lengths.add(1024 // len(_segments(row)))
            inputs, targets, weights = part["tokens"], part["targets"], part["loss_weights"]
            np.testing.assert_array_equal(targets[:-1], inputs[1:])
            assert (inputs[0], targets[-1]) == (255, 255)
            counted = bytes(targets[weights == 1.0][:-1].astype("u1")).decode()
            said = counted[-5:] if name == "passkey" else counted
            asked = bytes(inputs[1 : len(inputs) - len(said)].astype("u1")).decode()
            if name == "passkey":
                assert counted == f" {said}{said}"  # the needle's second mention of the key, and the answer
                assert asked.endswith("\nAnswer: ")
                assert f"The pass key is {said}. Remember" in asked
            else:
                assert asked.endswith(" <|Answer|> <|Document ")
                assert f"<|Document {said} " in asked
            assert np.sum(weights != weight) == len(counted) + 1
    assert lengths == {1024, 512} | ({256} if name == "passkey" else set())


def test_rows_depend_on_seed_and_index_alone_and_go_on_where_they_were():
    task = TaskConfig(name="passkey", shortest_length=256)
    take = lambda batches, count: list(itertools.islice(batches, count))  # noqa: E731
    batches = [pipeline.train_batches(DATA, TOKENS, seed=seed, task=task) for seed in (0, 0, 1)]
    first, again, other = (take(b, 4) for b in batches)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    assert any(np.any(a["tokens"] != b["tokens"]) for a, b in zip(first, other, strict=True))
    resumed = pipeline.train_batches(DATA, TOKENS, seed=0, task=task)
    resumed.set_state(batches[0].get_state())
    np.testing.assert_array_equal(next(resumed)["tokens"], next(batches[0])["tokens"])


def test_a_position_in_other_examples_is_refused():
    state = pipeline.train_batches(DATA, TOKENS, seed=0, task=TaskConfig(name="passkey")).get_state()
    with pytest.raises(UserError, match="task was"):
        pipeline.train_batches(DATA, TOKENS, seed=0).set_state(state)


def test_evaluations_are_of_answers_at_the_whole_length():
    task = TaskConfig(name="passkey", context_weight=0.5, shortest_length=256, held_out_examples=4)
    batches = list(pipeline.held_out_batches(DATA, TOKENS, task=task, seed=0))
    weights = np.concatenate([batch["loss_weights"] for batch in batches])
    assert weights.shape == (6, 1024)  # filled up to whole batches of three
    np.testing.assert_array_equal(weights.sum(axis=1), [6, 6, 6, 6, 0, 0])  # five digits and the separator
    assert set(np.concatenate([batch["segment_ids"] for batch in batches]).ravel()) == {0}


def test_in_a_curriculum_longer_examples_join_the_shortest():
    task = TaskConfig(name="passkey", shortest_length=256, curriculum_steps=30)
    rows = TaskRows(task, DATA, TOKENS, seed=0, is_training=True)
    examples = [[len(_segments(rows[3 * step + i])) for i in range(3)] for step in range(60)]  # three rows a step
    seen = [set(itertools.chain(*examples[first : first + 10])) for first in (0, 10, 20, 30, 50)]
    assert seen == [{4}, {4, 2}, {4, 2, 1}, {4, 2, 1}, {4, 2, 1}]


def test_lengths_that_hold_no_example_are_refused():
    with pytest.raises(UserError, match="passkey of 128 tokens is too short"):
        TaskRows(TaskConfig(name="passkey", shortest_length=100), DATA, TOKENS, seed=0, is_training=True)
    with pytest.raises(ConfigError, match=r"Task\.shortest_length = 2048.*at most Data\.sequence_length \(1024\)"):
        Experiment(data=DataConfig(sequence_length=1024), task=TaskConfig(shortest_length=2048))
    for field, value in (
        ("context_weight", -1.0),
        ("shortest_length", 0),
        ("curriculum_steps", -1),
        ("held_out_examples", 0),
    ):
        with pytest.raises(ConfigError, match=rf"Task\.{field}"):
            TaskConfig(**{field: value})
