"""What each task of ``mamba-jax evaluate`` measures, from its options, and how its results are shown."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.tokenizer import Tokenizer
from train.errors import UsageError
from train.settings import did_you_mean
from train.tasks import (
    document_retrieval,
    longbench,
    passkey,
    perplexity_by_length,
    plot,
    prefill_scaling,
)
from train.tasks.cell import Cell
from train.tasks.summary import Row, mapped, pooled
from train.tasks.text import Text

Found = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Keys, with the method, and results."""


@dataclasses.dataclass(frozen=True)
class Plan:
    cells: Sequence[Cell]
    read: str
    """Names what is read by its content: what no calibration may have seen."""
    text: Text | None
    """What is read where that is running text, no part of which a calibration may have seen."""
    identity: Mapping[str, Any]
    """What decides the cells beside the checkpoint, the text and their keys."""
    report: Callable[[Path, Found], dict[str, list[Row]]]
    """Draws keys and results into a folder, and puts them together: tables of rows by name, the first to be printed."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What tasks need to know of the model."""

    tokenizer: Tokenizer
    training_length: int
    held_out: Callable[[], Text]
    """The text the model was not trained on."""


def _text(options: argparse.Namespace, trained: Trained) -> Text:
    # Never the training split: what training or calibration has seen is not evaluated on.
    return Text.of_file(options.text, trained.tokenizer) if options.text else trained.held_out()


def _passkey(options: argparse.Namespace, trained: Trained) -> Plan:
    task = passkey.Passkey(_text(options, trained), options.seed)
    tries = options.tries or 20

    def report(folder: Path, results: Found) -> dict[str, list[Row]]:
        by_cell = pooled(results, ("method", "length", "depth"))
        by_length = pooled(results, ("method", "length"))
        title = f"Passkey retrieval, {tries} tries a cell"
        plot.plot_heat_maps(folder / "passkey_map.png", title, by_cell, training_length=trained.training_length)
        plot.plot_curves(
            folder / "passkey_curve.png",
            "Passkey retrieval over all depths, with 95 % intervals",
            by_length,
            x="length",
            x_label="tokens",
            y_label="found, %",
            training_x=trained.training_length,
            percent=True,
        )
        return {"by_length": by_length, "by_cell": by_cell, "all": pooled(results, ("method",))}

    return Plan(
        passkey.cells(task, lengths=options.lengths or _doublings(1024, 8), depths=options.depths, tries=tries),
        task.text.fingerprint,
        task.text,
        {"tries": tries},
        report,
    )


def _document_retrieval(options: argparse.Namespace, trained: Trained) -> Plan:
    text = None if options.documents_file else _text(options, trained)
    if text is None:
        passages = document_retrieval.PassagesOfFile(options.documents_file, trained.tokenizer)
    else:
        passages = document_retrieval.PassagesOfText(text)
    task = document_retrieval.DocumentRetrieval(passages, options.seed)
    tries = options.tries or 100

    def report(folder: Path, results: Found) -> dict[str, list[Row]]:
        rows = pooled(results, ("method", "documents"))
        plot.plot_curves(
            folder / "document_retrieval.png",
            "Document retrieval, with 95 % intervals",
            rows,
            x="documents",
            x_label="documents",
            y_label="golden document named, %",
            percent=True,
        )
        return {"by_documents": rows}

    cells = document_retrieval.cells(task, documents=options.documents, tries=tries)
    return Plan(cells, passages.fingerprint, text, {"tries": tries}, report)


