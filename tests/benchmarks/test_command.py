"""The benchmark command."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import pytest

from benchmarks import command, suites
from benchmarks.operators import OPERATORS
from benchmarks.timing import time_program
from train.errors import UsageError, UserError


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


@pytest.fixture
def smallest(monkeypatch):
    sizes = suites.Sizes(
        # The first length and the last state of the sweeps: measured once.
        tokens=((1, 8, 32),),
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
def test_writes_table_json_and_pictures(tmp_path, capsys, monkeypatch):
    # A second length would be a third of the time, and no other code: the sweep over state has two values.
    monkeypatch.setattr(suites, "QUICK", dataclasses.replace(suites.QUICK, lengths=(8,)))
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
        "gated_rms_norm_by_length",
    ):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("selective_scan  backward  xla") == 2
    backward = [m for m in report["measurements"] if (m["operator"], m["direction"]) == ("selective_scan", "backward")]
    assert [(m["suite"], m["shape"]["length"], m["shape"]["state"]) for m in backward] == [
        ("shapes", 8, 2),
        ("length", 8, 2),
        ("state", 8, 1),
        ("state", 8, 2),
    ]
    timings = [m["timing"] for m in backward]
    assert timings[0] == timings[1] == timings[3]
    assert "than attention" in printed


@pytest.mark.usefixtures("smallest")
def test_a_wrong_result_fails_the_command_and_is_marked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.measure.MAX_ERROR", {"forward": 0.0, "backward": 1.0})
    with pytest.raises(UserError, match="1 of 2 results are wrong"):
        run("causal_conv1d", "--suites", "shapes", "--quick", "--samples", "2", "--output", str(tmp_path))
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.usefixtures("smallest")
class TestPieces:
    """A benchmark made by several runs."""

    @pytest.fixture
    def output(self, tmp_path):
        return tmp_path

    def run(self, output, *arguments):
        run("causal_conv1d", "--quick", "--samples", "2", "--output", str(output), *arguments)
        return json.loads((output / "benchmark.json").read_text())

    def test_a_run_that_is_cut_off_is_gone_on_with(self, output, monkeypatch):
        timed = []

        def time_until_cut_off(*arguments, **options):
            timed.append(arguments)
            if len(timed) == 3:
                raise KeyboardInterrupt
            return time_program(*arguments, **options)

        monkeypatch.setattr("benchmarks.measure.time_program", time_until_cut_off)
        with pytest.raises(KeyboardInterrupt):
            self.run(output, "--suites", "length")
        before = json.loads((output / "benchmark.json").read_text())
        assert [m["shape"]["length"] for m in before["measurements"]] == [8, 8]
        after = self.run(output, "--suites", "length")
        assert len(timed) == 3 + 2
        assert [(m["shape"]["length"], m["direction"]) for m in after["measurements"]] == [
            (8, "forward"),
            (8, "backward"),
            (16, "forward"),
            (16, "backward"),
        ]
        assert after["measurements"][:2] == before["measurements"]
        assert after["limits"] == before["limits"]
        assert len(after["runs"]) == 2

    def test_pieces_are_kept_in_one_order_whichever_was_first(self, output):
        length = self.run(output, "--suites", "length")
        report = self.run(output, "--suites", "shapes")
        assert [m["suite"] for m in report["measurements"]] == ["shapes"] * 2 + ["length"] * 4
        # The shape is one of the lengths, which the first run has measured.
        assert report["measurements"][0]["timing"] == length["measurements"][0]["timing"]
        assert (output / "causal_conv1d_by_length.png").exists()

    def test_shapes_come_first_whatever_shares_them(self, output, monkeypatch, capsys):
        monkeypatch.setattr(suites, "QUICK", dataclasses.replace(suites.QUICK, tokens=((1, 16, 32),)))
        self.run(output, "--suites", "length", "shapes")
        started = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "compiling" in line]
        assert started == ["shapes", "length"]

    def test_out_of_time_is_said(self, output, capsys):
        report = self.run(output, "--suites", "shapes", "--seconds", "0")
        printed = capsys.readouterr().out
        assert "out of time: 2 of 2 cases are not measured; the same command goes on from here" in printed
        assert "nothing was measured: name fewer operators or suites at once" in printed
        assert report["measurements"] == []

    def test_one_failure_does_not_stop_the_others_and_is_tried_again(self, output, monkeypatch, capsys):
        real = OPERATORS["causal_conv1d"].call

        def call(arrays, *, implementation):
            if arrays["x"].shape[1] == 8 and implementation == "xla":
                raise RuntimeError("too short\nand more")
            return real(arrays, implementation=implementation)

        with monkeypatch.context() as patch:
            patch.setitem(OPERATORS, "causal_conv1d", dataclasses.replace(OPERATORS["causal_conv1d"], call=call))
            report = self.run(output, "--suites", "length")
        assert [m["shape"]["length"] for m in report["measurements"]] == [16, 16]
        assert [failure["reason"] for failure in report["failures"]] == ["too short"] * 2
        failure = "causal_conv1d forward by xla, batch 1, length 8, channels 32, width 2: too short"
        assert failure in capsys.readouterr().out
        report = self.run(output, "--suites", "length")
        assert [m["shape"]["length"] for m in report["measurements"]] == [8, 8, 16, 16]
        assert report["failures"] == []

    def test_results_of_other_conditions_are_not_mixed(self, output, monkeypatch):
        nothing = ("--suites", "shapes", "--seconds", "0")
        self.run(output, *nothing)
        with pytest.raises(UserError, match=r"(?s)samples: 2 there, 3 now\nGive another --output, or --overwrite"):
            self.run(output, *nothing, "--samples", "3")
        monkeypatch.setattr("benchmarks.records._code", lambda: "edited")
        monkeypatch.setattr("benchmarks.records.platform.python_version", lambda: "3.99")
        with pytest.raises(UserError, match=r"(?s)python: '3.*' there, '3.99' now.*code: '.*' there, 'edited' now"):
            self.run(output, *nothing)
        assert self.run(output, *nothing, "--overwrite")["code"] == "edited"

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_a_file_of_something_else_is_left_alone(self, output, content):
        (output / "benchmark.json").write_text(content)
        with pytest.raises(UserError, match=r"benchmark.json is not of a benchmark. Give another --output"):
            self.run(output)
        assert (output / "benchmark.json").read_text() == content


def test_no_more_is_compiled_before_it_is_measured_than_cores_can_do_at_once(monkeypatch):
    monkeypatch.setattr("benchmarks.command.os.cpu_count", lambda: 5)
    cases = list(suites.cases(suites.FULL, ["causal_conv1d"], ["shapes", "length"], on_gpu=True))
    batches = list(command._batches(cases))
    assert [case for _, batch in batches for problem in batch for case in problem] == cases
    assert all(case.suite == suite for suite, batch in batches for problem in batch for case in problem)
    # Four shapes and nine lengths, forward and backward.
    assert [len(batch) for _, batch in batches] == [5, 3, 5, 5, 5, 3]


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
