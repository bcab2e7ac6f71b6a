"""The commands ``calibrate`` and ``inspect``, on a checkpoint of a small model that was never trained."""

import dataclasses
import json

import grain
import numpy as np
import pytest
from flax import nnx

from mamba_jax.long_context import calibration as calibrations
from mamba_jax.mixers import Mamba1Config, Mamba2Config, Mamba3Config
from mamba_jax.models.language_model import LanguageModelConfig
from train import cli
from train.checkpoint import Checkpointer
from train.config import DataConfig, Experiment
from train.data import pipeline
from train.data.tokenizer import ByteTokenizer
from train.data.tokens import Corpus, tokens_in_memory

LENGTH = 32
MODEL = LanguageModelConfig(
    vocab_size=264,
    width=16,
    pattern="M2",
    repeats=1,
    layers={"M": Mamba1Config(state_size=3), "2": Mamba2Config(state_size=3, head_dim=4)},
    compute_dtype="float32",
)


@pytest.fixture(scope="module")
def corpus():
    tokenizer = ByteTokenizer()
    random = np.random.default_rng(0)
    train, held_out = ("".join(random.choice(list(letters), 600)) for letters in ("abcdefgh", "stuvwxyz"))
    return Corpus(tokens_in_memory([train], tokenizer), tokens_in_memory([held_out], tokenizer), tokenizer)


@pytest.fixture(autouse=True)
def read_corpus(monkeypatch, corpus):
    monkeypatch.setattr(pipeline, "load", lambda data: corpus)


def save(workdir, seed: int, model: LanguageModelConfig = MODEL):
    experiment = Experiment(model=model, data=DataConfig(sequence_length=LENGTH, global_batch_size=1))
    built = model.build(nnx.Rngs(seed))
    with Checkpointer(workdir, experiment, tokenizer=ByteTokenizer().describe()) as checkpointer:
        checkpointer.save(7, {"model": built}, iter(grain.MapDataset.range(3).to_iter_dataset()))
    return built


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, save(workdir, 0)


