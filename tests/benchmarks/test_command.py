"""The benchmark command."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import pytest

from benchmarks import command, suites
from benchmarks.operators import OPERATORS
from train.errors import UsageError, UserError


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


@pytest.fixture
def smallest(monkeypatch):
    sizes = suites.Sizes(
        tokens=((1, 16, 32),),
        state=2,
        ssd_state=2,
        width=2,
        lengths=(8, 16),
        sweep_channels=32,
        head_dim=4,
        states=(1, 2),
        state_tokens=(1, 8),
    )
    monkeypatch.setattr(suites, "QUICK", sizes)


@pytest.mark.usefixtures("smallest")
def test_writes_table_json_and_pictures(tmp_path, capsys):
    run("--quick", "--samples", "2", "--output", str(tmp_path))
    report = json.loads((tmp_path / "benchmark.json").read_text())
    measured = {(m["suite"], m["operator"], m["direction"]) for m in report["measurements"]}
    both = ("forward", "backward")
    assert measured == {
        *(("shapes", name, direction) for name in OPERATORS for direction in both),
        *(("length", name, direction) for name in (*OPERATORS, "attention") for direction in both),
        *(("state", name, direction) for name in ("selective_scan", "ssd", "trapezoidal_ssd") for direction in both),
    }
    assert report["device"] == jax.devices()[0].device_kind
    assert report["versions"]["jax"] == jax.__version__
    assert report["failures"] == []
    for name in (
        "selective_scan_by_length",
        "selective_scan_by_state",
        "ssd_by_length",
        "ssd_by_state",
        "trapezoidal_ssd_by_state",
        "causal_conv1d_by_length",
    ):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("selective_scan  backward  xla") == 5
    assert "than attention" in printed


@pytest.mark.usefixtures("smallest")
def test_a_wrong_result_fails_the_command_and_is_marked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.measure.MAX_ERROR", {"forward": 0.0, "backward": 1.0})
    with pytest.raises(UserError, match="1 of 2 results are wrong"):
        run("causal_conv1d", "--suites", "shapes", "--quick", "--samples", "2", "--output", str(tmp_path))
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.usefixtures("smallest")
def test_a_run_that_is_cut_off_leaves_what_it_has_measured(tmp_path, monkeypatch):
    real = OPERATORS["causal_conv1d"].call

    def call(arrays, *, implementation):
        if arrays["x"].shape[1] == 16:
            raise KeyboardInterrupt
        return real(arrays, implementation=implementation)

    monkeypatch.setitem(OPERATORS, "causal_conv1d", dataclasses.replace(OPERATORS["causal_conv1d"], call=call))
    with pytest.raises(KeyboardInterrupt):
        run("causal_conv1d", "--suites", "length", "--quick", "--samples", "2", "--output", str(tmp_path))
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [m["shape"]["length"] for m in report["measurements"]] == [8, 8]


@pytest.mark.usefixtures("smallest")
def test_out_of_time_is_said(tmp_path, capsys):
    arguments = ("--suites", "shapes", "--quick", "--samples", "2", "--output", str(tmp_path))
    run("causal_conv1d", *arguments, "--seconds", "0")
    assert "out of time: 2 of 2 cases were not measured" in capsys.readouterr().out
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["measurements"] == []
    assert report["failures"] == ["out of time: 2 of 2 cases were not measured"]


@pytest.mark.usefixtures("smallest")
def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch):
    real = OPERATORS["causal_conv1d"].call

    def call(arrays, *, implementation):
        if arrays["x"].shape[1] == 8:
            raise RuntimeError("too short\nand more")
        return real(arrays, implementation=implementation)

    monkeypatch.setitem(OPERATORS, "causal_conv1d", dataclasses.replace(OPERATORS["causal_conv1d"], call=call))
    run("causal_conv1d", "--suites", "length", "--quick", "--samples", "2", "--output", str(tmp_path))
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(report["measurements"]) == 2
    assert report["failures"][0].startswith("causal_conv1d forward by xla, batch 1, length 8")
    assert report["failures"][0].endswith(": too short")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["selectve_scan"],
            r"no operator is called 'selectve_scan'. There are selective_scan, ssd, trapezoidal_ssd, causal_conv1d",
        ),
        (["--samples", "1"], "--samples must be at least 2, got 1"),
    ],
)
def test_says_what_is_wrong_with_the_options(arguments, message):
    with pytest.raises(UsageError, match=message):
        run(*arguments)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_asks_for_quick_where_there_is_no_gpu():
    with pytest.raises(UsageError, match=r"the full shapes need a GPU, and JAX sees only cpu. Add --quick"):
        run()


def test_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write results to .*file"):
        run("--quick", "--output", str(tmp_path / "file"))
