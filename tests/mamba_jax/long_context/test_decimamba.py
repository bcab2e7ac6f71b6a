import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mamba_jax import sharding
from mamba_jax.generation import Sampling, generate, prefill
from mamba_jax.long_context.decimamba import DeciMambaConfig, apply_decimamba
from mamba_jax.long_context.diagnostics import collect
from mamba_jax.long_context.scaling import ScalingConfig, apply_scaling
from mamba_jax.mixers.mamba1 import Mamba1
from mamba_jax.mixers.mamba2 import Mamba2Config
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from tests.mamba_jax.long_context.models import language_model, on_mesh, tokens
from tests.mamba_jax.meshes import mesh
from tests.mamba_jax.reading import read

LENGTH = 40
CONFIG = DeciMambaConfig(layers=(1, 2), base_length=20, beta=0.5, min_length=4)


def of_four_layers(pattern: str):
    return language_model(pattern=pattern, repeats=4 // len(pattern))


@pytest.fixture(scope="module", params=["M", "2", "3", "M2"], ids=["mamba1", "mamba2", "mamba3", "hybrid"])
def model(request):
    return of_four_layers(request.param)


@pytest.fixture(scope="module")
def decimated(model):
    return apply_decimamba(model, CONFIG)


# The steps of Mamba-3 begin at the token before, kept or not: reading the kept ones alone would be another thing.
SEES_ITS_OWN_TOKEN = pytest.mark.parametrize("pattern", ["M", "2", "M2"])


@jax.jit
def of_block(block, x):
    return block(x, state=None, segment_ids=None)[0]


@jax.jit
def selection_and_gate(block, x):
    u = block.normalise(x)
    mixer = block.mixer
    return mixer.selection(u), mixer.in_proj.parts(u)[1] if isinstance(mixer, Mamba1) else mixer._project_in(u)[0]


@jax.jit
def scan_alone(mixer, x, z, delta, A, B, C):
    """The mixer's output for tokens that are scanned without the others, after projections and convolution."""
    if isinstance(mixer, Mamba1):
        return mixer.out_proj(selective_scan(x, delta, A, B, C, mixer.D[...], z, implementation="reference"))
    return mixer._project_out(ssd(x, delta, A, B, C, mixer.D[...], implementation="reference"), z)


def by_definition(model, config, sequence):
    """Hidden states of one sequence by the paper's text: gather x, z, delta, B, C and the residual, then scan.

    Returns the hidden states of the tokens that are kept to the end, and their places.
    """
    x, places = model.embed(sequence[None]), np.arange(len(sequence))
    per_repeat = len(model.config.pattern)
    for layer in range(model.config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer // per_repeat], model.blocks[layer % per_repeat])
        if layer not in config.layers:
            x = of_block(block, x)
            continue
        selection, z = selection_and_gate(block, x)
        wanted = config.base_length * config.beta ** config.layers.index(layer)
        count = int(max(min(x.shape[1], wanted), config.min_length))
        norm = np.linalg.norm(np.asarray(selection.delta[0], np.float64), axis=-1)
        kept = sorted([*np.argsort(norm[:-1])[::-1][: count - 1].tolist(), x.shape[1] - 1])
        y = scan_alone(
            block.mixer,
            *(array[:, kept] for array in (selection.x, z, selection.delta)),
            selection.A,
            *(array[:, kept] for array in (selection.B, selection.C)),
        )
        x, places = x[:, kept] + y, places[kept]
    return model.output(x)[0], places


@SEES_ITS_OWN_TOKEN
def test_kept_tokens_are_read_as_if_gathered_before_the_scan(pattern):
    model, sequence = of_four_layers(pattern), tokens(0, 2, LENGTH)
    hidden, _ = jax.jit(lambda model, tokens: model.hidden(tokens))(apply_decimamba(model, CONFIG), sequence)
    assert hidden.shape[1] == LENGTH
    for row in range(2):
        expected, places = by_definition(model, CONFIG, sequence[row])
        assert len(places) == 10
        np.testing.assert_allclose(hidden[row, places], expected, atol=2e-5)


def test_unrolled_layers_leave_out_the_same(model):
    decimated, sequence = apply_decimamba(model, CONFIG), tokens(0, 2, LENGTH)
    run = jax.jit(lambda model, tokens, unroll: model.hidden(tokens, unroll=unroll)[0], static_argnums=2)
    np.testing.assert_allclose(run(decimated, sequence, True), run(decimated, sequence, False), atol=2e-5)


@SEES_ITS_OWN_TOKEN
def test_tokens_that_are_left_out_go_no_further(pattern):
    """What a layer above does shows in the tokens that are kept, and in no other."""
    model, sequence = of_four_layers(pattern), tokens(1, 1, LENGTH)
    config = DeciMambaConfig(layers=(1,), base_length=20)
    _, kept = by_definition(model, config, sequence[0])
    changed = jax.tree.map(lambda leaf: leaf, model)
    top = changed.blocks[-1].mixer.out_proj.weight
    top[...] = top[...].at[-1].set(0)
    before, after = (read(apply_decimamba(m, config), sequence)[0][0] for m in (model, changed))
    left_out = np.setdiff1d(np.arange(LENGTH), kept)
    assert len(left_out) == 20
    np.testing.assert_array_equal(before[left_out], after[left_out])
    assert np.all(np.abs(before - after).max(axis=1)[kept] > 1e-3)


def test_sequences_no_longer_than_is_kept_are_read_as_by_the_model(model):
    sequence, config = tokens(2, 2, LENGTH), DeciMambaConfig(layers=(1, 2), base_length=LENGTH, beta=1.0)
    (logits, state), (expected, expected_state) = (read(m, sequence) for m in (apply_decimamba(model, config), model))
    np.testing.assert_array_equal(logits, expected)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_decoding_goes_on_from_the_prefill_and_leaves_out_nothing(model, decimated):
    sequence = tokens(3, 2, LENGTH + 8)
    _, state = read(decimated, sequence[:, :LENGTH])
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.init_state(2))
    # Eight tokens fit into what each layer keeps: the undecimated model reads them from the same state.
    expected, expected_state = read(model, sequence[:, LENGTH:], state)
    for t in range(8):
        logits, state = decimated.step(sequence[:, LENGTH + t], state)
        np.testing.assert_allclose(logits, expected[:, t], atol=2e-5)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_prompts_of_different_lengths_are_continued_as_if_alone():
    decimated = apply_decimamba(language_model(pattern="M2", repeats=2), CONFIG)
    prompts = [np.asarray(tokens(4, 1, length)[0]).tolist() for length in (5, 70, 23)]
    sampling = Sampling(temperature=0.0)
    together = generate(decimated, prompts, max_new_tokens=5, sampling=sampling)
    for prompt, continuation in zip(prompts, together, strict=True):
        assert generate(decimated, [prompt], max_new_tokens=5, sampling=sampling) == [continuation]


@pytest.mark.parametrize("length", [8, LENGTH], ids=["fewer than are kept", "more than are kept"])
def test_padding_is_left_out_before_any_token_and_never_read(decimated, length):
    sequence = tokens(5, 1, length)
    padded = jnp.pad(sequence, ((0, 0), (64 - length, 0)), constant_values=7)
    segment_ids = jnp.pad(jnp.ones_like(sequence), ((0, 0), (64 - length, 0)))
    logits, state = prefill(decimated, padded, segment_ids)
    expected, expected_state = prefill(decimated, sequence, jnp.ones_like(sequence))
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_the_last_tokens_always_stay(model):
    sequence, config = tokens(6, 1, LENGTH), DeciMambaConfig(layers=(3,), base_length=10, min_length=4, keep_last=9)
    decimated = apply_decimamba(model, config)
    kept = np.asarray(jax.jit(lambda model, tokens: model.hidden(tokens)[0])(decimated, sequence))
    whole = np.asarray(jax.jit(lambda model, tokens: model.hidden(tokens)[0])(model, sequence))
    assert decimated.decimation.kept(3, LENGTH) == 10
    assert kept.shape == whole.shape
    assert not np.allclose(kept[0, -9:], whole[0, -9:], atol=1e-3)  # they read a state that few have written to


def test_a_sharded_batch_is_decimated_like_a_whole_one():
    model, sequence = of_four_layers("M2").config.build(nnx.Rngs(0)), tokens(7, 4, LENGTH)
    expected, _ = read(apply_decimamba(model, CONFIG), sequence)
    with jax.set_mesh(mesh(data=2, tensor=2)):
        placed = jax.device_put(sequence, P(sharding.BATCH, None))
        actual, _ = read(apply_decimamba(on_mesh(model), CONFIG), placed)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "length", "kept"),
    [(11, 9000, 9000), (12, 9000, 8000), (13, 9000, 6640), (20, 9000, 1801), (13, 5000, 5000), (12, 7, 7)],
)
def test_each_layer_keeps_the_share_published_for_pg19(layer, length, kept):
    assert DeciMambaConfig(layers=tuple(range(12, 21)), base_length=8000, beta=0.83).kept(layer, length) == kept


