"""How far a benchmark is."""

from __future__ import annotations


class Progress:
    """Counts cases, and reckons how long the rest takes.

    What is left is taken to compile, and to run, for as long as the mean of what this run has done.
    """

    def __init__(self, cases: int):
        self._cases = cases
        self._compiled = self._measured = 0
        self._compile_seconds = self._measure_seconds = 0.0

    def add_compiled(self, cases: int, seconds: float) -> None:
        """Counts cases whose programs took so long together."""
        self._compiled += cases
        self._compile_seconds += seconds

    def add_measured(self, seconds: float) -> None:
        """Counts a case that was measured, or failed, in this time."""
        self._measured += 1
        self._measure_seconds += seconds

    @property
    def seconds_left(self) -> float:
        """Of cases not measured, and for those of them not compiled; at least one case must be both."""
        left = (self._cases - self._measured) * self._measure_seconds / self._measured
        return left + (self._cases - self._compiled) * self._compile_seconds / self._compiled

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return f"{self._measured}/{self._cases}, {minutes}:{seconds:02} left"
