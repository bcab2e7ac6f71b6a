import dataclasses

import numpy as np
import pytest

from mamba_jax.huggingface import mamba2 as hf
from mamba_jax.models.presets import PRESETS
from tests.mamba_jax import golden


@pytest.fixture(scope="module")
def published() -> golden.Golden:
    return golden.load("mamba2_options")


@pytest.mark.parametrize("name", ["mamba2_tiny", "mamba2_options"])
def test_weights_survive_the_way_there_and_back(name):
    published = golden.load(name)
    weights = hf.weights_from(hf.model_from(hf.config_from(published.config), published.weights))
    assert weights.keys() == published.weights.keys()
    for key, value in published.weights.items():
        np.testing.assert_array_equal(weights[key], value)


@pytest.mark.parametrize("name", ["mamba2_tiny", "mamba2_options"])
def test_the_config_survives_the_way_there_and_back(name):
    published = golden.load(name)
    written = hf.config_to(hf.config_from(published.config))
    assert written.pop("architectures") == ["Mamba2ForCausalLM"]
    assert written == {key: published.config[key] for key in written}


@pytest.mark.parametrize("infinity", [float("inf"), {"__float__": "Infinity"}])
def test_a_step_without_limit_is_read_as_both_versions_write_it(published, infinity):
    config = hf.config_from({**published.config, "time_step_limit": [0.0, infinity]})
    assert config.layers["2"].delta_limit == (0.0, float("inf"))


def test_the_state_spaces_form_is_read():
    config = {
        "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [], "attn_cfg": {}, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    assert hf.config_from(config) == PRESETS["mamba2_130m"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {}}, "a Mamba1 model, not of a Mamba2 one"),
        ({"attn_layer_idx": [9, 18]}, r"attn_layer_idx = \[9, 18\] cannot be converted"),
        ({"d_intermediate": 64}, "d_intermediate = 64 cannot be converted"),
    ],
)
def test_the_state_spaces_form_of_something_else_is_refused(changes, message):
    config = {"d_model": 64, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    with pytest.raises(ValueError, match=message):
        hf.config_from({**config, **changes})


def test_an_array_of_another_shape_is_named(published):
    weights = {**published.weights, "backbone.layers.1.mixer.in_proj.weight": np.zeros((5, 24))}
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.in_proj\.weight has shape \(5, 24\), where \(204, 24\)"):
        hf.model_from(hf.config_from(published.config), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_heads": 7}, "num_heads = 7 cannot be converted: with head_dim 6 it is not 72"),
    ],
)
def test_a_config_of_something_else_is_refused(published, changes, message):
    with pytest.raises(ValueError, match=message):
        hf.config_from({**published.config, **changes})


def test_what_transformers_cannot_compute_is_not_written():
    config = dataclasses.replace(PRESETS["mamba2_130m"], norm_epsilon=1e-6)
    with pytest.raises(ValueError, match=r"norm_epsilon = 1e-05 cannot be written"):
        hf.config_to(config)
    with pytest.raises(ValueError, match="'M' is not a Mamba-2: all its layers must be Mamba2"):
        hf.config_to(PRESETS["mamba_130m"])