def test_no_layer_keeps_less_than_twenty_tokens():
    assert DeciMambaConfig(layers=(0, 1, 2), base_length=60, beta=0.1).kept(2, 9000) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, r"DeciMamba.layers = \(\) cannot be used"),
        ({"layers": (2, 1)}, r"DeciMamba.layers = \(2, 1\) cannot be used: one or more, ascending"),
        ({"layers": (4,)}, r"DeciMamba.layers = \(4,\) cannot be used: the model's layers are 0 to 3"),
        ({"layers": (1,), "beta": 0.0}, "DeciMamba.beta = 0.0 cannot be used"),
        ({"layers": (1,), "base_length": 0}, "DeciMamba.base_length = 0 cannot be used"),
        ({"layers": (1,), "keep_last": 0}, "DeciMamba.keep_last = 0 cannot be used"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_decimamba(language_model(repeats=4), DeciMambaConfig(**settings))


def test_models_that_cannot_be_decimated_are_refused():
    model = language_model(repeats=2)
    with pytest.raises(ValueError, match="the model has extenders"):
        apply_decimamba(apply_scaling(model, ScalingConfig(delta=0.5)), DeciMambaConfig(layers=(1,)))
    with pytest.raises(ValueError, match="sequences of different lengths"):
        collect(apply_decimamba(model, DeciMambaConfig(layers=(1,))), tokens(0, 1, 9))
    floored = language_model(pattern="2", **{"2": Mamba2Config(state_size=3, head_dim=2, delta_limit_min=1e-3)})
    with pytest.raises(ValueError, match=r"steps its state by at least 0.001"):
        apply_decimamba(floored, DeciMambaConfig(layers=(1,)))
    model.blocks[0].mixer = nnx.Module()
    with pytest.raises(ValueError, match="layer 1 of a model of pattern 'M' has no delta to choose tokens by"):
        apply_decimamba(model, DeciMambaConfig(layers=(1,)))
