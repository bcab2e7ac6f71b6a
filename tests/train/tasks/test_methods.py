"""Methods of ``mamba-jax evaluate --task``: what their options do, and what is said of those without effect."""

from __future__ import annotations

import json

import numpy as np

from mamba_jax.long_context.calibration import Calibration
from mamba_jax.long_context.longmamba import LongMambaConfig, apply_longmamba
from mamba_jax.long_context.token_filter import TokenFilter
from tests.train.tasks.conftest import TRAINING_LENGTH
from train.tasks import methods, names


def test_options_of_decimamba_are_applied_and_are_cells_of_their_own(run, tmp_path, monkeypatch):
    kept = []

    def answers(model, examples, tokenizer, reading, *, max_new_tokens):
        decimation = getattr(model, "decimation", None)
        kept.append(decimation and [decimation.kept(layer, 1000) for layer in range(2)])
        return [""] * len(examples)

    monkeypatch.setattr("train.tasks.cell.answers", answers)
    options = ("--task", "passkey", "--methods", "vanilla,decimamba", "--depths", "0.5", "--lengths", 600, "--tries", 1)
    both = ("--decimamba_layers", "0,1", "--decimamba_length", 300)
    for given in ((), both, (*both, "--decimamba_beta", 0.8), both):
        status, _, err = run(*options, *given, "--output", tmp_path)
        assert status == 0, err
    assert kept == [None, [1000, TRAINING_LENGTH], [300, 150], [300, 240]]
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()[1:]]
    assert [{name: value for name, value in cell["key"].items() if "decimamba_" in name} for cell in cells] == [
        {},
        {},
        {"decimamba_layers": [0, 1], "decimamba_length": 300},
        {"decimamba_layers": [0, 1], "decimamba_length": 300, "decimamba_beta": 0.8},
    ]


