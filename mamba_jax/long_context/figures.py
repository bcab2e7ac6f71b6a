"""Pictures of what ``long_context.measurements`` measures. Colours are apart for every kind of colour vision."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mamba_jax.long_context.measurements import (
    AttentionMaps,
    DecayCurves,
    ExtendedDecay,
    FilteredShare,
    Layers,
    ReceptiveFields,
    StateNorms,
)

# Okabe and Ito's palette.
_GLOBAL, _LOCAL = "#D55E00", "#0072B2"
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINE_STYLES = ("-", "--", "-.", ":")
_OPAQUE = {"framealpha": 0.9, "edgecolor": "none"}
"""Legends that may lie on curves."""
_ATTENTION_DECADES = 8
"""Powers of ten below the largest weight that a map shows."""


def attention_maps(maps: AttentionMaps, *, columns: int, title: str) -> Figure:
    """Figures 1, 15 and 16: a map a channel, ``columns`` to a row, in the order of ``maps``."""
    rows = -(-len(maps.channel) // columns)
    figure = _figure(1.9 * columns + 1.1, 2.15 * rows + 0.5, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = ScalarMappable(Normalize(-_ATTENTION_DECADES, 0), "cividis")
    for axes, i in zip(grid.flat, range(len(maps.channel)), strict=False):
        # Smaller weights have the darkest colour; what is above the diagonal has none.
        weights = np.maximum(maps.log10_attention[i], -_ATTENTION_DECADES)
        pixels = len(weights)
        axes.imshow(
            np.where(np.tril(np.ones_like(weights, bool)), weights, np.nan),
            cmap=scale.cmap,
            norm=scale.norm,
            extent=(0, maps.length, maps.length, 0),
            interpolation="nearest" if pixels >= 100 else "none",
        )
        _draw_receptive_field(axes, maps.length, float(maps.receptive_field[i]))
        axes.set_title(
            f"layer {maps.layer[i]}, id {maps.channel[i]}\n"
            f"{_kind(maps.is_global[i])}, ERF {maps.receptive_field[i]:,.0f}",
            fontsize=8,
            color=_GLOBAL if maps.is_global[i] else _LOCAL,
        )
        _token_axis(axes.xaxis, maps.length)
        _token_axis(axes.yaxis, maps.length)
        axes.label_outer()
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(maps.channel) :]:
        axes.set_axis_off()
    figure.supxlabel("input token j", fontsize=9)
    figure.supylabel("output token i", fontsize=9)
    colorbar = figure.colorbar(scale, ax=grid, shrink=min(1.0, 3 / (2.15 * rows)) if rows > 2 else 0.8, pad=0.01)
    colorbar.set_label("log10 |α(i, j)| / largest", fontsize=8)
    colorbar.ax.tick_params(labelsize=7)
    return figure


def receptive_fields(fields: ReceptiveFields) -> Figure:
    """Figure 7."""
    figure = _figure(6.4, 4.4, f"Effective receptive field against sequence length, layer {fields.layer}")
    axes = figure.add_subplot()
    for channel, is_global, field, style in zip(
        fields.channel, fields.is_global, fields.receptive_field, _styles(fields.is_global), strict=True
    ):
        color, label = _GLOBAL if is_global else _LOCAL, f"channel {channel} ({_kind(is_global)})"
        axes.plot(fields.length, field, style, color=color, label=label, marker="o", markersize=3.5)
    axes.plot(fields.length, fields.length / 2, ":", color="0.6", label="sees all alike (length / 2)")
    _mark_training_length(axes, fields.training_length)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    _label(axes, "sequence length (tokens)", "effective receptive field (tokens)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.legend(**_OPAQUE, fontsize=8)
    return figure


def decay_curves(curves: DecayCurves) -> Figure:
    """Figures 9 to 14: original and extended side by side, on one scale."""
    figure = _figure(9.6, 4.4, f"Cumulative decay of {len(curves.channel)} channels, layer {curves.layer}")
    panels = figure.subplots(1, 2, sharey=True)
    both = np.concatenate([curves.log10_original, curves.log10_extended])
    panels[0].set_ylim(_lowest(both, curves.log10_threshold), 0.03 * abs(curves.log10_threshold))
    names = "original", f"LongMamba, g(S) of {curves.position[-1]:,} tokens"
    for axes, name, decays in zip(panels, names, (curves.log10_original, curves.log10_extended), strict=True):
        for is_global, decay in zip(curves.is_global, decays, strict=True):
            axes.plot(curves.position, decay, color=_GLOBAL if is_global else _LOCAL, linewidth=1, alpha=0.8)
        axes.axhline(curves.log10_threshold, color="0.3", linewidth=1, linestyle=(0, (1, 1)))
        _mark_training_length(axes, curves.training_length)
        axes.set_title(name, fontsize=9)
        _label(axes, "tokens read", "")
    panels[0].set_ylabel("log10 of what is left of the first state")
    counts = int(np.sum(curves.is_global)), int(np.sum(~curves.is_global))
    handles = [Line2D([], [], color=_GLOBAL), Line2D([], [], color=_LOCAL), *_reference_handles()]
    labels = [f"global ({counts[0]})", f"local ({counts[1]})", "training length", "Th"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def extended_decay(decay: ExtendedDecay) -> Figure:
    """Figure 8: a panel a length."""
    columns = min(len(decay.length), 4)
    rows = -(-len(decay.length) // columns)
    figure = _figure(
        2.9 * columns, 2.7 * rows + 0.9, f"Cumulative decay with and without LongMamba's g(S), layer {decay.layer}"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for panel, (axes, length) in enumerate(zip(grid.flat, decay.length.tolist(), strict=False)):
        for i in range(len(decay.channel)):
            color = _SERIES[i % len(_SERIES)]
            axes.plot(decay.position[panel], decay.log10_original[panel, i], "-", color=color, linewidth=1.3)
            axes.plot(decay.position[panel], decay.log10_extended[panel, i], "--", color=color, linewidth=1.8)
        axes.set_title(f"S = {length:,} tokens", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        _token_axis(axes.xaxis, length)
    for axes in grid.flat[len(decay.length) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("tokens read", fontsize=9)
    figure.supylabel("log10 of what is left of the first state", fontsize=9)
    handles = [Line2D([], [], color=_SERIES[i % len(_SERIES)], linewidth=3) for i in range(len(decay.channel))]
    handles += [Line2D([], [], color="0.3", linestyle=style) for style in ("-", "--")]
    channels = zip(decay.channel, decay.is_global, strict=True)
    labels = [*(f"channel {channel} ({_kind(is_global)})" for channel, is_global in channels), "original", "LongMamba"]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def census(layers: Layers) -> Figure:
    """Global and local channels of every layer."""
    figure = _figure(6.4, 0.9 + 0.22 * max(len(layers.is_global), 8), "Global and local channels")
    axes = figure.add_subplot()
    numbers = np.arange(len(layers.is_global))
    global_share = np.array([100 * mask.mean() for mask in layers.is_global.values()])
    axes.barh(numbers, global_share, color=_GLOBAL, label="global")
    axes.barh(numbers, 100 - global_share, left=global_share, color=_LOCAL, label="local")
    for number, mask in zip(numbers, layers.is_global.values(), strict=True):
        axes.text(101, float(number), f"{mask.sum():,} of {mask.size:,}", va="center", fontsize=7)
    axes.set_yticks(numbers, [str(layer) for layer in layers.is_global], fontsize=8)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel("channels (%); right: global ones in number")
    axes.set_ylabel("layer")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def filtered_share(share: FilteredShare) -> Figure:
    """Share of the tokens that global channels leave out, in every layer."""
    figure = _figure(9.6, 4.2, "Tokens that global channels leave out (median channel, and quartiles)")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, shares in zip(
        panels, ("whole: one g(S)", "streaming: g follows the position"), (share.whole, share.streaming), strict=True
    ):
        for i, length in enumerate(share.length):
            low, median, high = 100 * shares[i].T
            color = _SERIES[i % len(_SERIES)]
            axes.plot(share.layer, median, color=color, marker="o", markersize=3.5, label=f"S = {length:,}")
            axes.fill_between(share.layer, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axes, "layer", "")
    panels[0].set_ylabel("tokens left out (%)")
    panels[1].legend(frameon=False, fontsize=8)
    return figure


def state_norms(norms: StateNorms) -> Figure:
    """Norm of the states of global channels while the model reads."""
    shown = np.unique(np.linspace(0, len(norms.layer) - 1, 6).round().astype(int))
    figure = _figure(6.8, 4.4, "Norm of the states of global channels (median channel)")
    axes = figure.add_subplot()
    for color, i in zip(_SERIES, shown, strict=False):
        axes.plot(norms.position, norms.original[i], "-", color=color, linewidth=1.2, label=f"layer {norms.layer[i]}")
        axes.plot(norms.position, norms.extended[i], "--", color=color, linewidth=1.6)
    _mark_training_length(axes, norms.training_length)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    _label(axes, "tokens read", "Euclidean norm of the state")
    handles, labels = axes.get_legend_handles_labels()
    handles += [Line2D([], [], color="0.3", linestyle=style) for style in ("-", "--")] + _reference_handles()[:1]
    figure.legend(
        handles,
        [*labels, "original", "LongMamba, streaming", "training length"],
        loc="outside right center",
        frameon=False,
        fontsize=8,
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG in one go."""
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png")
    os.replace(part, path)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _token_axis(axis, length: int) -> None:
    axis.set_ticks([0, length // 2, length], ["0", f"{length // 2:,}", f"{length:,}"])


def _mark_training_length(axes: Axes, training_length: int) -> None:
    axes.axvline(training_length, color="black", linewidth=1, linestyle="--")


def _reference_handles() -> list[Line2D]:
    return [Line2D([], [], color="black", linestyle="--"), Line2D([], [], color="0.3", linestyle=(0, (1, 1)))]


def _draw_receptive_field(axes: Axes, length: int, field: float) -> None:
    """The line as far below the diagonal as the mean distance that the last token sees."""
    (line,) = axes.plot([0, length - field], [field, length], color=_GLOBAL, linewidth=1.2)
    line.set_path_effects([Stroke(linewidth=2.4, foreground="white"), Normal()])
    axes.set_xlim(0, length)
    axes.set_ylim(length, 0)


def _styles(is_global: np.ndarray) -> list[str]:
    """A line style for each channel, different among those of a kind."""
    seen = {False: 0, True: 0}
    styles = []
    for kind in is_global.tolist():
        styles.append(_LINE_STYLES[seen[kind] % len(_LINE_STYLES)])
        seen[kind] += 1
    return styles


def _kind(is_global: bool | np.bool_) -> str:
    return "global" if is_global else "local"


def _lowest(log10_decay: np.ndarray, log10_threshold: float) -> float:
    """Bottom of the axis: local channels fall far below what is of interest."""
    return float(max(np.min(log10_decay), 3 * log10_threshold - 10))
