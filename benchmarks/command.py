"""The command ``mamba-jax benchmark``: times the operators, checks them, prints a table, writes JSON and pictures."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from benchmarks import OPERATOR_NAMES, SUITES
from train.errors import UsageError, UserError


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
        help="start no measurement after so many seconds; what was measured until then is written as ever",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help="folder for results (default: runs/benchmark)",
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: the options ask for what there is not.
        UserError: an operator's result is wrong, or the results cannot be written.
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
    from benchmarks.hardware import measure_limits
    from benchmarks.measure import Measurement, measure, measure_peer
    from benchmarks.suites import FULL, QUICK, cases

    limits = measure_limits(copy_bytes=1 << (20 if options.quick else 31))
    print(f"{limits.device}: copies at {limits.bytes / 1e9:.0f} GB/s, read and written\n\n{report.HEADER}", flush=True)
    measurements: list[Measurement] = []
    failures = []
    path = options.output / "benchmark.json"
    deadline = math.inf if options.seconds is None else time.monotonic() + options.seconds
    planned = list(cases(QUICK if options.quick else FULL, names, options.suites, on_gpu=on_gpu))
    for number, case in enumerate(planned):
        if time.monotonic() > deadline:
            failures.append(f"out of time: {len(planned) - number} of {len(planned)} cases were not measured")
            print(failures[-1], flush=True)
            break
        try:
            results = [measure(case, limits, samples=options.samples)]
            if on_gpu and case.implementation == case.operator.implementations[0]:
                results += measure_peer(case, limits, samples=options.samples)
        # JAX's own, of which lacking memory is one, UnsupportedError, and what cuDNN's checks of its arguments raise.
        except (RuntimeError, ValueError) as error:
            shape = ", ".join(f"{dim} {size}" for dim, size in case.shape.items())
            reason = str(error).splitlines()[0]
            failures.append(f"{case.operator.name} {case.direction} by {case.implementation}, {shape}: {reason}")
            print(failures[-1], flush=True)
            continue
        for measurement in results:
            print(report.row(measurement), flush=True)
        measurements += results
        # After every case: a run that is cut off leaves what it has measured.
        report.write_json(path, measurements, limits, failures)
    print()
    for name, lengths in report.crossovers(measurements).items():
        for direction, length in lengths.items():
            verdict = "not at any of these lengths" if length is None else f"from {length:,.0f} tokens on"
            print(f"{name} is faster {direction} than attention {verdict}")
    report.write_json(path, measurements, limits, failures)
    for written in (path, *report.draw(options.output, measurements, limits.device)):
        print(f"wrote {written}")
    if wrong := [m for m in measurements if not m.is_right]:
        raise UserError(f"{len(wrong)} of {len(measurements)} results are wrong, marked so in the table.")