def _perplexity_by_length(options: argparse.Namespace, trained: Trained) -> Plan:
    text = _text(options, trained)
    all_lengths = _doublings(trained.training_length, 7)
    lengths = options.lengths or [length for length in all_lengths if length <= text.count] or all_lengths[:1]
    windows = options.tries or 20

    def report(folder: Path, results: Found) -> dict[str, list[Row]]:
        rows = mapped(pooled(results, ("method", "length")), lambda loss: math.exp(min(loss, 700.0)))
        plot.plot_curves(
            folder / "perplexity_by_length.png",
            f"Perplexity of the last {perplexity_by_length.LAST} tokens, with 95 % intervals",
            rows,
            x="length",
            x_label="tokens of context and prediction",
            y_label="perplexity a token",
            training_x=trained.training_length,
            log_y=True,
        )
        return {"by_length": rows}

    cells = perplexity_by_length.cells(text, lengths=lengths, windows=windows, seed=options.seed)
    return Plan(cells, text.fingerprint, text, {"windows": windows}, report)


def _longbench(options: argparse.Namespace, trained: Trained) -> Plan:
    if options.data is None:
        raise UsageError("--task longbench needs --data DIR, the folder with LongBench's files NAME.jsonl.")
    names = options.datasets or list(longbench.DATASETS)
    for name in names:
        if name not in longbench.DATASETS:
            hint = did_you_mean(name, longbench.DATASETS)
            raise UsageError(f"--datasets {name}: there are {', '.join(longbench.DATASETS)}.{hint}")
    cells, digests = [], []
    for name in names:
        questions = longbench.read_questions(
            options.data, name, trained.tokenizer, most_tokens=options.max_prompt, count=options.tries
        )
        cells += longbench.cells(questions, name, trained.tokenizer)
        digests.append(f"{name}:{longbench.digest(options.data, name)}")

    def report(folder: Path, results: Found) -> dict[str, list[Row]]:
        rows = pooled(results, ("method", "dataset"))
        plot.plot_bars(
            folder / "longbench.png",
            "LongBench, with 95 % intervals",
            [row | {"dataset": f"{row['dataset']}\n{longbench.DATASETS[row['dataset']].metric}"} for row in rows],
            group="dataset",
            y_label="score, %",
        )
        return {"by_dataset": rows}

    return Plan(cells, " ".join(digests), None, {"max_prompt": options.max_prompt}, report)


def _prefill_scaling(options: argparse.Namespace, trained: Trained) -> Plan:
    lengths = options.lengths or [1 << 20]
    if len(lengths) > 1:
        raise UsageError("--task prefill_scaling reads one prompt: give one length, such as --lengths 1M.")
    length, text = lengths[0], _text(options, trained)

    def report(folder: Path, results: Found) -> dict[str, list[Row]]:
        title = f"Reading {plot.short(length)} tokens, {plot.short(options.chunk)} at a time"
        plot.plot_growth(folder / "prefill_scaling.png", title, {key["method"]: result for key, result in results})
        return {"by_method": [_growth(key, result) for key, result in results]}

    return Plan(prefill_scaling.cells(text, length=length, chunk=options.chunk), text.fingerprint, text, {}, report)


def _growth(key: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
    seconds, in_use = result["seconds"], result["bytes"]
    return {
        "method": key["method"],
        "tokens": result["positions"][-1],
        "seconds": seconds[-1],
        "tokens_per_second": result["positions"][-1] / seconds[-1],
        "r2_of_a_line": prefill_scaling.straightness(result["positions"], seconds),
        "bytes_after_first_chunk": in_use[0],
        "bytes_at_most": max(in_use),
        "peak_bytes": result["peak_bytes"],
    }


def _doublings(first: int, count: int) -> list[int]:
    return [first << i for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Task:
    plan: Callable[[argparse.Namespace, Trained], Plan]
    options: frozenset[str]
    """Names of the options that are of this task and not of every one."""


TASKS = {
    "passkey": Task(_passkey, frozenset({"lengths", "depths", "tries", "text"})),
    "document_retrieval": Task(_document_retrieval, frozenset({"documents", "documents_file", "tries", "text"})),
    "perplexity_by_length": Task(_perplexity_by_length, frozenset({"lengths", "tries", "text"})),
    "longbench": Task(_longbench, frozenset({"data", "datasets", "tries", "max_prompt"})),
    "prefill_scaling": Task(_prefill_scaling, frozenset({"lengths", "text"})),
}
