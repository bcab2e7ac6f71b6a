"""A run on a task from its config to its evaluation."""

from __future__ import annotations

import dataclasses
import json

import pytest

from train import cli, gin
from train.config import TaskConfig


@pytest.mark.slow
def test_the_smoke_run_trains_on_passkeys_and_is_evaluated_on_them(tmp_path, capsys):
    workdir = str(tmp_path / "run")
    assert cli.main(["train", "--gin_file", "configs/runs/passkey_smoke.gin", "--workdir", workdir]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    options = ("--lengths", "256,512", "--depths", "0.5", "--tries", "2")
    assert cli.main(["evaluate", "--checkpoint", workdir, "--task", "passkey", *options]) == 0
    rows = json.loads((tmp_path / "run" / "evaluations" / "passkey" / "passkey.json").read_text())["by_length"]
    assert [(row["method"], row["length"], row["cases"]) for row in rows] == [("vanilla", 256, 2), ("vanilla", 512, 2)]
    assert "results and pictures are in" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["passkey_mamba1", "passkey_mamba2"])
def test_the_configs_train_at_two_thousand_tokens(name):
    experiment = gin.load([f"configs/runs/{name}.gin"], [])
    assert dataclasses.replace(experiment.task, curriculum_steps=0) == TaskConfig(
        name="passkey", context_weight=0.01, shortest_length=256
    )
    assert 0 < experiment.task.curriculum_steps < experiment.train.steps
    assert experiment.data.sequence_length == 2048
    assert gin.load(["configs/tasks/document_retrieval.gin"], []).task.name == "document_retrieval"
