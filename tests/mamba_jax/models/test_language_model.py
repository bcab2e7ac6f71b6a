import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.huggingface import mamba, mamba2
from mamba_jax.mixers import Mamba1Config
from mamba_jax.models.language_model import LanguageModel, LanguageModelConfig, count_parameters
from mamba_jax.models.presets import PRESETS, preset
from tests.mamba_jax import golden
from tests.mamba_jax.reading import read

CONFIG = LanguageModelConfig(
    vocab_size=40,
    width=16,
    pattern="Mm",
    repeats=2,
    layers={"M": Mamba1Config(state_size=4), "m": Mamba1Config(state_size=2, expand=1)},
    compute_dtype="float32",
)


def build(config: LanguageModelConfig = CONFIG) -> LanguageModel:
    return config.build(nnx.Rngs(0))


def tokens(batch_size: int = 2, length: int = 11, seed: int = 0):
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, CONFIG.vocab_size)


@pytest.fixture(scope="module", params=["mamba1_tiny", "mamba1_options", "mamba2_tiny", "mamba2_options"])
def published(request) -> tuple[golden.Golden, LanguageModel]:
    return golden.load_model(request.param)


def test_logits_equal_those_of_transformers(published):
    expected, model = published
    logits, _ = read(model, expected.input_ids)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)


def test_logits_of_steps_equal_those_of_transformers(published):
    expected, model = published
    step, state = jax.jit(lambda token, state: model.step(token, state)), model.init_state(len(expected.input_ids))
    for t in range(expected.input_ids.shape[1]):
        logits, state = step(expected.input_ids[:, t], state)
        np.testing.assert_allclose(logits, expected.logits[:, t], atol=1e-4)


def test_gradients_equal_those_of_transformers(published):
    expected, model = published

    tokens = jnp.asarray(expected.input_ids)

    def loss(model):
        logits, _ = model(tokens[:, :-1])
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(loss))(model)
    assert float(value) == pytest.approx(expected.loss, rel=1e-5)
    family = mamba2 if "2" in model.config.pattern else mamba
    ours = family.weights_from(gradients)
    assert ours.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("name", "published_count"),
    [
        ("mamba_130m", 129_135_360),
        ("mamba_370m", 371_516_416),
        ("mamba_790m", 793_204_224),
        ("mamba_1_4b", 1_372_178_432),
        ("mamba_2_8b", 2_768_345_600),
        ("mamba2_130m", 128_989_632),
        ("mamba2_370m", 368_346_624),
        ("mamba2_780m", 780_161_280),
        ("mamba2_1_3b", 1_343_757_312),
        ("mamba2_2_7b", 2_702_599_680),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, published_count):
    assert count_parameters(PRESETS[name]) == published_count


def test_mamba2_2_7b_is_as_large_as_the_published_checkpoint():
    # state-spaces/mamba2-2.7b on Hugging Face: pytorch_model.bin, in float16, of 5.41 GB.
    assert 2 * count_parameters(PRESETS["mamba2_2_7b"]) / 1e9 == pytest.approx(5.41, abs=0.005)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("mamba2")])
def test_mamba2_presets_have_the_parameters_of_the_authors_module(name):
    # mamba_ssm/modules/mamba2.py: in_proj, conv1d, dt_bias, A_log, D, norm and out_proj; the block's norm.
    width, layers = PRESETS[name].width, PRESETS[name].num_layers
    channels, heads, matrices = 2 * width, 2 * width // 64, 2 * 128
    in_proj, out_proj = width * (2 * channels + matrices + heads), channels * width
    layer = in_proj + 5 * (channels + matrices) + 3 * heads + channels + out_proj + width
    assert count_parameters(PRESETS[name]) == layers * layer + width + 50288 * width


def test_a_preset_can_be_changed_and_an_unknown_one_lists_the_known():
    assert preset("mamba_130m", width=512).width == 512
    with pytest.raises(ValueError, match="mamba_130m, mamba_370m"):
        preset("mamba_13m")


def test_layers_follow_the_pattern():
    model = build()
    assert CONFIG.num_layers == 4
    assert [blocks.mixer.A_log.shape for blocks in model.blocks] == [(2, 32, 4), (2, 16, 2)]
    # The repeats do not start alike.
    assert not np.array_equal(*model.blocks[0].mixer.in_proj.weight[...])


