from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mamba_jax.models.language_model import LanguageModelConfig
from train import cli, generate, loop
from train.config import Experiment, TrainConfig
from train.errors import UserError
from train.settings import setting_names, without_unused_layers

TINY = """
LanguageModel.vocab_size = 264
LanguageModel.width = 16
LanguageModel.repeats = 1
Data.sequence_length = 32
Data.global_batch_size = 2
Train.steps = 6
Train.log_every = 2
Train.eval_batches = 1
Optimizer.warmup_steps = 1
"""


@pytest.fixture
def run(capsys):
    """Runs the command line; returns its exit status, and what it printed on stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # how argparse ends
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def trained(monkeypatch):
    """Takes the place of training, and keeps what it was called with."""
    calls = []

    def record(experiment: Experiment, workdir: Path, *, overwrite: bool) -> None:
        calls.append((experiment, workdir, overwrite))

    monkeypatch.setattr(loop, "run", record)
    return calls


@pytest.mark.slow
def test_every_command_works_on_a_corpus_of_one_s_own(run, tmp_path):
    text = "".join(f"It was line {number} of a book that nobody read.\n" for number in range(400))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "tiny.gin").write_text(TINY)
    corpus, workdir = tmp_path / "corpus", tmp_path / "run"
    status, _, _ = run("prepare", tmp_path / "book.txt", "--out", corpus, "--held_out", "0.1", "--workers", "1")
    assert status == 0

    settings = ("--gin_file", tmp_path / "tiny.gin", f"--gin.Data.source={corpus}")
    status, out, err = run("train", *settings, "--workdir", workdir)
    assert (status, err.count("Traceback")) == (0, 0), err
    assert "step 6/6" in out
    assert (workdir / "loss.png").exists()

    status, out, _ = run("evaluate", "--checkpoint", workdir, "--output", tmp_path / "scores.json")
    assert status == 0
    assert json.loads((tmp_path / "scores.json").read_text())["step"] == 6

    generate = ("generate", "--checkpoint", workdir, "--max_new_tokens", "12")
    status, out, _ = run(*generate, "--prompt", "It was", "--seed", "1")
    assert status == 0
    assert out.startswith("It was")
    assert len(out) > len("It was\n")
    assert run(*generate, "--prompt", "It was", "--seed", "1")[1] == out
    (tmp_path / "prompt.txt").write_text("It was")
    assert run(*generate, "--prompt_file", tmp_path / "prompt.txt", "--seed", "1")[1] == out
    status, out, _ = run(*generate, "--prompt", "It was", "--prompt", "A", "--temperature", "0")
    assert out.startswith("--- 1\nIt was")
    assert "\n--- 2\nA" in out


def test_files_and_options_make_the_experiment(run, trained, tmp_path):
    (tmp_path / "a.gin").write_text("Train.steps = 500\nTrain.seed = 1\n")
    (tmp_path / "b.gin").write_text("Train.seed = 2\n")
    files = ("--gin_file", tmp_path / "a.gin", "--gin_file", tmp_path / "b.gin")
    status, _, _ = run("train", *files, "--gin.Train.steps=600", "--workdir", tmp_path / "run", "--overwrite")
    assert status == 0
    # Of the layers, gin keeps those in the pattern.
    model = without_unused_layers(LanguageModelConfig())
    assert trained == [(Experiment(train=TrainConfig(steps=600, seed=2), model=model), tmp_path / "run", True)]


def test_running_the_package_is_the_train_command():
    help_of = [
        subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ, check=True).stdout
        for command in (
            ["-m", "train", "--help"],
            ["-c", "import sys; from train.cli import main; sys.exit(main())", "train", "--help"],
        )
    ]
    assert help_of[0] == help_of[1]
    assert all(name in help_of[0] for name in setting_names())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--workdir", "run", "--gin.Train.stps=3"], "Did you mean Train.steps?"),
        (["train", "--workdir", "run", "--gin.Train.steps", "3"], "--gin.Train.steps has no value"),
        (["train", "--workdir", "run", "--gin.Mesh.data=3"], "Data.global_batch_size"),
        (["train"], "--workdir"),
        (["train", "--workdir", "run", "--steps=3"], "unrecognized arguments: --steps=3"),
        (["evaluate", "--checkpoint", "run", "--gin.Train.steps=3"], "unrecognized arguments"),
        (["generate", "--checkpoint", "run", "--prompt_file", "missing.txt"], "--prompt_file"),
        (["generate", "--checkpoint", "run", "--top_p", "2"], "--top_p"),
        (["generate", "--checkpoint", "run", "--max_new_tokens", "0"], "--max_new_tokens"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_is_one_error_on_stderr_and_status_2(run, trained, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert expected in err
    assert "error: " in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    assert not trained


@pytest.mark.parametrize("kind", ["Mamba2", "Mamba3"])
def test_heads_that_the_width_does_not_divide_into_are_wrong_usage(run, tmp_path, kind):
    width, pattern = "--gin.LanguageModel.width=16", f"--gin.LanguageModel.pattern={kind[-1]}"
    status, out, err = run("train", width, pattern, "--workdir", tmp_path / "run")
    assert (status, out) == (2, "")
    expected = f"{kind}.head_dim = 64 cannot be used: it must divide 32 channels (expand x width)."
    assert err.splitlines()[-1] == f"mamba-jax: error: {expected}"
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_what_a_user_can_mend_is_one_line_and_status_1(run, tmp_path):
    status, out, err = run("generate", "--checkpoint", tmp_path / "nothing")
    assert (status, out) == (1, "")
    assert err.startswith("mamba-jax: error: ")
    assert err.count("\n") == 1


def test_a_checkpoint_of_another_run_is_not_overwritten_unasked(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("the run has another config")

    monkeypatch.setattr(loop, "run", refuse)
    assert run("train", "--workdir", tmp_path) == (1, "", "mamba-jax: error: the run has another config\n")


def test_a_run_that_needs_too_much_memory_says_what_to_do(run, tmp_path, monkeypatch):
    """A real allocation, of 4 EiB."""
    monkeypatch.setattr(loop, "run", lambda *_, **__: jax.block_until_ready(jnp.zeros((2**30, 2**30), jnp.float32)))
    status, _, err = run("train", "--workdir", tmp_path)
    assert status == 1
    assert "raise Train.gradient_accumulation" in err
    assert "Traceback" not in err


def test_an_interrupt_says_how_to_go_on(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", interrupt)
    status, _, err = run("train", "--workdir", tmp_path)
    assert status == 130
    assert "Run the same command again to go on" in err


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys; from train.cli import main; sys.exit(main(['configs']))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


def test_configs_lists_every_setting_with_its_meaning(run):
    status, out, _ = run("configs")
    assert status == 0
    assert "Optimizer.schedule: 'cosine' | 'wsd' | 'constant' = 'cosine'\n      After the warm-up:" in out
    assert all(f"  {name}: " in out for name in setting_names())


def test_help_needs_neither_jax_nor_anything_else_that_is_slow():
    program = """
import sys
from train.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert "numpy" not in sys.modules
"""
    assert (
        "generate" in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["abc", "def"], [], "abcdef"),
        (["abc", "def"], ["d"], "abc"),
        (["abc", "def"], ["cd"], "ab"),
        (["a", "b", "c", "d", "e"], ["bcd"], "a"),
        (["a", "b", "c", "x"], ["bcd"], "abcx"),
        (["abcdef"], ["e", "bc"], "a"),
        (["aab"], ["ab"], "a"),
        ([], ["x"], ""),
    ],
)
def test_a_text_ends_before_the_first_stop_text(pieces, stop, expected):
    assert "".join(generate.until_stop(pieces, stop)) == expected


def test_pieces_come_as_soon_as_no_stop_text_can_begin_in_them():
    pieces = iter(["abcdef", "never asked for"])
    found = generate.until_stop(pieces, ["xyz"])
    assert next(found) == "abcd"
    assert next(pieces) == "never asked for"
