"""Finished cells outlive an interruption, and are never taken for those of another evaluation."""

from __future__ import annotations

import pytest

from train.errors import UserError
from train.tasks.results import CELLS, Results

IDENTITY = {"task": "passkey", "seed": 0, "tries": 20}
KEY = {"method": "vanilla", "length": 1024}


def test_cells_are_found_again(tmp_path):
    Results(tmp_path / "a", IDENTITY).add(KEY, {"correct": 3})
    results = Results(tmp_path / "a", dict(reversed(IDENTITY.items())))
    assert results.get(dict(reversed(KEY.items()))) == {"correct": 3}
    assert results.get({**KEY, "length": 2048}) is None


def test_a_line_cut_short_is_dropped_and_written_over(tmp_path):
    Results(tmp_path, IDENTITY).add(KEY, {"correct": 3})
    with (tmp_path / CELLS).open("a") as file:
        file.write('{"key": {"method": "va')
    results = Results(tmp_path, IDENTITY)
    assert results.get(KEY) == {"correct": 3}
    results.add({"method": "other"}, {"correct": 4})
    again = Results(tmp_path, IDENTITY)
    assert [again.get(KEY), again.get({"method": "other"})] == [{"correct": 3}, {"correct": 4}]


def test_results_of_something_else_are_refused_and_can_be_forgotten(tmp_path):
    Results(tmp_path, IDENTITY).add(KEY, {"correct": 3})
    with pytest.raises(UserError, match=r"tries: 20 there, 30 now\nGive another --output"):
        Results(tmp_path, IDENTITY | {"tries": 30})
    assert Results(tmp_path, IDENTITY).get(KEY) == {"correct": 3}
    assert Results(tmp_path, IDENTITY | {"tries": 30}, overwrite=True).get(KEY) is None


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        Results(tmp_path / "file", IDENTITY)
