"""How far a benchmark is."""

from __future__ import annotations

from benchmarks.progress import Progress


def test_what_is_left_takes_as_long_as_what_is_done_did():
    progress = Progress(10)
    progress.add_compiled(4, seconds=40)
    progress.add_measured(seconds=1)
    progress.add_measured(seconds=5)
    # Six cases to compile for 10 s each, eight to measure for 3 s each.
    assert progress.seconds_left == 6 * 10 + 8 * 3
    assert str(progress) == "2/10, 1:24 left"
