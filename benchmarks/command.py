"""The command ``mamba-jax benchmark``: times the operators, checks them, prints a table, writes JSON and pictures."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import OPERATOR_NAMES, SUITES
from train.errors import UsageError, UserError

if TYPE_CHECKING:
    from benchmarks.records import Records
    from benchmarks.suites import Call, Case

_SEED = 0
"""Of the inputs: every run measures the same ones."""
_LEAST_BATCH = 4
"""Problems compiled at once: their programs compile on several cores, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    parser.add_argument(
        "operators", nargs="*", metavar="OPERATOR", help=f"what to time, of {', '.join(OPERATOR_NAMES)}; all by default"
    )
    parser.add_argument(
        "--suites",
        nargs="+",
        choices=SUITES,
        default=list(SUITES),
        metavar="SUITE",
        help="named shapes, a sweep over length with attention beside, a sweep over state: shapes, length, state",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, for a look at whether all works, on any device"
    )
    parser.add_argument(
        "--samples", type=int, default=9, metavar="N", help="timings to take the median of (default: 9)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="start no measurement after so many seconds; what was measured until then is written as ever, and the "
        "same command goes on from there",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help="folder for results, whose cases are not measured again (default: runs/benchmark)",
    )
    parser.add_argument("--overwrite", action="store_true", help="forget the results that the folder has")


def run(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: the options ask for what there is not.
        UserError: an operator's result is wrong, the folder has results made under other conditions, or cannot be
            written.
    """
    names = list(dict.fromkeys(options.operators)) or list(OPERATOR_NAMES)
    if unknown := [name for name in names if name not in OPERATOR_NAMES]:
        raise UsageError(f"no operator is called {unknown[0]!r}. There are {', '.join(OPERATOR_NAMES)}.")
    if options.samples < 2:
        raise UsageError(f"--samples must be at least 2, got {options.samples}.")
    # Imported here so that help and mistakes are answered at once.
    import jax

    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not options.quick:
        raise UsageError(f"the full shapes need a GPU, and JAX sees only {jax.default_backend()}. Add --quick.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        _benchmark(names, options, on_gpu=on_gpu)
    except OSError as error:
        raise UserError(f"cannot write results to {options.output}: {error.strerror}.") from error


def _benchmark(names: list[str], options: argparse.Namespace, *, on_gpu: bool) -> None:
    from benchmarks import report
    from benchmarks.crossover import crossovers
    from benchmarks.hardware import measure_limits
    from benchmarks.records import Records, conditions
    from benchmarks.suites import FULL, QUICK, cases

    deadline = math.inf if options.seconds is None else time.monotonic() + options.seconds
    sizes = QUICK if options.quick else FULL
    path = options.output / "benchmark.json"
    made_under = conditions(quick=options.quick, samples=options.samples, seed=_SEED)
    every_case = list(cases(sizes, OPERATOR_NAMES, SUITES, on_gpu=on_gpu))
    # In the order of SUITES, and a call that two of them have only in the first.
    wanted = list(cases(sizes, names, [suite for suite in SUITES if suite in options.suites], on_gpu=on_gpu))
    records = Records(path, made_under, every_case, wanted, overwrite=options.overwrite)
    first: dict[Call, Case] = {}
    for case in wanted:
        first.setdefault(case.call, case)
    planned = list(first.values())
    left = [case for case in planned if not records.has(case)]
    if len(left) < len(planned):
        print(f"{path} has {len(planned) - len(left)} of {len(planned)} cases; --overwrite measures them again")
    if records.limits is None:
        records.limits = measure_limits(copy_bytes=1 << (20 if options.quick else 31))
    limits = records.limits
    print(f"{limits.device}: copies at {limits.bytes / 1e9:.0f} GB/s, read and written", flush=True)

    unmeasured = _measure(left, records, samples=options.samples, deadline=deadline)
    print()
    if unmeasured:
        print(f"out of time: {unmeasured} of {len(planned)} cases are not measured; the same command goes on from here")
    if unmeasured and unmeasured == len(left):
        # The same command would compile as much, and end here again.
        print("nothing was measured: name fewer operators or suites at once, or give more --seconds")
    measurements = records.measurements
    for name, lengths in crossovers(measurements).items():
        for direction, length in lengths.items():
            verdict = "not at any of these lengths" if length is None else f"from {length:,.0f} tokens on"
            print(f"{name} is faster {direction} than attention {verdict}")
    records.write()
    for written in (path, *report.draw(options.output, measurements, limits.device)):
        print(f"wrote {written}")
    if wrong := [m for m in measurements if not m.is_right]:
        raise UserError(f"{len(wrong)} of {len(measurements)} results are wrong, marked so in the table.")


def _measure(cases: Sequence[Case], records: Records, *, samples: int, deadline: float) -> int:
    """Measures cases, a suite's after the other's, and prints rows; returns how many the deadline left undone."""
    from benchmarks import report
    from benchmarks.measure import Failure, fail, measure
    from benchmarks.prepare import prepare_all
    from benchmarks.progress import Progress

    assert records.limits is not None
    progress = Progress(len(cases))
    unmeasured = len(cases)
    for suite, groups in _batches(cases):
        if time.monotonic() > deadline:
            break
        count = sum(len(group) for group in groups)
        print(f"\n{suite}: compiling the programs of {count} cases", flush=True)
        began = time.monotonic()
        prepared = prepare_all(groups, lambda done, groups=groups: print(f"{done} of {len(groups)} shapes", flush=True))
        progress.add_compiled(count, time.monotonic() - began)
        print(f"\n{report.HEADER}", flush=True)
        for group, problem in zip(groups, prepared, strict=True):
            if time.monotonic() > deadline:
                break
            if isinstance(problem, Exception):
                results = (fail(case, problem) for case in group)
            else:
                results = measure(problem, records.limits, samples=samples, seed=_SEED)
            began = time.monotonic()
            for result in results:
                records.add(result)
                # After every case: a run that is cut off leaves what it has measured.
                records.write()
                ended = time.monotonic()
                progress.add_measured(ended - began)
                began = ended
                unmeasured -= 1
                print(f"{result if isinstance(result, Failure) else report.row(result)}  {progress}", flush=True)
    return unmeasured


def _batches(cases: Sequence[Case]) -> Iterator[tuple[str, tuple[tuple[Case, ...], ...]]]:
    """Names of suites, with problems of theirs that are compiled side by side.

    They are about as many as there are cores: compiling more at once takes longer, and is lost if time ends before.
    """
    from benchmarks.prepare import problems

    for suite, of_suite in itertools.groupby(cases, lambda case: case.suite):
        for batch in itertools.batched(problems(list(of_suite)), max(_LEAST_BATCH, os.cpu_count() or 1)):
            yield suite, batch
