"""What the profiler saw on the GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """One run of a kernel, or a copy; nanoseconds on the device's clock."""

    start: float
    end: float
    name: str


def kernels(run: Callable[[], Any]) -> list[Kernel]:
    """Runs a function and returns all that ran on the GPU's streams meanwhile, in the order of their starts.

    Args:
        run: should wait for what it has started, or that may be missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        streams = [
            line
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
        ]
        return sorted(Kernel(event.start_ns, event.end_ns, event.name) for line in streams for event in line.events)
