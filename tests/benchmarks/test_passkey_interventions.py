"""The interventions against LongMamba and the model as it is."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.passkey_interventions import PARTS, PartOfText
from mamba_jax.long_context import LongMambaConfig, calibrate, extend
from mamba_jax.long_context.attach import with_extenders
from mamba_jax.models.language_model import LanguageModelConfig

LENGTH, NEEDLE = 96, (40, 60)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (1, LENGTH), 0, 64)


@pytest.fixture(scope="module")
def model():
    return LanguageModelConfig(vocab_size=64, width=16, pattern="M", repeats=2).build(nnx.Rngs(0))


@pytest.fixture(scope="module")
def longmamba(model, tokens):
    return extend(model, LongMambaConfig(length=LENGTH), calibrate(model, tokens[:, :16]))


@pytest.fixture(scope="module")
def read(model, longmamba, tokens):
    run = jax.jit(lambda model: model(tokens)[0])

    def filtered(*where):
        token_filter = longmamba.blocks[0].mixer.extender
        return run(with_extenders(model, {0: PartOfText(token_filter, NEEDLE, where, layers=2)}))

    return {"model": run(model), "longmamba": run(longmamba), "nothing": filtered(), "all": filtered(*PARTS)} | {
        part: filtered(part) for part in PARTS
    }


def test_filtering_every_part_is_longmamba_and_none_the_model(read):
    np.testing.assert_array_equal(read["all"], read["longmamba"])
    np.testing.assert_array_equal(read["nothing"], read["model"])


@pytest.mark.parametrize(
    ("part", "like", "until"), [("before", "longmamba", 39), ("needle", "model", 39), ("behind", "model", 60)]
)
def test_a_part_is_filtered_from_its_first_token_to_its_last(read, part, like, until):
    differs = np.abs(read[part] - read[like])[0].max(axis=-1) > 1e-6
    assert not differs[:until].any()
    assert differs[until:].any()
