import numpy as np
import pytest

from mamba_jax.huggingface import mamba as hf
from mamba_jax.models.language_model import count_parameters
from mamba_jax.models.presets import PRESETS
from tests.mamba_jax import golden


@pytest.fixture(scope="module")
def published() -> golden.Golden:
    return golden.load("mamba1_options")


@pytest.mark.parametrize("name", ["mamba1_tiny", "mamba1_options"])
def test_weights_survive_the_way_there_and_back(name):
    published = golden.load(name)
    weights = hf.weights_from(hf.model_from(hf.config_from(published.config), published.weights))
    assert weights.keys() == published.weights.keys()
    for key, value in published.weights.items():
        np.testing.assert_array_equal(weights[key], value)


@pytest.mark.parametrize("name", ["mamba1_tiny", "mamba1_options"])
def test_the_config_survives_the_way_there_and_back(name):
    published = golden.load(name)
    written = hf.config_to(hf.config_from(published.config))
    assert {key: published.config[key] for key in written if key != "architectures"} == {
        key: value for key, value in written.items() if key != "architectures"
    }


def test_the_state_spaces_form_is_read():
    config = hf.config_from(
        {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    )
    assert config == PRESETS["mamba_130m"]
    assert count_parameters(config) == 129_135_360


def test_the_state_spaces_name_of_the_embedding_is_read(published):
    renamed = {name.replace("embeddings", "embedding"): value for name, value in published.weights.items()}
    model = hf.model_from(hf.config_from(published.config), renamed)
    np.testing.assert_array_equal(model.embedding.weight[...], published.weights["backbone.embeddings.weight"])


def test_a_missing_array_is_named(published):
    weights = {name: value for name, value in published.weights.items() if not name.endswith("1.mixer.D")}
    with pytest.raises(ValueError, match=r"lacks backbone\.layers\.1\.mixer\.D"):
        hf.model_from(hf.config_from(published.config), weights)


def test_an_array_too_many_is_named(published):
    weights = {**published.weights, "backbone.layers.9.mixer.D": np.zeros(3)}
    with pytest.raises(ValueError, match=r"backbone\.layers\.9\.mixer\.D"):
        hf.model_from(hf.config_from(published.config), weights)


def test_an_array_of_another_shape_is_named(published):
    weights = {**published.weights, "backbone.norm_f.weight": np.zeros(3)}
    with pytest.raises(ValueError, match=r"backbone\.norm_f\.weight has shape \(3,\)"):
        hf.model_from(hf.config_from(published.config), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "llama"}, "'llama'"), ({"hidden_act": "gelu"}, "gelu"), ({"intermediate_size": 7}, "= 7")],
)
def test_a_config_of_something_else_is_refused(published, changes, message):
    with pytest.raises(ValueError, match=message):
        hf.config_from({**published.config, **changes})