def test_steps_and_chunks_equal_the_whole_sequence():
    model, sequence = build(), tokens()
    whole, final = read(model, sequence)
    first, state = read(model, sequence[:, :4])
    second, state = read(model, sequence[:, 4:8], state)
    step, rest = jax.jit(model.step), []
    for t in range(8, sequence.shape[1]):
        logits, state = step(sequence[:, t], state)
        rest.append(logits)
    np.testing.assert_allclose(
        jnp.concatenate([first, second, jnp.stack(rest, axis=1)], axis=1), whole, atol=1e-5, rtol=1e-4
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, final)


def test_two_documents_packed_equal_each_alone():
    model, sequence = build(), tokens()
    segment_ids = jnp.where(jnp.arange(sequence.shape[1]) < 4, 0, 1)[None].repeat(2, axis=0)
    packed, _ = read(model, sequence, segment_ids=segment_ids)
    alone = [read(model, part)[0] for part in (sequence[:, :4], sequence[:, 4:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_no_gradient(remat):
    sequence = tokens()

    def gradients(config):
        model = build(config)
        return jax.jit(jax.grad(lambda model: jnp.sum(model(sequence)[0] ** 2)))(model)

    kept, recomputed = gradients(CONFIG), gradients(dataclasses.replace(CONFIG, remat=remat))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolling_changes_neither_loss_nor_gradient_and_leaves_no_loop_over_repeats(remat):
    sequence = tokens()
    segment_ids = (jnp.arange(sequence.shape[1]) > 4).astype(jnp.int32)[None].repeat(2, axis=0)
    model = build(dataclasses.replace(CONFIG, repeats=3, remat=remat))

    def loss(model, unroll):
        hidden, state = model.hidden(sequence, segment_ids=segment_ids, unroll=unroll)
        return jnp.sum(hidden**2) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state))

    run = jax.jit(jax.value_and_grad(loss), static_argnames="unroll")
    looped, unrolled = run(model, unroll=False), run(model, unroll=True)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def loops_over_repeats(unroll):
        program = str(jax.make_jaxpr(run, static_argnums=1)(model, unroll))
        return len(re.findall(r"length=3\s+reverse=\w+\s+unroll=1\b", program))

    assert loops_over_repeats(False) == 2
    assert loops_over_repeats(True) == 0


@pytest.mark.parametrize(("unroll", "share"), [(False, 0.5), (True, 0.6)])
def test_recomputing_everything_saves_memory(unroll, share):
    def temporary_bytes(remat):
        config = dataclasses.replace(CONFIG, repeats=8, remat=remat)
        model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
        step = jax.jit(jax.grad(lambda model, x: jnp.sum(model.hidden(x, unroll=unroll)[0])))
        return step.lower(model, tokens(8, 256)).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < share * temporary_bytes("none")


def test_the_residual_stream_may_stay_in_float32():
    sequence = tokens()

    def logits(**changes):
        return read(build(dataclasses.replace(CONFIG, repeats=12, **changes)), sequence)[0]

    exact = logits()

    def error(residual_in_float32):
        rounded = logits(compute_dtype="bfloat16", residual_in_float32=residual_in_float32)
        assert rounded.dtype == jnp.float32
        return float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact))

    assert error(True) < error(False) < 0.1


def test_flops_count_two_for_each_weight_and_token_and_little_more():
    # At this size the scan and the convolution are a few percent of the matrix products.
    model = jax.eval_shape(lambda: preset("mamba_130m").build(nnx.Rngs(0)))
    assert 2 * 129_135_360 * 2048 < model.flops(2048) < 1.1 * 2 * 129_135_360 * 2048


def test_flops_are_the_same_of_a_model_and_of_its_shapes():
    assert build().flops(50) == jax.eval_shape(build).flops(50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "MX"}, r"LanguageModel\.pattern = 'MX'.*\bM, m\b.*lacks \['X'\]"),
        ({"pattern": ""}, r"LanguageModel\.pattern = ''"),
        ({"repeats": 0}, r"LanguageModel\.repeats = 0"),
        ({"norm_epsilon": 0.0}, r"LanguageModel\.norm_epsilon = 0\.0"),
        ({"remat": "some"}, r"LanguageModel\.remat = 'some'.*none, dots, full"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_settings_that_cannot_be_used_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
