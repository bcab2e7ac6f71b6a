import dataclasses

import jax
import numpy as np
import pytest

from mamba_jax.long_context import DeciMambaConfig, LongMambaConfig, ScalingConfig, calibrate, extend
from mamba_jax.long_context.decimamba import DecimatedLanguageModel
from mamba_jax.long_context.diagnostics import collect
from tests.mamba_jax.long_context.models import TRAINING_LENGTH, language_model, tokens

LONGMAMBA, DECIMAMBA = LongMambaConfig(1e-2, length=4 * TRAINING_LENGTH), DeciMambaConfig((1,), base_length=20)
SCALING = ScalingConfig(delta=0.5, A=0.25)


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, tokens(0, 4, TRAINING_LENGTH))


@pytest.fixture(scope="module")
def sequence():
    return tokens(1, 1, 4 * TRAINING_LENGTH)


def test_each_config_extends_by_its_own_method(model, calibration, sequence):
    plain = collect(model, sequence)[0]
    longmamba = collect(extend(model, LONGMAMBA, calibration), sequence)[0]
    left_out = np.asarray(longmamba.delta == 0)
    assert 0 < left_out.mean() < 1
    np.testing.assert_allclose(longmamba.delta, np.where(left_out, 0, plain.delta), rtol=1e-5)
    scaled = collect(extend(model, SCALING), sequence)[0]
    np.testing.assert_allclose(scaled.delta, 0.5 * plain.delta, rtol=1e-4)
    np.testing.assert_allclose(scaled.A, 0.25 * plain.A, rtol=1e-6)
    decimated = extend(model, DECIMAMBA)
    assert isinstance(decimated, DecimatedLanguageModel)
    assert decimated.decimation == DECIMAMBA


def test_an_extension_replaces_the_one_before(model, calibration):
    longmamba = extend(model, LONGMAMBA, calibration)
    for config in (SCALING, None):
        actual, expected = extend(longmamba, config), extend(model, config)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(extend(longmamba, None)) == jax.tree.structure(model)


def test_what_is_missing_is_said(model):
    with pytest.raises(ValueError, match="LongMamba needs a calibration of the model"):
        extend(model, dataclasses.replace(LONGMAMBA, length=None))
    with pytest.raises(ValueError, match="the model is decimated already"):
        extend(extend(model, DECIMAMBA), SCALING)
