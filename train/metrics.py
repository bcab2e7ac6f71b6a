"""What a run reports while it goes: metrics.jsonl, TensorBoard, Weights & Biases, a line or a bar on the terminal."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from train.config import MetricsConfig
from train.errors import UserError
from train.plot import plot_loss
from train.workdir import METRICS, PLOT, TENSORBOARD, WANDB_ID

Values = Mapping[str, float | None]
"""Metrics by name; None for what cannot be known here."""

PEAK_FLOPS_PER_SECOND = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bfloat16 multiply-adds a second, times two, by part of the device's name, the first that fits (NVIDIA's data
sheets; where they give a figure with sparsity, half of it)."""


class MetricsWriter:
    """Writes metrics to every place they go to. Use it as a context manager.

    Only the first process of a run writes; in the others all methods do nothing.
    """

    def __init__(self, workdir: Path, config: MetricsConfig, *, first_step: int, total_steps: int):
        """Opens the files, and drops from them what a run wrote after the checkpoint it goes on from.

        Args:
            workdir: folder of the run.
            config: where to write besides metrics.jsonl.
            first_step: step of the checkpoint the run goes on from, 0 at its start.
            total_steps: last step of the run.

        Raises:
            UserError: wandb is asked for and not installed, or the files cannot be written.
        """
        self._workdir = workdir
        self._is_main = jax.process_index() == 0
        self._sinks: list[_Sink] = []
        if not self._is_main:
            return
        with _disk_errors(workdir):
            if config.wandb_project is not None:
                self._sinks.append(_Wandb(workdir, config.wandb_project))
            if config.tensorboard:
                self._sinks.append(_TensorBoard(workdir / TENSORBOARD, first_step))
            self._sinks.append(_JsonLines(workdir / METRICS, first_step))
        self._display = _Display(total_steps)

    def write(self, step: int, values: Values) -> None:
        """Records metrics of a step.

        Raises:
            UserError: a file cannot be written.
        """
        if not self._is_main:
            return
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        with _disk_errors(self._workdir):
            for sink in self._sinks:
                sink.write(step, finite)
        self._display.show(step, values)

    def say(self, text: str) -> None:
        """Prints a line for the user, once for all processes."""
        if self._is_main:
            self._display.print(text)

    def speed(self, tokens_per_second: float, flops_per_token: float) -> dict[str, float | None]:
        """Speed of training on the current mesh, and the share of the devices' peak it makes use of (MFU).

        Args:
            tokens_per_second: over all devices.
            flops_per_token: floating-point operations the model needs for one, without any recomputation.
        """
        peak = peak_flops_per_second(jax.devices()[0].device_kind)
        devices = max(jax.sharding.get_mesh().size, 1)
        mfu = None if peak is None else tokens_per_second * flops_per_token / (devices * peak)
        return {"tokens_per_second": tokens_per_second, "mfu": mfu}

    def finish(self) -> None:
        """Draws the run's losses into loss.png."""
        if self._is_main:
            with _disk_errors(self._workdir):
                plot_loss(self._workdir / METRICS, self._workdir / PLOT)
            self.say(f"metrics and {PLOT} are in {self._workdir}")

    def close(self) -> None:
        """Closes files and the progress bar."""
        if self._is_main:
            self._display.close()
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def peak_flops_per_second(device_kind: str) -> float | None:
    """Peak of a device in dense bfloat16, or None where it is not known (CPUs among others)."""
    return next((peak for part, peak in PEAK_FLOPS_PER_SECOND.items() if part in device_kind), None)


class _Sink(Protocol):
    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """One object a line, on disk as soon as it is written."""

    def __init__(self, path: Path, first_step: int):
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= first_step]
        part = path.with_name(f"{path.name}.part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Values) -> None:
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> Iterator[str]:
    """Lines of a file that may be missing, or end within a line where the run was killed."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(line)
            yield line


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        # Imported here because it is slow to import and not every run wants it.
        from tensorboardX import SummaryWriter

        # TensorBoard leaves out what earlier files have from purge_step on.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, workdir: Path, project: str):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UserError(
                f"Metrics.wandb_project = {project!r} needs the package wandb: pip install 'mamba-jax[wandb]', "
                "or leave the setting out."
            ) from None
        # The id stays with the workdir, so that a resumed run goes on under the same one.
        id_file = workdir / WANDB_ID
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8")
        self._run = wandb.init(project=project, name=workdir.name, id=run_id, resume="allow", dir=str(workdir))

    def write(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Display:
    """A progress bar on a terminal, plain lines anywhere else."""

    def __init__(self, total_steps: int):
        self._total_steps = total_steps
        self._first_timed: tuple[int, float] | None = None
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("compiling the first step ...", total=total_steps)
            self._bar.start()

    def show(self, step: int, values: Values) -> None:
        parts = [f"step {step}/{self._total_steps}", *_described(values)]
        is_evaluation = "eval_loss" in values
        if not is_evaluation and (remaining := self._remaining_seconds(step)) is not None:
            parts.append(f"ETA {_duration(remaining)}")
        text = "  ".join(parts)
        if self._bar is None or is_evaluation:
            self.print(text)
        else:
            self._bar.update(self._task, completed=step, description=text)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _remaining_seconds(self, step: int) -> float | None:
        """From the speed since the first report, which comes after compilation."""
        now = time.monotonic()
        if self._first_timed is None:
            self._first_timed = step, now
            return None
        first_step, began = self._first_timed
        return (now - began) / max(step - first_step, 1) * (self._total_steps - step)


def _described(values: Values) -> Iterator[str]:
    formats = {
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "eval_loss": "held-out loss {:.4f}",
        "eval_bits_per_byte": "held-out bits per byte {:.4f}",
    }
    for name, template in formats.items():
        value = values.get(name)
        if value is not None:
            yield template.format(value)
    if skipped := values.get("skipped"):
        yield f"{skipped:.0f} updates skipped"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def _disk_errors(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"metrics could not be written to {workdir}: {error.strerror or error}. The checkpoints are intact: make "
            "room there, and the same command goes on from the last one."
        ) from None
