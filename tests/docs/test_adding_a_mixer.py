"""Holds the mixer of docs/adding_a_mixer.md to what the page promises."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.mamba_jax.mixers.contract import MixerContract

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
NAMES: dict = {"__name__": "adding_a_mixer"}
for block in BLOCKS[:2]:
    exec(compile(block, str(PAGE), "exec"), NAMES)


class TestGatedAverage(MixerContract):
    config = NAMES["GatedAverageConfig"]()


def test_a_mixer_takes_fewer_than_sixty_lines():
    assert len(BLOCKS[0].splitlines()) < 60


def test_it_computes_the_recurrence_on_the_page():
    mixer = TestGatedAverage().build()
    x = TestGatedAverage().input()
    gate_and_value = np.einsum("blw,wkc->blkc", np.asarray(x, np.float64), np.asarray(mixer.in_proj.weight[...]))
    a, v = 1 / (1 + np.exp(-gate_and_value[..., 0, :])), gate_and_value[..., 1, :]
    h, outputs = np.zeros_like(v[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + (1 - a[:, t]) * v[:, t]
        outputs.append(h @ np.asarray(mixer.out_proj.weight[...], np.float64))
    np.testing.assert_allclose(mixer(x)[0], np.stack(outputs, axis=1), rtol=1e-4, atol=1e-5)


def test_the_model_of_the_page_runs():
    config = NAMES["config"]
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    logits, _ = model(jnp.zeros((1, 5), jnp.int32))
    assert logits.shape == (1, 5, config.vocab_size)
