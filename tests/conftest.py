"""Settings of every test: eight devices on a CPU, and array shapes and dtypes checked at every call."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

# Tests compile much and compute little: without optimisation they take half the time. GPU code stays as users have it.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import hypothesis
import jax
import jaxtyping
import pytest

PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
"""What was compiled on a CPU, by this run or another: with all of it there the tests take four tenths of the time."""
_SECONDS_KEPT = 7 * 24 * 3600


def pytest_configure(config: pytest.Config) -> None:
    # Before any array exists, and before any of the packages is imported.
    jax.config.update("jax_num_cpu_devices", 8)
    if jax.default_backend() == "cpu":
        keep_programs()
        if not hasattr(config, "workerinput"):
            forget_old_programs()
    jaxtyping.install_import_hook(["mamba_jax", "pallas_kernels", "train"], "beartype.beartype")
    # The first example of a shape compiles; that says nothing about the code's speed. The examples are the same in
    # every run, as all random numbers of the tests are: what fails once fails again.
    hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("reproducible")


def keep_programs() -> None:
    """Takes what is compiled from where the last run left it, and leaves it there; so do processes that tests start."""
    settings = {
        "jax_compilation_cache_dir": str(PROGRAMS),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def forget_old_programs() -> None:
    for program in PROGRAMS.glob("*"):
        if time.time() - program.stat().st_mtime > _SECONDS_KEPT:
            program.unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"JAX sees no GPU, only {jax.default_backend()}"))


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs() -> Iterator[None]:
    """Forgets what a file compiled: each program takes three of the 65,530 memory maps that Linux gives a process.

    Without this the suite, in two processes, once ended in a crash of the compiler, for which this is the likely cause.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """Lets wrong shapes through to the code's own validation, as outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Imported in the fixtures: the packages must not be before ``pytest_configure``.


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Runs GPU kernels in Pallas' interpreter."""
    from pallas_kernels.mosaic_gpu_compat import plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.fixture
def any_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets GPU kernels be traced where they could not run."""
    for operator in ("selective_scan", "causal_conv1d", "ssd", "keep_above", "gated_rms_norm"):
        kernels = importlib.import_module(f"pallas_kernels.{operator}.mosaic_gpu")
        monkeypatch.setattr(kernels, "missing_hardware", lambda *_: None)
