"""What a benchmark shows: a table, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.crossover import crossovers, times
from benchmarks.measure import Measurement
from benchmarks.operators import ATTENTION, OPERATORS
from benchmarks.plot import Series, plot_times
from benchmarks.suites import DIRECTIONS

HEADER = (
    f"{'operator':15} {'direction':9} {'by':12} {'shape':34} {'ms':>9} {'±':>6} {'kernels':>9} "
    f"{'GB/s':>7} {'GFLOP/s':>8} {'Gexp/s':>7} {'% limit':>8} {'error':>8}"
)


def row(measurement: Measurement) -> str:
    """A line of the table: ± is half the distance of the quartiles, kernels are in ms too, the error is the worst."""
    m = measurement
    shape = " ".join(f"{dim[0] if dim != 'head_dim' else 'd'}{size}" for dim, size in m.shape.items())
    error = f"{max(m.errors.values()):.1e}" if m.errors else "–"
    kernels = "–" if m.timing.kernels is None else f"{1e3 * m.timing.kernels:.4f}"
    spread = (m.timing.upper - m.timing.lower) / 2
    wrong = "" if m.is_right else "  WRONG"
    return (
        f"{m.operator:15} {m.direction:9} {m.implementation:12} {shape:34} {1e3 * m.seconds:9.4f} "
        f"{1e3 * spread:6.4f} {kernels:>9} {m.bytes_per_second / 1e9:7.0f} {m.flops_per_second / 1e9:8.0f} "
        f"{m.exponentials_per_second / 1e9:7.0f} {100 * m.limit_seconds / m.seconds:8.0f} {error:>8}{wrong}"
    )


def draw(folder: Path, measurements: Sequence[Measurement], device: str) -> list[Path]:
    """Draws times over length and over state for every operator measured; returns the files."""
    pictures = []
    found = crossovers(measurements)
    for name in dict.fromkeys(m.operator for m in measurements if m.operator in OPERATORS):
        for suite, label in (("length", "tokens"), ("state", "state size")):
            panels: dict[str, Series] = {}
            crossings: dict[str, list[float]] = {}
            for direction in DIRECTIONS:
                series = dict(times(measurements, suite, suite, direction, name))
                if series and suite == "length" and OPERATORS[name].has_state:
                    series |= times(measurements, suite, suite, direction, ATTENTION.name)
                    first = next(iter(series))
                    crossing = found.get(first, {}).get(direction)
                    crossings[direction] = [] if crossing is None else [crossing]
                if series:
                    panels[direction] = series
            if panels:
                picture = folder / f"{name}_by_{suite}.png"
                plot_times(picture, _title(name, suite, measurements, device), label, panels, crossings)
                pictures.append(picture)
    return pictures


def _title(name: str, suite: str, measurements: Sequence[Measurement], device: str) -> str:
    shapes = [m.shape for m in measurements if m.suite == suite and m.operator == name]
    fixed = ", ".join(f"{dim} {size}" for dim, size in shapes[0].items() if all(s[dim] == size for s in shapes))
    return f"{name}, {fixed}, bfloat16, {device}"
