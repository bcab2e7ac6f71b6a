"""Progress is a line now and then where there is no terminal."""

from __future__ import annotations

import pytest

from train.data import progress


def test_lines_say_how_far_and_how_fast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.show_progress("Preparing", 4_000_000) as advance:
        for seconds in (1.0, 9.0, 5.0, 5.0):
            now += seconds
            advance(500_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Preparing: 25% of 4.0 MB, 100.0 kB/s",
        "Preparing: 50% of 4.0 MB, 100.0 kB/s",
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (3400, "3.4 kB"), (5_600_000_000, "5.6 GB"), (7 * 10**12, "7.0 TB")]
)
def test_bytes_are_written_for_people(count: int, text: str):
    assert progress.text_of_bytes(count) == text
