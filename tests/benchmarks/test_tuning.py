"""Timing variants of kernels beside each other."""

from __future__ import annotations

import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tune_causal_conv1d, tune_selective_scan, tune_ssd, tune_trapezoidal_ssd, tuning
from benchmarks.profiler import Kernel
from benchmarks.tuning import Variant, short_name, times_by_kernel, tune
from pallas_kernels.ssd import mosaic_gpu as ssd_kernels

SIZES = (3, 4)


def make(shape, seed):
    return {"x": jnp.full(shape, 1.0 + seed)}


@pytest.fixture
def clock(monkeypatch):
    """Gives every call a millisecond, and two to those of a function that doubles."""

    def device_times(run, sets):
        span = 1.0 + (run(sets[0]).sum() > sets[0]["x"].sum())
        return {"span": [span] * 3, "main": [0.5, 0.25, 9.0]}

    monkeypatch.setattr(tuning, "device_times", device_times)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("selective_scan_forward_mosaic_gpu_kernel", "forward"),
        ("ssd_states_mosaic_gpu_kernel", "states"),
        ("trapezoidal_ssd_backward_mosaic_gpu_kernel", "backward"),
        ("causal_conv1d_forward_mosaic_gpu_kernel", "forward"),
        ("input_reduce_fusion_1", "input_reduce_fusion_1"),
        ("loop_multiply_convert_select_fusion", "loop_multiply_convert_se"),
    ],
)
def test_a_kernel_is_named_by_what_it_does(kernel, name):
    assert short_name(kernel) == name


def test_a_call_lasts_from_its_first_kernel_to_its_last():
    events = [
        Kernel(0, 2e6, "ssd_states_mosaic_gpu_kernel"),
        Kernel(3e6, 3e6 + 900, "copy"),
        Kernel(10e6, 13e6, "ssd_states_mosaic_gpu_kernel"),
        Kernel(13.5e6, 14e6, "copy"),
    ]
    assert times_by_kernel(events, 2) == {"span": [3.0009, 4.0], "states": [2.0, 3.0], "copy": [0.5]}


@pytest.mark.parametrize("count", [0, 3])
def test_calls_of_unequal_numbers_of_kernels_are_not_told_apart(count):
    with pytest.raises(RuntimeError, match=f"{count} kernels in 2 calls"):
        times_by_kernel([Kernel(0, 1, "copy")] * count, 2)


def test_variants_are_timed_and_compared_with_the_first(clock, capsys):
    variants = [
        Variant("forward", SIZES, "same", lambda a: a["x"]),
        Variant("forward", SIZES, "double", lambda a: 2 * a["x"]),
        Variant("whole", SIZES, "another", lambda a: 2 * a["x"], comparable=False),
    ]
    tune(variants, make, math.inf, {"forward": lambda a: a["x"] - 0.0})
    title, same, double, whole, another = capsys.readouterr().out.splitlines()
    assert title == "== forward (3, 4), limit 1.0000 ms"
    assert [part in same for part in ("1.0000 ms", "1.000x", "differs by 0.0e+00", "[main 0.5000]")] == [True] * 4
    assert [part in double for part in ("2.0000 ms", "2.000x", "differs by 1.0e+00")] == [True] * 3
    assert whole == "== whole (3, 4)"
    assert "2.0000 ms" in another
    assert "differs" not in another


def test_a_variant_that_fails_does_not_stop_the_others(clock, capsys):
    def fail(_):
        raise ValueError("no room in shared memory")

    variants = [Variant("forward", SIZES, "bad", fail), Variant("forward", SIZES, "good", lambda a: a["x"])]
    tune(variants, make, math.inf)
    _, bad, good = capsys.readouterr().out.splitlines()
    assert "failed: 'no room in shared memory'" in bad
    assert "differs by 0.0e+00" in good


def test_after_the_deadline_nothing_is_timed_and_little_compiled(clock, capsys):
    started = itertools.count()
    endless = (Variant("forward", SIZES, str(next(started)), lambda a: a["x"]) for _ in itertools.count())
    tune(endless, make, time.monotonic() - 1)
    assert capsys.readouterr().out.splitlines()[-1] == "out of time"
    assert next(started) < 20


def test_inputs_fill_the_cache_but_not_the_memory(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(tuning, "device_times", lambda run, sets: seen.append(len(sets)) or {"span": [1.0]})
    monkeypatch.setattr(tuning, "L2_BYTES", 600)
    # Of 4 bytes a number: three times the cache in two sets, in five, and in more than there is use for.
    for size in (500, 100, 10):
        tune([Variant("forward", (size,), "same", lambda a: a["x"])], make, math.inf)
    assert seen == [2, 5, 8]


@pytest.mark.parametrize(
    ("script", "arguments", "titles"),
    [
        (tune_selective_scan, "--forward small --backward small", {"forward small", "backward small"}),
        (tune_ssd, "--whole long --forward long --backward long", {"whole", "forward", "backward"}),
        (tune_trapezoidal_ssd, "--whole medium", {"whole"}),
        (tune_causal_conv1d, "--forward --backward --all", {"forward", "backward"}),
    ],
    ids=["selective_scan", "ssd", "trapezoidal_ssd", "causal_conv1d"],
)
def test_a_script_times_passes_over_all_tokens(script, arguments, titles, monkeypatch):
    given = []
    for module in (tuning, script):
        monkeypatch.setattr(module, "tune", lambda *arguments: given.extend(arguments), raising=False)
    monkeypatch.setattr(sys, "argv", ["tune", *arguments.split()])
    monkeypatch.setattr(ssd_kernels, "missing_hardware", lambda *_: None)
    script.main()
    variants, make_arrays = list(given[0]), given[1]
    assert {variant.title for variant in variants} == titles
    assert len({(variant.title, variant.label) for variant in variants}) >= 2 * len(titles)
    for variant in {(variant.title, variant.label[-8:] == "backward"): variant for variant in variants}.values():
        arrays = jax.eval_shape(lambda shape=variant.shape: make_arrays(shape, 0))
        results = jax.tree.leaves(jax.eval_shape(variant.run, arrays))
        assert arrays["x"].shape in [result.shape for result in results]