@pytest.fixture
def run(capsys):
    """Runs the command line; returns its exit status, and what it printed on stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_a_calibration_is_of_the_training_split_and_the_checkpoint(run, checkpoint, corpus, tmp_path):
    workdir, model = checkpoint
    status, out, err = run("calibrate", "--checkpoint", workdir, "--out", tmp_path / "c.npz", "--count", 3, "--seed", 5)
    assert (status, err) == (0, "")
    assert "calibrated step 7 on 3 sequences of 32 tokens of the training split" in out
    assert len(out.splitlines()) == 4  # what was done, a heading, two layers
    measured = calibrations.Calibration.load(tmp_path / "c.npz")
    sequences = calibrations.sample_sequences(corpus.train.ids, length=LENGTH, count=3, seed=5)
    expected = calibrations.calibrate(model, sequences, source=corpus.train.fingerprint)
    for place, layers in expected.places.items():
        for field in dataclasses.fields(layers):
            actual = getattr(measured.places[place], field.name)
            np.testing.assert_allclose(actual, getattr(layers, field.name), rtol=1e-5)
    measured.require_model(model)
    measured.require_unseen(corpus.held_out.fingerprint, corpus.held_out.iter_text())
    with pytest.raises(ValueError, match="the very text to evaluate on"):
        measured.require_unseen(corpus.train.fingerprint, [])


def test_sequences_that_the_held_out_split_has_a_part_of_give_way(run, checkpoint, corpus, tmp_path, monkeypatch):
    ids = corpus.train.ids
    starts = calibrations.sample_starts(len(ids), length=LENGTH, count=9, seed=5)
    begin, end = starts[1] + 3, starts[1] + 3 + LENGTH // 2
    in_common = [min(start + LENGTH, end) - max(start, begin) for start in starts]
    assert [tokens for tokens in in_common if tokens >= 14] == 2 * [LENGTH // 2]  # starts[1], and one more
    shared = corpus.tokenizer.decode(ids[begin:end])
    text = corpus.tokenizer.decode(corpus.held_out.ids)
    held_out = tokens_in_memory([text[:70] + shared[:5], shared[5:] + text[70:]], corpus.tokenizer)
    monkeypatch.setattr(pipeline, "load", lambda data: dataclasses.replace(corpus, held_out=held_out))
    status, _, err = run(
        "calibrate", "--checkpoint", checkpoint[0], "--out", tmp_path / "c.npz", "--count", 3, "--seed", 5
    )
    assert status == 0, err
    assert "2 of the sequences drawn left out: the held-out split has a good part of each too" in err
    measured = calibrations.Calibration.load(tmp_path / "c.npz")
    measured.require_unseen("another text", held_out.iter_text())
    others = [start for start, tokens in zip(starts, in_common, strict=True) if tokens < LENGTH // 2]
    chosen = np.stack([ids[start : start + LENGTH] for start in others[:3]])
    expected = calibrations.calibrate(checkpoint[1], chosen, separator=corpus.tokenizer.separator_id)
    assert measured.excerpts == expected.excerpts

    copy = dataclasses.replace(corpus, held_out=corpus.train)
    monkeypatch.setattr(pipeline, "load", lambda data: copy)
    status, _, err = run("calibrate", "--checkpoint", checkpoint[0], "--out", tmp_path / "d.npz")
    assert (status, "the held-out split has a good part of 80 too" in err) == (1, True)
    assert not (tmp_path / "d.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--length", 9999), 2, "602 tokens are too few for sequences of length 9999"),
        (("--length", "1K"), 2, "602 tokens are too few for sequences of length 1024"),
        (("--count", 0), 2, "count = 0"),
        (("--clamp", 1.0), 1, "clamp = 1.0 cannot be used"),
    ],
)
def test_what_cannot_be_calibrated_is_said(run, checkpoint, tmp_path, arguments, status, expected):
    actual, _, err = run("calibrate", "--checkpoint", checkpoint[0], "--out", tmp_path / "c.npz", *arguments)
    assert actual == status
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "c.npz").exists()


def test_a_place_that_cannot_be_written_is_said(run, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run("calibrate", "--checkpoint", checkpoint[0], "--out", tmp_path / "file" / "c.npz")
    assert status == 1
    assert "cannot be written" in err


@pytest.mark.slow
def test_every_figure_of_the_paper_is_drawn_with_its_numbers(run, checkpoint, tmp_path):
    out = tmp_path / "figures"
    status, printed, err = run("inspect", "--checkpoint", checkpoint[0], "--out", out, "--length", 4 * LENGTH)
    assert (status, err) == (0, "")
    names = {path.stem for path in out.glob("*.png")}
    assert names == {path.stem for path in out.glob("*.npz")}
    for number in ("01a", "01b", "07", "08", "09", "10", "15", "16"):
        assert sum(name.startswith(f"figure_{number}_") for name in names) == 1
    assert {"channels", "filtered_share", "state_norms"} < names
    assert len(printed.splitlines()) == len(names)
    with np.load(out / "figure_09_decay_layer_0.npz") as arrays:
        assert arrays["log10_original"].shape == arrays["log10_extended"].shape == (24, 4 * LENGTH)
    with np.load(out / "figure_01b_attention.npz") as arrays:
        assert arrays["length"] == 4 * LENGTH
        assert arrays["log10_attention"].shape[0] == len(arrays["channel"])
    with np.load(out / "figure_08_decay_with_longmamba.npz") as arrays:
        np.testing.assert_array_equal(arrays["length"], [LENGTH, 2 * LENGTH, 4 * LENGTH])
        np.testing.assert_array_equal(arrays["log10_original"][0], arrays["log10_extended"][0])


@pytest.mark.slow
def test_mamba_3_is_in_every_figure_and_the_threshold_decides_for_each_what_is_global(run, tmp_path):
    layers = {"3": Mamba3Config(state_size=4, head_dim=8)}
    save(tmp_path / "run", 0, dataclasses.replace(MODEL, pattern="3", layers=layers))
    inspect = "inspect", "--checkpoint", tmp_path / "run", "--out", tmp_path, "--length", 2 * LENGTH
    # By the default nearly all would be.
    status, _, err = run(*inspect, "--decay_threshold", 0.999)
    assert (status, err) == (0, "")
    arrays = {path.stem: dict(np.load(path)) for path in tmp_path.glob("*.npz")}
    for number in ("01a", "01b", "07", "08", "09", "15", "16"):
        assert sum(name.startswith(f"figure_{number}_") for name in arrays) == 1
    for name in ("figure_01a_attention", "figure_01b_attention", "figure_15_attention", "figure_16_attention"):
        assert np.isfinite(np.diagonal(arrays[name]["log10_attention"], axis1=1, axis2=2)).all()
    assert np.all(arrays["figure_07_receptive_field"]["receptive_field"] > 0)
    heads = 4
    assert arrays["channels"]["is_global_0"].tolist() == [False] * heads
    for name in ("figure_08_decay_with_longmamba", "figure_09_decay_layer_0"):
        np.testing.assert_array_equal(arrays[name]["log10_extended"], arrays[name]["log10_original"])
    np.testing.assert_array_equal(arrays["state_norms"]["extended"], arrays["state_norms"]["original"])
    assert np.all(arrays["state_norms"]["original"] > 0)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--length", LENGTH), 2, "--length 32 cannot be used: at least twice the training length (64)"),
        (("--length", 9999), 2, "at most the 602 tokens of the held-out text"),
        (("--length", "1k"), 2, "--length 1024 cannot be used"),
        (("--length", 64, "--layer", 2), 2, "--layer 2: the layers with a delta are 0, 1"),
        (("--decay_threshold", 1.5), 2, "--decay_threshold: LongMamba.decay_threshold = 1.5 cannot be used"),
    ],
)
def test_what_cannot_be_inspected_is_said(run, checkpoint, tmp_path, arguments, status, expected):
    actual, _, err = run("inspect", "--checkpoint", checkpoint[0], "--out", tmp_path / "figures", *arguments)
    assert (actual, err.count("\n")) == (status, 1), err
    assert expected in err
    assert not (tmp_path / "figures").exists()


def test_a_calibration_of_another_checkpoint_is_refused(run, checkpoint, tmp_path):
    save(tmp_path / "other", 1)
    status, _, _ = run("calibrate", "--checkpoint", tmp_path / "other", "--out", tmp_path / "c.npz", "--count", 1)
    assert status == 0
    inspect = ("inspect", "--checkpoint", checkpoint[0], "--out", tmp_path / "figures", "--calibration")
    status, _, err = run(*inspect, tmp_path / "c.npz")
    assert status == 1
    assert "the calibration is of checkpoint" in err
    (tmp_path / "header.json").write_text(json.dumps({}))
    for path, expected in (
        ("header.json", "is no calibration file"),
        ("missing.npz", "there is no such file. Make it with: mamba-jax calibrate"),
    ):
        status, _, err = run(*inspect, tmp_path / path)
        assert status == 1
        assert expected in err
