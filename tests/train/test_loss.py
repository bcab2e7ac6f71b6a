import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mamba_jax import sharding
from train.loss import cross_entropy


def problem(batch=3, length=7, width=5, vocab=11, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (batch, length, width), dtype)
    weight = jax.random.normal(keys[1], (width, vocab), dtype)
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    weights = jnp.round(2 * jax.random.uniform(keys[3], (batch, length))) / 2
    return hidden, weight, targets, weights


def exact(hidden, weight, targets, weights, z_loss):
    """The definition in float64, with gradients by hand from the softmax."""
    hidden, weight, weights = (np.asarray(x, np.float64) for x in (hidden, weight, weights))
    targets = np.asarray(targets)
    logits = hidden @ weight
    normaliser = scipy.special.logsumexp(logits, axis=-1)
    nll = normaliser - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    one_hot = np.eye(weight.shape[1])[targets]
    d_logits = scipy.special.softmax(logits, axis=-1) * (1 + 2 * z_loss * normaliser)[..., None] - one_hot
    d_logits *= weights[..., None]
    sums = ((nll + z_loss * normaliser**2) * weights).sum(), (nll * weights).sum(), weights.sum()
    return sums, (d_logits @ weight.T, np.einsum("blw,blv->wv", hidden, d_logits))


def computed(arguments, **options):
    def objective(hidden, weight):
        sums = cross_entropy(hidden, weight, *arguments[2:], **options)
        return sums.objective, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(*arguments[:2])
    return sums, gradients


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 12), st.integers(1, 40), st.sampled_from([0.0, 1e-4, 0.1]))
def test_loss_and_gradients_equal_the_definition(batch, length, vocab, chunk_size, z_loss):
    arguments = problem(batch, length, vocab=vocab, seed=length)
    expected_sums, expected_gradients = exact(*arguments, z_loss)
    sums, gradients = computed(arguments, z_loss=z_loss, chunk_size=chunk_size)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_alone_equals_the_loss_with_gradients():
    arguments = problem()
    np.testing.assert_allclose(cross_entropy(*arguments, chunk_size=4), computed(arguments, chunk_size=4)[0], rtol=1e-6)


def test_gradients_scale_with_what_the_loss_is_multiplied_by():
    hidden, *rest = problem()
    gradient = jax.grad(lambda hidden: cross_entropy(hidden, *rest).objective)
    scaled = jax.grad(lambda hidden: cross_entropy(hidden, *rest).objective / 8)
    np.testing.assert_allclose(gradient(hidden), 8 * scaled(hidden), rtol=1e-6)


def test_tokens_of_weight_zero_count_for_nothing_even_where_not_finite():
    hidden, weight, targets, weights = problem()
    weights = weights.at[0, 2].set(0)
    clean, clean_gradients = computed((hidden, weight, targets, weights))
    sums, gradients = computed((hidden.at[0, 2].set(1e38), weight, targets, weights))
    np.testing.assert_allclose(sums, clean, rtol=1e-6)
    np.testing.assert_array_equal(gradients[0], clean_gradients[0])


def test_huge_logits_do_not_overflow():
    hidden, weight, targets, weights = problem()
    expected, _ = exact(100 * hidden, 100 * weight, targets, weights, 0.0)
    sums, gradients = computed((100 * hidden, 100 * weight, targets, weights))
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_is_close_to_float32_and_stays_bfloat16():
    arguments = problem(batch=4, length=64, width=32, vocab=50, dtype=jnp.bfloat16)
    expected_sums, expected_gradients = exact(*arguments, 0.0)
    sums, gradients = computed(arguments)
    np.testing.assert_allclose(sums, expected_sums, rtol=2e-3)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(gradient, np.float64) - expected) < 1e-2 * np.linalg.norm(expected)


def test_memory_does_not_hold_the_logits_of_a_batch():
    batch, length, width, vocab = 8, 512, 8, 4096
    arguments = jax.eval_shape(lambda: problem(batch, length, width, vocab))

    def loss(hidden, weight, targets, weights):
        return cross_entropy(hidden, weight, targets, weights, chunk_size=128).objective

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * 4 * batch * length * vocab


@pytest.mark.parametrize(
    "sizes", [{"data": 4}, {"fsdp": 2, "sequence": 2}, {"tensor": 4}, {"data": 2, "sequence": 2, "tensor": 2}]
)
def test_sharded_equals_unsharded(sizes):
    arguments = problem(batch=4, length=6, width=8, vocab=16)
    expected_sums, expected_gradients = computed(arguments, z_loss=0.1, chunk_size=3)
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    with jax.set_mesh(jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Explicit,) * len(shape))):
        tokens = P(sharding.BATCH, sharding.SEQUENCE)
        specs = (P(*tokens, None), P(None, sharding.TENSOR), tokens, tokens)
        placed = tuple(jax.device_put(x, spec) for x, spec in zip(arguments, specs, strict=True))
        sums, gradients = computed(placed, z_loss=0.1, chunk_size=3)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
