"""What a benchmark leaves behind: a table, a JSON file, and pictures."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.crossover import crossover
from benchmarks.hardware import Limits
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
    limit = "–" if m.limit_seconds is None else f"{100 * m.limit_seconds / m.seconds:.0f}"
    error = f"{max(m.errors.values()):.1e}" if m.errors else "–"
    kernels = "–" if m.timing.kernels is None else f"{1e3 * m.timing.kernels:.4f}"
    spread = (m.timing.upper - m.timing.lower) / 2
    return (
        f"{m.operator:15} {m.direction:9} {m.implementation:12} {shape:34} {1e3 * m.seconds:9.4f} "
        f"{1e3 * spread:6.4f} {kernels:>9} {m.bytes_per_second / 1e9:7.0f} {m.flops_per_second / 1e9:8.0f} "
        f"{m.exponentials_per_second / 1e9:7.0f} {limit:>8} {error:>8}{'' if m.is_right else '  WRONG'}"
    )


def crossovers(measurements: Sequence[Measurement]) -> dict[str, dict[str, float | None]]:
    """Lengths from which on operators are faster than attention: by "operator implementation", then by direction."""
    found: dict[str, dict[str, float | None]] = {}
    for direction in DIRECTIONS:
        series = times(measurements, "length", "length", direction, None)
        attention = [name for name in series if name.startswith(ATTENTION.name)]
        for name, points in series.items():
            operator = name.split()[0]
            if attention and operator in OPERATORS and OPERATORS[operator].has_state:
                found.setdefault(name, {})[direction] = crossover(points, series[attention[0]])
    return found


def times(measurements: Sequence[Measurement], suite: str, dim: str, direction: str, operator: str | None) -> Series:
    """Seconds by a dimension, for each "operator implementation" of a suite; of one operator, or of all."""
    series: dict[str, dict[int, float]] = {}
    for m in measurements:
        if m.suite == suite and m.direction == direction and operator in (None, m.operator):
            series.setdefault(f"{m.operator} {m.implementation}", {})[m.shape[dim]] = m.seconds
    return series


def write_json(path: Path, measurements: Sequence[Measurement], limits: Limits, failures: Sequence[str]) -> None:
    """Writes all that was measured, and on what."""
    versions = {"python": platform.python_version()}
    for name in ("mamba-jax", "jax", "jaxlib", "numpy", "jax-cuda13-plugin", "mamba_ssm", "causal_conv1d"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": limits.device,
        "platform": jax.devices()[0].client.platform_version,
        "versions": versions,
        "limits": dataclasses.asdict(limits),
        "crossover_length": crossovers(measurements),
        "failures": list(failures),
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


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
    shape: Mapping[str, int] = next(m.shape for m in measurements if m.suite == suite and m.operator == name)
    fixed = ", ".join(f"{dim} {size}" for dim, size in shape.items() if dim != suite)
    return f"{name}, {fixed}, bfloat16, {device}"
