import numpy as np
import pytest

from mamba_jax.long_context.overlap import excerpts, found, run_length, window_hashes


def windows(tokens: np.ndarray, count: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + count].tolist()) for i in range(len(tokens) - count + 1)]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 13])
def test_hashes_are_equal_where_all_tokens_of_the_window_are(window):
    random = np.random.default_rng(0)
    periodic = np.tile(random.integers(2, size=17), 20).astype(np.uint8)
    tokens = np.concatenate([periodic, random.integers(2, size=400), np.zeros(40, int), np.arange(40)])
    expected = windows(tokens, window)
    hashes = window_hashes(tokens, window).tolist()
    assert len(hashes) == len(expected)
    assert (
        len(dict(zip(expected, hashes, strict=True)))
        == len(set(hashes))
        == len(set(zip(expected, hashes, strict=True)))
    )
    assert window_hashes(tokens[: window - 1], window).size == 0


@pytest.mark.parametrize("length", [1, 2, 15, 64, 100, 5000])
def test_a_run_is_found_wherever_it_begins_and_seven_eighths_of_one_are_not(length):
    random = np.random.default_rng(length)
    sequences = random.integers(1000, size=(3, length), dtype=np.int32)
    hashes = np.concatenate(excerpts(list(sequences), length))
    run = run_length(length)
    assert run == max(1, min(length // 2, 1024))
    for begin in {0, min(1, length - run), (length - run) // 2, length - run}:
        other = random.integers(1000, 2000, size=3000)
        text = np.insert(other, 1234, sequences[1, begin : begin + run])
        for cuts in ([], [1200], [1235, 1236, 1240], range(1, 3000, 40)):
            marks = np.split(found(hashes, np.split(text, cuts), length), 3)
            assert [part.any() for part in marks] == [False, True, False]
        few = np.insert(other, 1234, sequences[1, begin : begin + 7 * run // 8])
        assert not found(hashes, [few], length).any()
        assert not found(hashes, [], length).any()


def test_what_is_found_is_what_comparing_all_windows_finds():
    random = np.random.default_rng(0)
    sequences = [random.integers(3, size=24) for _ in range(40)]  # of which some repeat a window, and some are equal
    sequences[7] = sequences[3]
    text = random.integers(3, size=3000)
    parts = excerpts(sequences, 24)
    there = set(windows(text, 12))
    expected = [[window in there for window in windows(sequence, 12)] for sequence in sequences]
    actual = found(np.concatenate(parts), np.array_split(text, 9), 24)
    assert actual.tolist() == [mark for marks in expected for mark in marks]
    assert 0 < actual.sum() < actual.size


def test_of_no_sequence_nothing_is_found():
    assert found(np.zeros(0, np.uint64), [np.arange(100)], 32).size == 0
    assert [part.size for part in excerpts([np.arange(3)], 32)] == [0]
