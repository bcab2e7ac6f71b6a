"""Cells of an evaluation put together: shares and means with their intervals, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from train.tasks.intervals import bootstrap, wilson

Row = dict[str, Any]
"""A key with what is known of it: ``value``, ``low`` and ``high``, and of how many cases."""


def pooled(cells: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], by: tuple[str, ...]) -> list[Row]:
    """One row for each value of some parts of the keys, over all cells that share it.

    Args:
        cells: keys and results, the results with ``correct`` and ``tries``, or with ``values``.
        by: parts of the key to keep; the cells that differ in others are taken together.

    Returns:
        Rows in the order of the first cell of each.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for key, result in cells:
        groups.setdefault(tuple(key[name] for name in by), []).append(result)
    return [dict(zip(by, values, strict=True)) | _of(results) for values, results in groups.items()]


def _of(results: list[Mapping[str, Any]]) -> Row:
    if "correct" in results[0]:
        correct, tries = (sum(result[name] for result in results) for name in ("correct", "tries"))
        low, high = wilson(correct, tries)
        return {"value": correct / tries, "low": low, "high": high, "correct": correct, "cases": tries}
    values = [value for result in results for value in result["values"]]
    low, high = bootstrap(values)
    return {"value": math.fsum(values) / len(values), "low": low, "high": high, "cases": len(values)}


def mapped(rows: list[Row], function: Callable[[float], float]) -> list[Row]:
    """The rows with a growing function applied to the value and its interval."""
    return [row | {name: function(row[name]) for name in ("value", "low", "high")} for row in rows]
