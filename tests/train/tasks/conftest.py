"""A small corpus, an untrained model's checkpoint on it, and the command that evaluates it."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba_jax.long_context.calibration import calibrate
from mamba_jax.mixers.mamba1 import Mamba1Config
from mamba_jax.models.language_model import LanguageModelConfig
from train import cli
from train.checkpoint import Checkpointer, load_for_inference
from train.config import DataConfig, Experiment, TrainConfig
from train.data.prepare import prepare
from train.data.tokenizer import ByteTokenizer
from train.data.tokens import tokens_in_memory
from train.step import init_state
from train.tasks.text import Text

TRAINING_LENGTH = 256


def sentences(seed: int, count: int = 40) -> list[str]:
    words = ["the", "a", "book", "state", "space", "model", "of", "long", "context", "reads", "quietly", "every"]
    source = random.Random(seed)
    return [" ".join(source.choices(words, k=source.randint(4, 60))) + ".\n" for _ in range(count)]


@pytest.fixture
def text() -> Text:
    return Text(tokens_in_memory(sentences(0), ByteTokenizer()))


class _Anywhere:
    def get_state(self):
        return {}

    def set_state(self, state):
        del state


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "texts").mkdir()
    for i, sentence in enumerate(sentences(1)):
        (folder / "texts" / f"{i}.txt").write_text(sentence)
    prepare([folder / "texts"], folder / "corpus", tokenizer=ByteTokenizer(), held_out=0.3, workers=1)
    layer = Mamba1Config(state_size=3)
    experiment = Experiment(
        model=LanguageModelConfig(width=8, repeats=2, layers={"M": layer}, compute_dtype="float32"),
        data=DataConfig(source=str(folder / "corpus"), sequence_length=TRAINING_LENGTH, global_batch_size=1),
        train=TrainConfig(steps=1),
    )
    state = jax.jit(lambda: init_state(experiment))()
    tokenizer = ByteTokenizer().describe()
    with Checkpointer(folder / "run", experiment, tokenizer=tokenizer) as checkpointer:
        checkpointer.save(1, state, _Anywhere(), {"eval_loss": float(np.log(256))})
    return folder / "run"


@pytest.fixture
def run(capsys, checkpoint):
    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main(["evaluate", "--checkpoint", str(checkpoint), *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def model(checkpoint):
    trained = load_for_inference(checkpoint)
    return trained.restore_model()[1]


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calibration.npz"
    sequences = np.random.default_rng(0).integers(97, 123, size=(2, TRAINING_LENGTH))
    calibrate(model, sequences, source="other text").save(path)
    return path
