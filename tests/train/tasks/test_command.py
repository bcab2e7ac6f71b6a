"""``mamba-jax evaluate --task``, from the command line to files, on an untrained model."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest

from mamba_jax.long_context.calibration import calibrate, sample_starts
from tests.train.tasks.conftest import TRAINING_LENGTH
from train import cli
from train.checkpoint import load_for_inference
from train.data import pipeline
from train.tasks import methods, names, plans
from train.tasks.longbench import DATASETS
from train.tasks.reading import Reading

DECIMAMBA = ("--task", "passkey", "--methods", "decimamba")


def test_names_listed_are_those_there_are():
    assert list(names.TASKS) == list(plans.TASKS)
    assert list(names.METHODS) == list(methods.METHODS)
    assert set(names.ABLATIONS) < set(names.METHODS)


@pytest.mark.parametrize(
    ("task", "options", "table", "cases", "pictures"),
    [
        ("passkey", ("--lengths", "200,512", "--depths", "0,1", "--tries", 2), "by_length", 4, ("map", "curve")),
        ("document_retrieval", ("--documents", "1,3", "--tries", 2), "by_documents", 2, ("",)),
        ("perplexity_by_length", ("--lengths", "128,512", "--tries", 2), "by_length", 2, ("",)),
    ],
)
def test_a_task_leaves_cells_tables_and_pictures(run, calibration, tmp_path, task, options, table, cases, pictures):
    chosen = ("--methods", "vanilla,longmamba,longmamba_streaming,scaled", "--calibration", calibration)
    status, out, err = run("--task", task, *options, *chosen, "--chunk", 128, "--output", tmp_path)
    assert status == 0, err
    written = json.loads((tmp_path / f"{task}.json").read_text())
    rows = written[table]
    assert len(rows) == 8
    assert all(row["cases"] == cases and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert {row["method"] for row in rows} == {"vanilla", "longmamba", "longmamba_streaming", "scaled"}
    if task == "perplexity_by_length":
        # Of a byte an untrained model knows nothing.
        assert all(200 < row["value"] < 320 for row in rows)
    for picture in pictures:
        name = f"{task}_{picture}.png" if picture else f"{task}.png"
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert out.count("vanilla") == 2


def test_a_rerun_measures_only_what_is_new(run, tmp_path, monkeypatch):
    asked = []

    def answers(model, examples, tokenizer, reading, *, max_new_tokens):
        asked.append(examples[0].length)
        return [example.expected if len(asked) == 1 else "" for example in examples]

    monkeypatch.setattr("train.tasks.cell.answers", answers)
    options = ("--task", "passkey", "--depths", "0.5", "--tries", 4, "--output", tmp_path)
    assert run(*options, "--lengths", "200")[0] == 0
    status, _, err = run(*options, "--lengths", "200,300")
    assert (status, asked) == (0, [200, 300])
    assert "1 of 2 cells are known already" in err
    rows = json.loads((tmp_path / "passkey.json").read_text())["by_length"]
    assert [(row["length"], row["correct"]) for row in rows] == [(200, 4), (300, 0)]
    assert run(*options, "--lengths", "200", "--seed", 1)[0] == 1  # another evaluation
    assert run(*options, "--lengths", "200", "--seed", 1, "--overwrite")[0] == 0
    assert asked == [200, 300, 200]


def test_every_method_is_asked_the_same(run, tmp_path, monkeypatch):
    asked: dict[str, list[bytes]] = {}
    current: list[str] = []

    def extended(name, model, setting, length):
        current[:] = [name]
        return model

    def answers(model, examples, tokenizer, reading, *, max_new_tokens):
        (name,) = current
        asked[name] = [example.prompt.tobytes() for example in examples]
        assert reading.chunk == (None if name == "decimamba" else 1 << 14)
        return [""] * len(examples)

    monkeypatch.setattr("train.tasks.evaluation.extended", extended)
    monkeypatch.setattr("train.tasks.cell.answers", answers)
    status, _, err = run(
        "--task", "passkey", "--methods", "vanilla,scaled,decimamba", "--depths", "0.5", "--lengths", 300
    )
    assert status == 0, err
    assert asked["vanilla"] == asked["scaled"] == asked["decimamba"]
    assert len(set(asked["vanilla"])) == 20


def test_perplexity_is_measured_at_any_lengths_that_the_text_has(run, tmp_path, monkeypatch):
    measured = []

    def losses(model, windows, reading, *, last):
        measured.append(len(windows[0]))
        return [1.0] * len(windows)

    monkeypatch.setattr("train.tasks.perplexity_by_length.losses_of_last", losses)
    (tmp_path / "text.txt").write_text("".join(map(chr, range(1000, 1900))))  # 1,848 bytes
    options = ("--task", "perplexity_by_length", "--text", tmp_path / "text.txt", "--output", tmp_path / "out")
    for given, expected in (((), [256, 512, 1024]), (("--lengths", "300,512"), [300]), (("--lengths", 1500), [1500])):
        measured.clear()
        status, _, err = run(*options, *given)
        assert (status, measured) == (0, expected), err
    assert run(*options, "--lengths", 2000)[0] == 1


def test_longbench_is_asked_and_its_answers_kept(run, tmp_path):
    row = {"context": "It was built in 1889.", "input": "When?", "answers": ["1889"]}
    (tmp_path / "qasper.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    options = ("--task", "longbench", "--data", tmp_path, "--output", tmp_path / "out")
    status, _, err = run(*options, "--datasets", "qasper", "--max_prompt", 64)
    assert status == 0, err
    (scores,) = json.loads((tmp_path / "out" / "longbench.json").read_text())["by_dataset"]
    assert scores["cases"] == 3
    cell = json.loads((tmp_path / "out" / "cells.jsonl").read_text().splitlines()[1])
    assert len(cell["result"]["answers"]) == 3
    assert (tmp_path / "out" / "longbench.png").exists()


def test_without_jieba_nothing_of_longbench_is_asked_in_vain(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setattr("train.tasks.longbench.answers", lambda *_, **__: pytest.fail("measured"))
    row = {"context": "It was built in 1889.", "input": "When?", "answers": ["1889"]}
    for name in DATASETS:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    status, _, err = run("--task", "longbench", "--data", tmp_path, "--output", tmp_path / "out")
    assert status == 1
    assert "pip install 'mamba-jax[longbench]', or name the other data sets with --datasets" in err
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_read_in_chunks_with_time_and_memory_by_position(run, tmp_path):
    options = ("--task", "prefill_scaling", "--lengths", "4K", "--chunk", "512", "--output", tmp_path)
    status, _, err = run(*options)
    assert status == 0, err
    result = json.loads((tmp_path / "cells.jsonl").read_text().splitlines()[1])["result"]
    assert result["positions"] == list(range(512, 4097, 512))
    assert all(earlier < later for earlier, later in zip(result["seconds"], result["seconds"][1:], strict=False))
    assert all(size > 0 for size in result["bytes"])
    assert (tmp_path / "prefill_scaling.png").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--task", "passky"], 2, "--task passky: there is no such task. Did you mean passkey?"),
        (["--task", "passkey", "--methods", "vanila"], 2, "Did you mean vanilla?"),
        (["--task", "passkey", "--methods", ","], 2, "give at least one"),
        (["--task", "passkey", "--lengths", "2X"], 2, "'2X' is no number"),
        (["--task", "passkey", "--depths", "1.5"], 2, "'1.5' is no share from 0 to 1"),
        (["--task", "passkey", "--documents", "3"], 2, "--documents is of no use to --task passkey, which takes --dep"),
        (["--lengths", "2K"], 2, "--lengths is an option of tasks"),
        (["--task", "passkey", "--lengths", "100"], 1, "passkey of 100 tokens is too short"),
        (["--task", "perplexity_by_length", "--lengths", "50"], 1, "window of 50 tokens is too short"),
        (["--task", "passkey", "--methods", "longmamba"], 2, "mamba-jax calibrate --checkpoint"),
        (["--task", "passkey", "--ablations"], 2, "local, random, layers_4"),
        (["--task", "passkey", "--methods", "longmamba", "--calibration", "no.npz"], 1, "no such file. Make it with"),
        (["--task", "passkey", "--text", "no.txt"], 1, "cannot read the text no.txt"),
        (["--task", "document_retrieval", "--documents_file", "no.jsonl"], 1, "cannot read the documents no.jsonl"),
        (["--task", "longbench"], 2, "--task longbench needs --data"),
        (["--task", "longbench", "--data", ".", "--datasets", "qaspar"], 2, "Did you mean qasper?"),
        (["--task", "longbench", "--data", "nowhere"], 1, "Put LongBench's hotpotqa.jsonl there"),
        (["--task", "prefill_scaling", "--lengths", "1K,2K"], 2, "give one length"),
        (["--task", "prefill_scaling", "--lengths", "1K"], 2, "two chunks of --chunk 16384"),
        (["--task", "passkey", "--methods", "longmamba", "--decay_threshold", "2"], 2, "need --calibration FILE"),
        ([*DECIMAMBA, "--decimamba_layers", "1,0"], 2, "'1,0' are no layers: give their numbers, ascending, from 0"),
        ([*DECIMAMBA, "--decimamba_layers", "0,2"], 1, "DeciMamba.layers = (0, 2) cannot be used: the model's layers"),
        ([*DECIMAMBA, "--decimamba_length", "0"], 2, "'0' is no number of 1 or more"),
        ([*DECIMAMBA, "--decimamba_beta", "0"], 2, "'0' is no share above 0, at most 1"),
        (["--task", "passkey", "--decimamba_beta", "0.8"], 2, "--decimamba_beta is of the method decimamba: add it to"),
        (["--task", "passkey", "--seed", "-1"], 2, "'-1' is no seed: give a whole number from 0"),
        (["--task", "passkey", "--channels_seed", "1"], 2, "--channels_seed is of the method random: add it to"),
        (["--task", "passkey", "--table_step", "1K"], 2, "longmamba_rescaled, local, random, layers_4, layers_8, thr"),
        (["--task", "passkey", "--decay_threshold", "0.1"], 2, "layers_4, layers_8: add one to --methods"),
        (["--decimamba_length", "2K"], 2, "--decimamba_length is an option of tasks"),
    ],
)
def test_mistakes_are_named_with_the_way_out(run, options, status, message):
    found, out, err = run(*options)
    assert (found, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


def test_a_calibration_of_another_model_is_refused(run, calibration, model, tmp_path):
    other = jax.tree.map(lambda leaf: leaf + 1, model)
    calibrate(other, np.ones((1, 16), np.int32), source="other text").save(tmp_path / "other.npz")
    status, _, err = run("--task", "passkey", "--methods", "longmamba", "--calibration", tmp_path / "other.npz")
    assert status == 1
    assert "calibration is of checkpoint" in err
    assert "Make it with: mamba-jax calibrate" in err
    (tmp_path / "broken.npz").write_text("nothing")
    status, _, err = run("--task", "passkey", "--methods", "longmamba", "--calibration", tmp_path / "broken.npz")
    assert (status, "is no calibration file" in err) == (1, True)


def test_a_calibration_on_the_text_of_the_evaluation_is_refused(run, checkpoint, model, tmp_path):
    held_out = pipeline.load(load_for_inference(checkpoint).experiment.data).held_out
    for source, message in ((held_out.fingerprint, "the very text to evaluate on"), (None, "does not say what text")):
        calibrate(model, np.ones((1, 16), np.int32), source=source).save(tmp_path / "seen.npz")
        status, _, err = run("--task", "passkey", "--methods", "longmamba", "--calibration", tmp_path / "seen.npz")
        assert (status, message in err) == (1, True), err


def test_a_text_with_a_part_of_a_calibrated_sequence_is_refused_in_any_file(run, checkpoint, tmp_path):
    calibrated = cli.main(
        ["calibrate", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "c.npz"), "--count", "2"]
    )
    assert calibrated == 0
    corpus = pipeline.load(load_for_inference(checkpoint).experiment.data)
    starts = sample_starts(len(corpus.train.ids), length=TRAINING_LENGTH, count=2, seed=0)
    sequence = corpus.tokenizer.decode(corpus.train.ids[starts[1] : starts[1] + TRAINING_LENGTH])
    other = "Nothing of this was read before: " + " ".join(map(str, range(800)))
    options = ("--methods", "longmamba", "--calibration", tmp_path / "c.npz", "--text", tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text(other + sequence[20 : 20 + TRAINING_LENGTH // 2] + other)
    asked = ("--lengths", 256, "--depths", 0, "--tries", 1, "--output", tmp_path / "out")
    for task in (
        ["passkey", *asked],
        ["document_retrieval", "--documents", 2, "--tries", 1],
        ["perplexity_by_length", "--lengths", 256, "--tries", 1],
        ["prefill_scaling", "--lengths", 256, "--chunk", 128],
    ):
        status, _, err = run("--task", *task, *options)
        assert (status, "holds a part of what the calibration was measured on (128 tokens" in err) == (1, True), err
    (tmp_path / "text.txt").write_text(other + sequence[20 : 20 + TRAINING_LENGTH // 3] + other)
    status, _, err = run("--task", "passkey", *asked, *options)
    assert status == 0, err


def test_the_haystack_is_held_out(run, checkpoint, tmp_path, monkeypatch):
    seen: list[str] = []

    def answers(model, examples, tokenizer, reading: Reading, *, max_new_tokens):
        seen.extend(tokenizer.decode(example.prompt) for example in examples)
        return [""] * len(examples)

    monkeypatch.setattr("train.tasks.cell.answers", answers)
    assert run("--task", "passkey", "--lengths", "600", "--depths", "0", "--output", tmp_path)[0] == 0
    texts = {path.read_text() for path in (checkpoint.parent / "texts").iterdir()}
    found = {text for text in texts for prompt in seen if text in prompt}
    held_out = {text for text in texts if any(text == t for t in _held_out(checkpoint))}
    assert found
    assert found <= held_out


def _held_out(checkpoint) -> list[str]:
    corpus = pipeline.load(load_for_inference(checkpoint).experiment.data)
    return [corpus.tokenizer.decode(ids) for ids in corpus.held_out.iter_documents()]
