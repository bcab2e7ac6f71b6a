"""What a benchmark has measured, on disk: the next run with the same folder goes on where one ended or was cut off."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.crossover import crossovers
from benchmarks.hardware import Limits
from benchmarks.measure import Failure, Measurement
from benchmarks.suites import Call, Case
from benchmarks.timing import Timing
from train.errors import UserError

_PACKAGES = ("mamba-jax", "jax", "jaxlib", "numpy", "jax-cuda13-plugin", "mamba_ssm", "causal_conv1d")


def conditions(*, quick: bool, samples: int, seed: int) -> dict[str, Any]:
    """All that results depend on beside the case, in terms of JSON: results of others are not to be mixed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "versions": versions,
        "code": _code(),
        "quick": quick,
        "samples": samples,
        "seed": seed,
    }


class Records:
    """The measurements of one benchmark. A file holds those made under one set of conditions only."""

    def __init__(
        self,
        path: Path,
        conditions: Mapping[str, Any],
        cases: Sequence[Case],
        wanted: Sequence[Case],
        *,
        overwrite: bool,
    ):
        """Reads a file, if there is one.

        Args:
            path: JSON file of the measurements.
            conditions: what they depend on.
            cases: all that the benchmark can have, in the order in which measurements are kept.
            wanted: those of this run. A call that two suites have is measured once.
            overwrite: forget what the file has.

        Raises:
            UserError: the file has measurements made under other conditions, or is not a benchmark's.
        """
        self._path = path
        self._conditions = dict(conditions)
        self._order = {(case.suite, case.call): place for place, case in enumerate(cases)}
        self._wanted: dict[Call, list[str]] = collections.defaultdict(list)
        for case in wanted:
            self._wanted[case.call].append(case.suite)
        self._runs: list[dict[str, str]] = []
        self._measurements: dict[tuple[str, Call], Measurement] = {}
        self._failures: dict[tuple[str, Call], Failure] = {}
        self.limits: Limits | None = None
        """Of the device, as the first run measured them: what the measurements are shares of."""
        if path.exists() and not overwrite:
            self._read()
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self._runs.append(
            {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": command}
        )

    @property
    def measurements(self) -> list[Measurement]:
        """In the order of the cases, whichever run made them."""
        return sorted(
            self._measurements.values(), key=lambda measurement: self._order[measurement.suite, measurement.call]
        )

    def has(self, case: Case) -> bool:
        """Whether a case is measured. One that failed is not: it is tried again."""
        return (case.suite, case.call) in self._measurements

    def add(self, result: Measurement | Failure) -> None:
        """Keeps a result, in memory only, for each wanted suite that has the call."""
        for suite in {result.suite, *self._wanted[result.call]}:
            key = suite, result.call
            self._failures.pop(key, None)
            if isinstance(result, Failure):
                self._failures[key] = dataclasses.replace(result, suite=suite)
            else:
                self._measurements[key] = dataclasses.replace(result, suite=suite)

    def write(self) -> None:
        """Writes all there is in one go: a run that is cut off leaves a whole file."""
        assert self.limits is not None
        measurements = self.measurements
        report = {
            "runs": self._runs,
            **self._conditions,
            "limits": dataclasses.asdict(self.limits),
            "crossover_length": crossovers(measurements),
            "failures": [dataclasses.asdict(failure) for failure in self._failures.values()],
            "measurements": [dataclasses.asdict(measurement) for measurement in measurements],
        }
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)

    def _read(self) -> None:
        try:
            report = json.loads(self._path.read_text(encoding="utf-8"))
            theirs = {name: report.get(name, "not set") for name in self._conditions}
        except (ValueError, AttributeError):
            raise UserError(f"{self._path} is not of a benchmark. {_WAY_OUT}") from None
        if changes := _differences(theirs, self._conditions):
            raise UserError(
                f"{self._path} has measurements made under other conditions:\n  "
                + "\n  ".join(changes)
                + f"\n{_WAY_OUT}"
            )
        self.limits = Limits(**report["limits"])
        self._runs = report["runs"]
        for entry in report["measurements"]:
            self.add(Measurement(**{**entry, "timing": Timing(**entry["timing"])}))
        for entry in report["failures"]:
            failure = Failure(**entry)
            self._failures[failure.suite, failure.call] = failure


_WAY_OUT = "Give another --output, or --overwrite to forget it."


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs, a line each; of what has parts, the parts."""
    lines = []
    for name in dict.fromkeys([*theirs, *ours]):
        there, now = theirs.get(name, "not set"), ours.get(name, "not set")
        if isinstance(there, dict) and isinstance(now, dict):
            lines += _differences(there, now)
        elif there != now:
            lines.append(f"{name}: {there!r} there, {now!r} now")
    return lines


@functools.cache
def _code() -> str:
    """A digest of the sources of the operators and of these measurements."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("benchmarks", "pallas_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