def test_options_of_longmamba_are_applied_and_are_cells_of_their_own(run, model, calibration, tmp_path, monkeypatch):
    filters = []

    def answers(model, examples, tokenizer, reading, *, max_new_tokens):
        filters.append(model.blocks[0].mixer.extender)
        return [""] * len(examples)

    monkeypatch.setattr("train.tasks.cell.answers", answers)
    known = Calibration.load(calibration)
    threshold = float(
        np.median(np.exp(known.places[0].log_decay.astype(np.float64)))
    )  # half of the channels are global
    options = ("--task", "passkey", "--calibration", calibration, "--decay_threshold", threshold, "--output", tmp_path)

    def measured(names: str, *given: object) -> list[TokenFilter]:
        filters.clear()
        status, _, err = run(*options, "--methods", names, "--depths", 0, "--lengths", 700, "--tries", 1, *given)
        assert status == 0, err
        return list(filters)

    def expected(**changes) -> TokenFilter:
        config = LongMambaConfig(**{"decay_threshold": threshold, "length": 700, **changes})
        return apply_longmamba(model, known, config).blocks[0].mixer.extender

    def assert_filters(found: list[TokenFilter], *configs: dict) -> None:
        for actual, config in zip(found, configs, strict=True):
            of_config = expected(**config)
            np.testing.assert_array_equal(actual.thresholds, of_config.thresholds)
            np.testing.assert_array_equal(actual.scales, of_config.scales)

    assert_filters(measured("longmamba,random"), {}, {"channels": "random"})
    assert_filters(measured("longmamba,random", "--channels_seed", 3), {"channels": "random", "seed": 3})
    assert_filters(
        measured("longmamba,random", "--table_step", 500), {"length": 500}, {"length": 500, "channels": "random"}
    )
    assert not np.array_equal(expected(channels="random").thresholds, expected(channels="random", seed=3).thresholds)
    assert not np.array_equal(expected().thresholds, expected(length=500).thresholds)
    rescaled = measured("longmamba_rescaled,longmamba_streaming_rescaled")
    assert_filters(rescaled, {"rescale": True}, {"rescale": True, "length": None})
    assert all(np.any(found.scales != 1) for found in rescaled)
    assert measured("longmamba,random", "--channels_seed", 3) == []
    keys = [json.loads(line)["key"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()[1:]]
    assert [(key["method"], key.get("channels_seed"), key.get("table_step")) for key in keys] == [
        ("longmamba", None, None),
        ("random", None, None),
        ("random", 3, None),
        ("longmamba", None, 500),
        ("random", None, 500),
        ("longmamba_rescaled", None, None),
        ("longmamba_streaming_rescaled", None, None),
    ]


def test_ablations_that_the_model_has_too_few_layers_for_are_left_out(run, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tasks.cell.answers", lambda model, examples, *_, **__: [""] * len(examples))
    monkeypatch.setitem(methods.METHODS, "layers_4", methods._longmamba(layers=2))  # as many as there are
    options = ("--task", "passkey", "--ablations", "--calibration", calibration, "--lengths", 512, "--depths", 0)
    status, _, err = run(*options, "--tries", 1, "--output", tmp_path)
    assert status == 0, err
    assert "layers_8 is left out: of layers with a delta the model has 2" in err
    asked = [row["method"] for row in json.loads((tmp_path / "passkey.json").read_text())["by_length"]]
    assert asked == ["vanilla", *(name for name in names.ABLATIONS if name != "layers_8")]
    status, _, err = run(*options, "--methods", "layers_8", "--output", tmp_path)
    assert (status, "the method layers_8 cannot be used on this model" in err) == (1, True)


def test_a_method_that_does_not_fit_the_model_says_so(run, calibration, tmp_path):
    options = ("--task", "passkey", "--methods", "layers_8", "--calibration", calibration, "--lengths", "512")
    status, _, err = run(*options, "--tries", 1, "--output", tmp_path)
    assert status == 1
    assert "the method layers_8 cannot be used on this model: LongMamba.layers = 8" in err
    assert "name the others with --methods, in place of --ablations" in err


def test_methods_that_find_no_channel_say_that_they_change_nothing(run, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tasks.cell.answers", lambda model, examples, *_, **__: [""] * len(examples))
    with np.load(calibration) as file:
        decays = np.exp(file["log_decay_0"].astype(np.float64))
    chosen = ("--methods", "vanilla,longmamba,longmamba_streaming,local,layers_4", "--calibration", calibration)
    monkeypatch.setitem(methods.METHODS, "layers_4", methods._longmamba(layers=2))

    def said(threshold: float, length: int = 512) -> list[str]:
        options = ("--task", "passkey", "--lengths", length, "--depths", "0", "--tries", 1, "--output", tmp_path)
        status, _, err = run(*options, *chosen, "--decay_threshold", threshold)
        assert status == 0, err
        return [line for line in err.splitlines() if "leaves everything as it is" in line]

    above, below = (1 + decays.max()) / 2, decays.min() / 2
    assert said(above) == [
        f"{name} leaves everything as it is: no channel of {of} is global with decay_threshold {above:g}"
        for name, of in (
            ("longmamba", "this model"),
            ("longmamba_streaming", "this model"),
            ("layers_4", "the 2 layers that forget least"),
        )
    ]
    assert said(below) == [
        f"local leaves everything as it is: no channel of this model is local with decay_threshold {below:g}"
    ]
    assert said(decays.max() * 0.999) == []
    assert said(above, TRAINING_LENGTH)[0].startswith("longmamba_streaming")  # the others extend nothing so short


def test_methods_without_effect_at_the_training_length_are_the_model(model, calibration):
    setting = methods.Setting(
        TRAINING_LENGTH,
        methods.load_calibration(calibration, ["longmamba"], model, calibration, read="a text", text=None),
    )
    for name in ("vanilla", "longmamba", "scaled", "local", "decimamba"):
        assert methods.extended(name, model, setting, TRAINING_LENGTH) is model
