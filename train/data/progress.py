"""Progress of a long pass over bytes: a bar on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(action: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes done since its last call; writes to stderr."""
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
        ) as progress:
            task = progress.add_task(action, total=total_bytes)
            yield lambda done: progress.advance(task, done)
    else:
        yield _Lines(action, total_bytes)


def text_of_bytes(count: int) -> str:
    """A number of bytes for people, such as '3.4 MB'."""
    if count < 1000:
        return f"{count} B"
    exponent = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**exponent:.1f} {('kB', 'MB', 'GB', 'TB')[exponent - 1]}"


class _Lines:
    def __init__(self, action: str, total_bytes: int):
        self._action = action
        self._total_bytes = total_bytes
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def __call__(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = self._done / max(self._total_bytes, 1)
            print(
                f"{self._action}: {share:.0%} of {text_of_bytes(self._total_bytes)}, "
                f"{text_of_bytes(round(self._done / (now - self._start)))}/s",
                file=sys.stderr,
                flush=True,
            )
