"""The picture of a run: training and held-out loss over steps."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

_TRAINING, _HELD_OUT = "#0072B2", "#D55E00"  # Okabe & Ito's blue and vermillion, apart for every kind of colour vision


def plot_loss(metrics: Path, png: Path) -> None:
    """Draws the losses in metrics.jsonl.

    Args:
        metrics: a run's metrics.jsonl; lines with ``loss`` are training, those with ``eval_loss`` evaluations.
        png: file to write.
    """
    # Imported here because it takes longer than all else this package imports.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    training, held_out = _series(lines, "loss"), _series(lines, "eval_loss")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*training, color=_TRAINING, linewidth=1, alpha=0.35)
    marker = "o" if len(training[0]) == 1 else None
    axes.plot(
        training[0], _smoothed(training[1]), color=_TRAINING, linewidth=2, marker=marker, label="training, smoothed"
    )
    axes.plot(*held_out, color=_HELD_OUT, linewidth=2, marker="o", markersize=5, label="held-out")
    if held_out[1]:
        steps, losses = held_out
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=_HELD_OUT,
        )
    _zoom_past_the_start(axes, training[1], held_out[1])
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    part = png.with_name(f"{png.name}.part")
    figure.savefig(part, format="png")
    os.replace(part, png)


def _series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: list[float]) -> list[float]:
    """Mean of each value and its neighbours, about a fiftieth of the run."""
    reach = len(values) // 100
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _zoom_past_the_start(axes, training: list[float], held_out: list[float]) -> None:
    """Cuts the first few losses off where they would press the rest of the curve to the floor."""
    shown = sorted(training[len(training) // 20 :] + held_out)
    if shown and math.isfinite(shown[-1]) and shown[-1] > shown[0]:
        margin = 0.05 * (shown[-1] - shown[0])
        axes.set_ylim(shown[0] - 2 * margin, shown[-1] + 2 * margin)
