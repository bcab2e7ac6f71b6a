"""The folder of a run: who it belongs to, and what of it may be removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from train import gin
from train.config import Experiment
from train.errors import UserError
from train.settings import differences, from_json, to_json

CONFIG = "config.json"
"""The resolved config; a folder that has it is a run's."""
CONFIG_GIN = "config.gin"
"""The same as gin text, to read and to start other runs from."""
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
"""Checkpoints that could not be read when the run was resumed."""
METRICS = "metrics.jsonl"
PLOT = "loss.png"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"
EVALUATIONS = "evaluations"
"""Results of tasks, a folder each."""

_FILES = (CONFIG, CONFIG_GIN, CHECKPOINTS, DAMAGED, METRICS, PLOT, TENSORBOARD, WANDB_ID, "wandb", EVALUATIONS)

MAY_CHANGE = frozenset(
    {
        *("Train.log_every", "Train.eval_every", "Train.eval_batches"),
        *("Data.read_threads", "Data.prefetch"),
        *("Checkpoint", "Mesh", "Metrics"),
    }
)
"""Settings and groups that do not decide what a run computes (but for the order of sums, in the case of the mesh)."""


def claim(workdir: Path, experiment: Experiment, *, overwrite: bool) -> None:
    """Makes ``workdir`` the folder of this run and writes its config there, before anything else is done.

    Args:
        workdir: a new folder, or the folder of a run that is to go on.
        experiment: the run's config.
        overwrite: remove what an earlier run left in the folder, and only that.

    Raises:
        UserError: the folder cannot be written, holds a run of another config, or files that no run has made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _remove_run(workdir)
        _check_owner(workdir, experiment)
        _write(workdir / CONFIG_GIN, gin.to_gin(experiment))
        _write(workdir / CONFIG, json.dumps(to_json(experiment), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir}: {error.strerror or error}. Give another one with --workdir."
        ) from None


def _check_owner(workdir: Path, experiment: Experiment) -> None:
    if not (workdir / CONFIG).exists():
        foreign = [name for name in (CHECKPOINTS, METRICS) if (workdir / name).exists()]
        if foreign:
            raise UserError(
                f"{workdir} has {' and '.join(foreign)}, but no {CONFIG}: this is no run of mamba-jax, and nothing in "
                "it was touched. Give another --workdir."
            )
        return
    changes = differences(_read(workdir), experiment, old_place=str(workdir), ignore=MAY_CHANGE)
    if changes:
        raise UserError(
            f"the run in {workdir} has another config:\n  "
            + "\n  ".join(changes)
            + "\nGive another --workdir to start a new run, or --overwrite to delete the old one."
        )


def _read(workdir: Path) -> Experiment:
    try:
        return from_json(json.loads((workdir / CONFIG).read_text(encoding="utf-8")))
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:  # no JSON, or none that was written here
        raise UserError(
            f"{workdir / CONFIG} is damaged ({error}). Give another --workdir, or --overwrite to delete this run."
        ) from None


def _remove_run(workdir: Path) -> None:
    if not (workdir / CONFIG).exists():
        if any(workdir.iterdir()):
            raise UserError(
                f"--overwrite deletes runs of mamba-jax only, and {workdir} is none (it has no {CONFIG}): nothing was "
                "touched. Give another --workdir."
            )
        return
    # The config goes last: a removal cut short leaves a folder that is still known as a run's.
    for path in (workdir / name for name in reversed(_FILES)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Replaces a file in one go."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
