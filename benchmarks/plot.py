"""Pictures of times over length or state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

Series = Mapping[str, Mapping[int, float]]
"""Seconds by length or state, for each name in the legend."""

# Okabe and Ito's colours, apart for every kind of colour vision; the markers tell the lines apart in grey too.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"))


def plot_times(
    png: Path, title: str, x_label: str, panels: Mapping[str, Series], crossings: Mapping[str, Sequence[float]]
) -> None:
    """Draws times on logarithmic axes.

    Args:
        png: file to write.
        title: of the whole picture.
        x_label: what the times are over.
        panels: series by the panel's title.
        crossings: where to mark a crossover, by the panel's title.
    """
    # Imported here because it takes longer than all else this package imports.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    styles = {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(names)}
    figure = Figure(figsize=(5.5 * len(panels), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (panel, series) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in series.items():
            color, marker = styles[name]
            x = sorted(points)
            axes.plot(
                x, [1e3 * points[i] for i in x], color=color, marker=marker, markersize=5, linewidth=2, label=name
            )
        for x in crossings.get(panel, ()):
            axes.axvline(x, color="#666666", linestyle="--", linewidth=1)
            axes.annotate(
                f"{x:,.0f} {x_label}",
                (x, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({x for points in series.values() for x in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_title(panel)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("milliseconds")
    # A crossover may be where the legend is.
    figure.axes[0].legend(framealpha=1, edgecolor="none")
    part = png.with_name(f"{png.name}.part")
    figure.savefig(part, format="png")
    os.replace(part, png)


def _short(x: float, _: int) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
