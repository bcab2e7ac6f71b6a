"""Whole runs: real processes, killed and asked to stop, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from train import gin, loop
from train.checkpoint import load_for_inference
from train.data.prepare import prepare
from train.data.tokenizer import ByteTokenizer
from train.errors import UserError
from train.evaluate import evaluate

CONFIG = """
LanguageModel.width = 16
LanguageModel.repeats = 2
LanguageModel.compute_dtype = 'float32'
Mamba1.state_size = 4
Data.source = '{corpus}'
Data.sequence_length = 32
Data.global_batch_size = 4
Train.steps = {steps}
Train.log_every = 1
Train.eval_every = 6
Train.eval_batches = 2
Optimizer.warmup_steps = 2
Optimizer.learning_rate = 1e-2
Checkpoint.every_steps = 2
Metrics.tensorboard = False
"""
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        words = rng.choice(["state", "space", "model", "scan", "delta"], size=60)
        (texts / f"{i}.txt").write_text(" ".join(words))
    prepare([texts], folder / "prepared", tokenizer=ByteTokenizer(), held_out=0.2, workers=1)
    return folder / "prepared"


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.gin"
    path.write_text(CONFIG.format(corpus=corpus, steps=STEPS))
    return path


def start(config: Path, workdir: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", "--gin_file", str(config), "--workdir", str(workdir), *options]
    # One device, whatever the tests themselves run on.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(config: Path, workdir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    process = start(config, workdir, *options)
    output, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def metrics(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while max(losses(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def parameters(workdir: Path) -> list[np.ndarray]:
    trained = load_for_inference(workdir)
    step, model = trained.restore_model()
    assert step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finished = run(config, workdir)
    assert finished.returncode == 0, finished.stderr
    return workdir


@pytest.mark.slow
def test_a_run_learns_and_leaves_its_metrics_config_and_plot(uninterrupted):
    lines = metrics(uninterrupted)
    assert sorted(losses(uninterrupted)) == list(range(1, STEPS + 1))
    assert losses(uninterrupted)[STEPS] < 0.8 * losses(uninterrupted)[1]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert all(line["eval_bits_per_byte"] > 0 for line in evaluations)
    assert all(line["tokens_per_second"] > 0 for line in lines if line.get("step", 0) > 1 and "loss" in line)
    for name in ("config.gin", "config.json", "loss.png"):
        assert (uninterrupted / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(1, 6), (3, 4, 9)])
def test_a_run_killed_again_and_again_computes_bit_for_bit_what_an_uninterrupted_one_does(
    config, uninterrupted, tmp_path, kills
):
    workdir = tmp_path / "run"
    for step in kills:
        process = start(config, workdir)
        wait_for_step(process, workdir, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finished = run(config, workdir)
    assert finished.returncode == 0, finished.stderr
    assert losses(workdir) == losses(uninterrupted)
    steps = [line["step"] for line in metrics(workdir) if "loss" in line]
    assert steps == sorted(set(steps))
    for resumed, straight in zip(parameters(workdir), parameters(uninterrupted), strict=True):
        np.testing.assert_array_equal(resumed, straight)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_resume(config, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(config, workdir, "--gin.Checkpoint.every_steps=1000")
    wait_for_step(process, workdir, 3)
    process.terminate()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    stopped = max(losses(workdir))
    assert stopped < STEPS, "the run ended before the signal came"
    assert "run the same command again" in output + errors
    resumed = run(config, workdir, "--gin.Checkpoint.every_steps=1000")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(workdir) == losses(uninterrupted)


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(config, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    again = run(config, uninterrupted)
    assert again.returncode == 0, again.stderr
    assert f"step {STEPS}" in again.stdout + again.stderr
    assert (uninterrupted / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_evaluation_and_generation_need_nothing_but_the_checkpoint(uninterrupted):
    def call(*arguments: str) -> str:
        program = "import sys; from train.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, *arguments, "--checkpoint", str(uninterrupted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "eval_bits_per_byte" in call("evaluate")
    greedy = call("generate", "--prompt", "state sp", "--max_new_tokens", "20", "--temperature", "0")
    assert greedy.startswith("state sp")
    assert greedy == call("generate", "--prompt", "state sp", "--max_new_tokens", "20", "--temperature", "0")


def experiment(config: Path, *bindings: str):
    return gin.load([str(config)], list(bindings))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_way_out(config, tmp_path):
    diverging = experiment(config, "Optimizer.learning_rate = 1e30", "Optimizer.max_skipped = 3")
    with pytest.raises(UserError, match=r"diverged.*learning_rate"):
        loop.run(diverging, tmp_path / "run")
    skipped = [line["skipped"] for line in metrics(tmp_path / "run") if "skipped" in line]
    assert skipped[-1] >= 2


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_anything_is_written(config, tmp_path):
    small = experiment(config, "LanguageModel.vocab_size = 64")
    with pytest.raises(UserError, match="vocab_size"):
        loop.run(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_on_one_device_goes_on_sharded_over_four(config, tmp_path, monkeypatch):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    loop.run(experiment(config), straight)

    def evaluate_when_asked_to_stop(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate_when_asked_to_stop)
        loop.run(experiment(config), moved)
    # The evaluation is at step 6; the step after it is the last.
    assert max(losses(moved)) == 7
    loop.run(experiment(config, "Mesh.fsdp = 2", "Mesh.tensor = 2"), moved)
    assert sorted(losses(moved)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses(moved).values()), list(losses(straight).values()), rtol=1e-3)
