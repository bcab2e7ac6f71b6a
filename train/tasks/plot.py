"""Pictures of evaluations: heat maps over length and depth, curves with intervals, bars, and growth with position."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.tasks.prefill_scaling import straightness
from train.tasks.summary import Row

# Okabe and Ito's colours, apart for every kind of colour vision; markers and lines tell them apart in grey too.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_LINES = ("-", "--", ":")


def plot_heat_maps(png: Path, title: str, rows: Sequence[Row], *, training_length: int) -> None:
    """Draws accuracy over length and depth, a panel for each method.

    Args:
        png: file to write.
        title: of the whole picture.
        rows: with ``method``, ``length``, ``depth`` and ``value``, from 0 to 1.
        training_length: marked by a line behind its column.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    columns = min(4, math.ceil(len(methods) ** 0.5))
    size = (columns * (0.52 * len(lengths) + 1.4) + 1, -(-len(methods) // columns) * (0.42 * len(depths) + 1.3) + 0.6)
    figure = _figure(size)
    figure.suptitle(title)
    panels = figure.subplots(-(-len(methods) // columns), columns, squeeze=False, sharey=True)
    image: Any = None
    for axes, method in zip(panels.flat, methods, strict=False):
        values = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            if row["method"] == method:
                values[depths.index(row["depth"]), lengths.index(row["length"])] = row["value"]
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "black" if value > 0.5 else "white"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
        trained = sum(length <= training_length for length in lengths)
        if 0 < trained < len(lengths):
            axes.axvline(trained - 0.5, color="#D55E00", linewidth=2)
        axes.set_title(method, fontsize=10)
        is_lowest = methods.index(method) + columns >= len(methods)
        axes.set_xticks(range(len(lengths)), [short(length) if is_lowest else "" for length in lengths], rotation=45)
        axes.set_xlabel("tokens" if is_lowest else "")
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    for axes in panels[:, 0]:
        axes.set_ylabel("depth of the key")
    for axes in list(panels.flat)[len(methods) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, label="found, %", ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    _save(figure, png)


def plot_curves(
    png: Path,
    title: str,
    rows: Sequence[Row],
    *,
    x: str,
    x_label: str,
    y_label: str,
    training_x: int | None = None,
    percent: bool = False,
    log_y: bool = False,
) -> None:
    """Draws values over lengths or numbers, on a logarithmic axis, with their intervals, side by side.

    Args:
        png: file to write.
        title: of the picture.
        rows: with ``method``, ``value``, ``low``, ``high`` and what ``x`` names.
        x: part of the rows that the horizontal axis is of.
        x_label: what it is.
        y_label: what the values are.
        training_x: where to mark what the model was trained on.
        percent: values are shares, drawn in percent from 0 to 100.
        log_y: draw values on a logarithmic axis where they differ by more than a factor.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    scale = 100 if percent else 1
    figure = _figure((9, 4.8))
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for i, method in enumerate(methods):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row[x])
        # Beside each other, so that no interval hides another.
        xs = [row[x] * 2 ** (min(0.035, 0.3 / len(methods)) * (i - (len(methods) - 1) / 2)) for row in points]
        value, low, high = (np.array([scale * row[name] for row in points]) for name in ("value", "low", "high"))
        axes.errorbar(
            xs,
            value,
            yerr=np.maximum([value - low, high - value], 0.0),
            color=_COLORS[i % len(_COLORS)],
            elinewidth=1,
            capsize=2,
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle=_LINES[i // len(_COLORS) % len(_LINES)],
            markersize=5,
            linewidth=1.8,
            label=method,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row[x] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(float(value))))
    axes.xaxis.set_minor_locator(NullLocator())
    if log_y and max(row["value"] for row in rows) > 3 * min(row["value"] for row in rows):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if percent:
        axes.set_ylim(-4, 104)
    if training_x is not None:
        trained_at = f"trained at {short(training_x)}"
        axes.axvline(training_x, color="#666666", linestyle="--", linewidth=1, zorder=0, label=trained_at)
    _label(axes, title, x_label, y_label)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, png)


def plot_bars(png: Path, title: str, rows: Sequence[Row], *, group: str, y_label: str) -> None:
    """Draws values as bars with their intervals, side by side for each of what ``group`` names."""
    figure = _figure((8, 4.8))
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(row[group] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        points = [row for row in rows if row["method"] == method]
        places = [groups.index(row[group]) + (i - (len(methods) - 1) / 2) * width for row in points]
        heights = [row["value"] for row in points]
        errors = [[row["value"] - row["low"] for row in points], [row["high"] - row["value"] for row in points]]
        color = _COLORS[i % len(_COLORS)]
        axes.bar(places, heights, 0.92 * width, yerr=errors, color=color, alpha=0.8, capsize=2, label=method)
    axes.set_xticks(range(len(groups)), groups)
    _label(axes, title, "", y_label)
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, png)


def plot_growth(png: Path, title: str, series: Mapping[str, Mapping]) -> None:
    """Draws time and memory over position, from results of ``prefill_scaling`` by method."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    figure = _figure((11, 4.2))
    figure.suptitle(title)
    time_axes, memory_axes = figure.subplots(1, 2)
    longest = max(result["positions"][-1] for result in series.values())
    for axes in (time_axes, memory_axes):
        axes.set_xlim(0, 1.02 * longest)
        axes.xaxis.set_major_locator(MultipleLocator(longest / 8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda position, _: short(float(position))))
    for i, (method, result) in enumerate(series.items()):
        style = {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 3}
        positions = result["positions"]
        r2 = straightness(result["positions"], result["seconds"])
        time_axes.plot(positions, result["seconds"], label=f"{method} (line: R² = {r2:.5f})", **style)
        memory_axes.plot(positions, [size / 2**30 for size in result["bytes"]], label=method, **style)
    memory_axes.set_ylim(0, 1.5 * max(max(result["bytes"]) for result in series.values()) / 2**30)
    of = next(iter(series.values()))["memory_of"]
    time_axes.set_ylim(bottom=0)
    _label(time_axes, "time", "tokens read", "seconds")
    _label(memory_axes, f"memory of {of}", "tokens read", "GiB")
    for axes in (time_axes, memory_axes):
        axes.legend(frameon=False, fontsize=8)
    _save(figure, png)


def short(count: int | float) -> str:
    """A number of tokens as people write it: 128K for 131,072."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size and count % (size // 4) == 0:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _label(axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(size: tuple[int | float, int | float]):
    # Imported here because it takes longer than all else this package imports.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, png: Path) -> None:
    part = png.with_name(f"{png.name}.part")
    figure.savefig(part, format="png")
    os.replace(part, png)
