from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from train.config import MeshConfig, MetricsConfig
from train.errors import UserError
from train.mesh import make_mesh
from train.metrics import MetricsWriter, peak_flops_per_second


def writer(workdir: Path, first_step: int = 0, total_steps: int = 100, **config) -> MetricsWriter:
    config = {"tensorboard": False} | config
    return MetricsWriter(workdir, MetricsConfig(**config), first_step=first_step, total_steps=total_steps)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_each_write_is_one_object_a_line(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write(1, {"loss": 5.5})
        metrics.write(10, {"loss": 4.25, "tokens_per_second": 1e4, "mfu": None})
        metrics.write(10, {"eval_loss": 4.5, "eval_bits_per_byte": 6.5})
        assert len(lines(tmp_path)) == 3  # before it is closed
    assert lines(tmp_path) == [
        {"step": 1, "loss": 5.5},
        {"step": 10, "loss": 4.25, "tokens_per_second": 1e4, "mfu": None},
        {"step": 10, "eval_loss": 4.5, "eval_bits_per_byte": 6.5},
    ]


def test_what_is_not_a_number_is_written_as_json_can(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write(1, {"loss": float("nan"), "gradient_norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "gradient_norm": null}\n'


def test_a_resumed_run_has_each_step_once(tmp_path):
    with writer(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    with writer(tmp_path, first_step=20) as metrics:
        metrics.write(30, {"loss": 31.0})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 30, "loss": 31.0},
    ]


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
    with writer(tmp_path, tensorboard=True) as metrics:
        metrics.write(3, {"loss": 2.5, "mfu": None})
        metrics.write(4, {"eval_loss": 1.5})
    assert read_scalars(tmp_path / "tensorboard") == [("loss", 3, 2.5), ("eval_loss", 4, 1.5)]


def read_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """TFRecords: length (8 bytes), its checksum (4), an Event in protocol buffers, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[length + 16 :]
    return found


def test_wandb_gets_the_numbers_and_the_same_id_after_resuming(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.logged, self.finished = settings, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    for first_step in (0, 1):
        with writer(tmp_path, first_step, wandb_project="mambas") as metrics:
            metrics.write(first_step + 1, {"loss": 2.5, "mfu": None})
    assert runs[0].logged == [(1, {"loss": 2.5})]
    assert runs[0].settings["project"] == "mambas"
    assert runs[0].settings["id"] == runs[1].settings["id"]
    assert runs[1].settings["resume"] == "allow"
    assert all(run.finished for run in runs)


def test_wandb_that_is_not_installed_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'mamba-jax\[wandb\]'"):
        writer(tmp_path, wandb_project="mambas")


def test_a_pipe_gets_plain_lines(tmp_path, capsys):
    with writer(tmp_path, total_steps=1000) as metrics:
        metrics.write(1, {"loss": 5.54321})
        metrics.write(10, {"loss": 4.0, "tokens_per_second": 12345.6, "mfu": 0.4213, "skipped": 2.0})
        metrics.write(10, {"eval_loss": 3.5, "eval_bits_per_byte": 5.05})
        metrics.say("stopped [at] step 10")
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first == "step 1/1000  loss 5.5432"
    pattern = r"step 10/1000  loss 4\.0000  12,346 tokens/s  MFU 42\.1%  2 updates skipped  ETA (\d+:)?\d+:\d\d"
    assert re.fullmatch(pattern, second)
    assert third == "step 10/1000  held-out loss 3.5000  held-out bits per byte 5.0500"
    assert fourth == "stopped [at] step 10"


def test_a_terminal_gets_a_bar_that_moves(tmp_path):
    program = f"""
from pathlib import Path
from train.config import MetricsConfig
from train.metrics import MetricsWriter
with MetricsWriter(Path({str(tmp_path)!r}), MetricsConfig(tensorboard=False), first_step=0, total_steps=8) as metrics:
    for step in (1, 2, 4):
        metrics.write(step, {{"loss": 2.5, "tokens_per_second": 1000.0}})
    metrics.write(4, {{"eval_loss": 2.25}})
"""
    controller, terminal = pty.openpty()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    screen = b""
    while chunk := _read(controller):
        screen += chunk
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.decode())
    assert "50%" in text
    assert "step 4/8  loss 2.5000  1,000 tokens/s" in text
    assert "step 4/8  held-out loss 2.2500" in text


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_mfu_is_the_share_of_the_peak_of_all_devices_in_the_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr("train.metrics.peak_flops_per_second", lambda kind: 100.0)
    with writer(tmp_path) as metrics:
        assert metrics.speed(10.0, 5.0) == {"tokens_per_second": 10.0, "mfu": 0.5}
        with jax.set_mesh(make_mesh(MeshConfig(data=4))):
            assert metrics.speed(10.0, 5.0)["mfu"] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GB200", 2.5e15),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_the_device_s_name(kind, peak):
    assert peak_flops_per_second(kind) == peak


def test_the_picture_shows_both_losses(tmp_path):
    with writer(tmp_path) as metrics:
        for step in range(1, 101):
            metrics.write(step, {"loss": 1 + 5 / step})
            if step % 25 == 0:
                metrics.write(step, {"eval_loss": 1.1 + 5 / step})
        metrics.finish()
    # Matplotlib's own reader; colours are those of the two lines.
    from matplotlib.image import imread

    pixels = imread(tmp_path / "loss.png")[..., :3].reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert np.sum(np.all(np.abs(pixels - np.array(colour) / 255) < 0.02, axis=1)) > 500


def test_a_run_without_numbers_has_a_picture_too(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write(1, {"loss": float("nan")})
        metrics.finish()
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_disk_that_is_full_is_said_without_a_traceback(tmp_path, monkeypatch):
    with writer(tmp_path) as metrics:
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(metrics._sinks[-1], "_file", full)
            with pytest.raises(UserError, match="No space left on device"):
                metrics.write(1, {"loss": 1.0})
        monkeypatch.undo()


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with writer(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.say("hello")
        metrics.finish()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
