"""Runs the cells of a task, method by method: those that are known already are skipped, the others kept at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.console
import rich.progress
from jax.errors import JaxRuntimeError

from mamba_jax.long_context.fingerprint import fingerprint
from mamba_jax.models.language_model import LanguageModel
from train.checkpoint import load_for_inference
from train.data import pipeline
from train.data.tokenizer import tokenizer_from_description
from train.errors import UserError
from train.tasks.cell import Cell, Result
from train.tasks.command import METHOD_OPTIONS, asked_methods
from train.tasks.intervals import CONFIDENCE
from train.tasks.methods import (
    METHODS,
    Setting,
    check_names,
    extended,
    load_calibration,
    too_few_layers,
    without_effect,
)
from train.tasks.plans import TASKS, Trained
from train.tasks.reading import Reading
from train.tasks.results import Key, Results, write_json
from train.tasks.summary import Row
from train.tasks.text import Text
from train.workdir import EVALUATIONS

_SECONDS_BETWEEN_LINES = 5.0


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A cell with the method it is measured by, and the key its result is kept under."""

    method: str
    cell: Cell
    key: Key


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs ``mamba-jax evaluate --task``; see ``train.tasks.command``."""
    methods = check_names(asked_methods(options))
    checkpoint = load_for_inference(options.checkpoint)
    data = checkpoint.experiment.data
    tokenizer = tokenizer_from_description(checkpoint.tokenizer)
    trained = Trained(tokenizer, data.sequence_length, lambda: Text(pipeline.load(data).held_out))
    plan = TASKS[options.task].plan(options, trained)
    step, model = checkpoint.restore_model()
    calibration = load_calibration(
        options.calibration, methods, model, options.checkpoint, read=plan.read, text=plan.text
    )
    setting = Setting(data.sequence_length, calibration, **{name: getattr(options, name) for name in METHOD_OPTIONS})
    for method in [method for method in methods if method not in options.methods]:
        if reason := too_few_layers(method, setting):
            print(reason, file=sys.stderr)
            methods.remove(method)
    longest = max(cell.length for cell in plan.cells)
    for method in methods:  # found out before hours are spent on the others
        extended(method, model, setting, longest)
        if reason := without_effect(method, model, setting, longest):
            print(reason, file=sys.stderr)

    folder = options.output or checkpoint.folder.parent / EVALUATIONS / options.task
    identity = {"task": options.task, "checkpoint": fingerprint(model)[:16], "read": plan.read, "seed": options.seed}
    identity |= plan.identity
    results = Results(folder, identity, overwrite=options.overwrite)
    asked = [_Asked(method, cell, _key(method, cell, options)) for method in methods for cell in plan.cells]
    pending = [one for one in asked if results.get(one.key) is None]
    if len(pending) < len(asked):
        print(f"{len(asked) - len(pending)} of {len(asked)} cells are known already", file=sys.stderr)
    _measure(pending, model, setting, results, options)

    found = [({"method": one.method, **one.cell.key}, results.get(one.key) or {}) for one in asked]
    tables = plan.report(folder, found)
    written = {"identity": identity, "step": step, "confidence": CONFIDENCE, "device": jax.devices()[0].device_kind}
    write_json(folder / f"{options.task}.json", written | tables)
    _print(next(iter(tables.values())))
    print(f"results and pictures are in {folder}")
    return written | tables


def _measure(
    pending: Sequence[_Asked], model: LanguageModel, setting: Setting, results: Results, options: argparse.Namespace
) -> None:
    """Measures cells in their order and keeps each result, extending the model once for each method and length."""
    with _progress(options.task, sum(one.cell.tokens for one in pending)) as done:
        for (method, length), group in itertools.groupby(pending, lambda one: (one.method, one.cell.length)):
            reader = extended(method, model, setting, length)
            reading = Reading(options.chunk if METHODS[method].in_chunks else None, options.tokens_at_a_time)
            for one in group:
                result = _measured(one.cell, reader, reading)
                results.add(one.key, result)
                done(f"{method} {_named(one.cell)}: {_said(result)}", one.cell.tokens)


def _measured(cell: Cell, model: LanguageModel, reading: Reading) -> Result:
    try:
        return cell.measure(model, reading)
    except JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise UserError(
            f"the device has too little memory for {cell.length} tokens: lower --tokens_at_a_time, then --chunk. What "
            "is finished is kept; the same command goes on from here."
        ) from error


def _key(method: str, cell: Cell, options: argparse.Namespace) -> Key:
    """The cell's key with the method, and what decides the result of a method that is calibrated or takes options."""
    key = {"method": method, **cell.key}
    if METHODS[method].needs_calibration:
        digest = hashlib.sha256(options.calibration.read_bytes()).hexdigest()[:16]
        key |= {"calibration": digest}
    given = {name: getattr(options, name) for name in METHOD_OPTIONS if name in METHODS[method].options}
    return key | {name: value for name, value in given.items() if value is not None}


def _named(cell: Cell) -> str:
    shown = {name: value for name, value in cell.key.items() if not isinstance(value, list)}
    return " ".join(f"{name} {value}" for name, value in shown.items()) + f" ({cell.length:,} tokens at most)"


def _said(result: Result) -> str:
    if "correct" in result:
        return f"{result['correct']} of {result['tries']}"
    if "values" in result:
        return f"{sum(result['values']) / len(result['values']):.4f}"
    return f"{result['seconds'][-1]:.2f} s"


def _print(rows: Sequence[Row]) -> None:
    names = list(rows[0])
    table = [names, *([_formatted(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    for line in table:
        print("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)))


def _formatted(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class _Lines:
    """Now and then a line."""

    def __init__(self, tokens: int):
        self._total, self._done = tokens, 0
        self._began, self._last = time.monotonic(), -math.inf

    def __call__(self, text: str, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last = now
            share = self._done / max(self._total, 1)
            print(f"{share:.0%} in {now - self._began:.0f} s, {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(task: str, tokens: int) -> Iterator[Callable[[str, int], None]]:
    """Yields a function to call with a finished cell and its tokens: a bar on a terminal, lines anywhere else."""
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Lines(tokens)
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task(task, total=tokens)

        def done(text: str, count: int) -> None:
            progress.console.print(text, markup=False)
            progress.advance(bar, count)

        yield done
