"""Answers and losses do not depend on how prompts are batched and cut, and are those of the model itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mamba_jax.long_context.models import language_model
from tests.mamba_jax.reading import likeliest_next, read
from train.data.tokenizer import ByteTokenizer
from train.errors import UserError
from train.tasks.cell import count_right
from train.tasks.example import Example
from train.tasks.perplexity_by_length import cells, window
from train.tasks.reading import Reading, answers, losses_of_last


@pytest.fixture(scope="module")
def model():
    return language_model()


class _Letters(ByteTokenizer):
    """Ids below the model's vocabulary of 40, the separator among them."""

    vocab_size = 30
    separator_id = 0

    def decode(self, ids):
        return "".join(chr(97 + token) for token in ids)


def _example(seed: int, length: int) -> Example:
    prompt = np.random.default_rng(seed).integers(1, 40, size=length).astype(np.int32)
    return Example(prompt, np.zeros(2, np.int32), expected="")


def test_batches_have_one_size_and_hold_all_items_in_order():
    for count in range(1, 12):
        for room in (1, 2, 3, 50):
            batches = Reading(chunk=10, tokens_at_a_time=10 * room).batches(list(range(count)), 100)
            sizes = {len(batch) for batch in batches}
            assert len(sizes) == 1
            assert max(sizes) <= room
            assert [item for batch in batches for item in batch][:count] == list(range(count))


def test_answers_are_the_model_s_likeliest_tokens_however_prompts_are_read(model):
    examples = [_example(seed, length) for seed, length in enumerate([5, 30, 16, 33, 64])]
    expected = []
    for example in examples:
        ids = example.prompt.tolist()
        for _ in range(4):
            ids.append(likeliest_next(model, ids, room=80))
        said = ids[len(example.prompt) :]
        said = said[: said.index(0)] if 0 in said else said
        expected.append("".join(chr(97 + token) for token in said if token < 30))
    for chunk, at_a_time in ((None, 1000), (16, 32), (16, 16), (8, 1000)):
        assert answers(model, examples, _Letters(), Reading(chunk, at_a_time), max_new_tokens=4) == expected


def test_losses_are_those_of_the_whole_sequence(model):
    random = np.random.default_rng(0)
    windows = [random.integers(0, 40, size=70).astype(np.int32) for _ in range(3)]
    logits, _ = read(model, jnp.asarray(np.stack(windows)))
    log_probabilities = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = [
        -np.mean([log_probabilities[row, t - 1, window[t]] for t in range(60, 70)])
        for row, window in enumerate(windows)
    ]
    for reading in (Reading(None, 1000), Reading(16, 16), Reading(32, 64)):
        np.testing.assert_allclose(losses_of_last(model, windows, reading, last=10), expected, rtol=1e-4)


def test_right_answers_are_counted(model):
    examples = [_example(seed, 20) for seed in range(6)]
    said = answers(model, examples, _Letters(), Reading(None, 1000), max_new_tokens=5)
    expected = [
        Example(e.prompt, e.answer, text if i % 2 else "?")
        for i, (e, text) in enumerate(zip(examples, said, strict=True))
    ]
    measure = count_right(lambda: expected, lambda answer, right: answer == right, _Letters())
    assert measure(model, Reading(16, 40)) == {"correct": 3, "tries": 6}


def test_windows_of_all_lengths_end_alike(text):
    long = window(text, 2, length=900, seed=0)
    for length in (102, 300):
        short = window(text, 2, length=length, seed=0)
        assert (len(short), short[0]) == (length, 255)
        np.testing.assert_array_equal(short[1:], long[1 - length :])
    assert not np.array_equal(long, window(text, 3, length=900, seed=0))
    assert not np.array_equal(long, window(text, 2, length=900, seed=1))


def test_windows_are_pieces_of_the_text_read_in_circles(text):
    once = b"".join(piece.tobytes() for piece in text.pieces())
    assert len(once) == text.count
    windows = [window(text, index, length=text.count, seed=0)[1:].astype(np.uint8).tobytes() for index in range(50)]
    assert all(found in once + once for found in windows)
    assert len({once.find(found[:200]) for found in windows}) > 25  # ends are spread over the text


def test_windows_that_would_hold_what_they_predict_are_refused(text):
    assert len(cells(text, lengths=[200, text.count], windows=1, seed=0)) == 2
    with pytest.raises(UserError, match=f"window of {text.count + 1} tokens is too long"):
        cells(text, lengths=[200, text.count + 1], windows=1, seed=0)


def test_windows_without_context_are_refused(text):
    with pytest.raises(Exception, match="window of 101 tokens is too short"):
        cells(text, lengths=[200, 101], windows=1, seed=0)
