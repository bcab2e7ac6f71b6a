"""Products that are apart: as those of one weight, without keeping their input more than once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba_jax.layers.linear import Linear

WIDTH, HIDDEN = 8, 12


def run(call, compute_dtype="float32"):
    """Calls a layer of two parts as ``call(layer, x)``; returns the function, and what it is a function of."""
    layer = Linear(
        WIDTH,
        (2, HIDDEN),
        axes=(None, None, None),
        weight_init=jax.nn.initializers.normal(),
        bias=True,
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(0),
    )
    layer.bias[...] = jnp.arange(2.0 * HIDDEN).reshape(2, HIDDEN)
    graph, parameters = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (3, 5, WIDTH))
    return lambda parameters, x: call(nnx.merge(graph, parameters), x), (parameters, x)


def test_parts_are_the_slices_of_the_whole_and_so_are_their_gradients():
    parts, arguments = run(lambda layer, x: jnp.stack(layer.parts(x), axis=2))
    whole, _ = run(lambda layer, x: layer(x))
    (got, got_vjp), (want, want_vjp) = (jax.vjp(function, *arguments) for function in (parts, whole))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    dy = jax.random.normal(jax.random.key(2), want.shape)
    for one, other in zip(jax.tree.leaves(got_vjp(dy)), jax.tree.leaves(want_vjp(dy)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_parts_keep_their_input_once():
    parts, arguments = run(lambda layer, x: layer.parts(x))
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(parts, *a)[1], *arguments))
    assert [array.shape for array in kept].count(arguments[1].shape) == 1


def test_a_checkpoint_that_keeps_products_keeps_those_of_parts():
    parts, arguments = run(lambda layer, x: jnp.sin(jnp.stack(layer.parts(x))))
    checkpointed = jax.checkpoint(parts, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(checkpointed, *a)[1], *arguments))
    assert [array.shape for array in kept].count((3, 5, HIDDEN)) == 2


def test_xla_is_kept_from_making_one_product_of_the_parts():
    parts, arguments = run(lambda layer, x: layer.parts(x))
    operands = [line for line in jax.jit(parts).lower(*arguments).as_text().splitlines() if "dot_general" in line]
    (first, second) = (line.split("dot_general ")[1].split(",")[0] for line in operands)
    assert first != second


def test_of_one_token_the_parts_are_slices_of_one_product():
    layer, (parameters, x) = run(lambda layer, x: jnp.stack(layer.parts(x), axis=-2))
    np.testing.assert_allclose(layer(parameters, x[0]), layer(parameters, x)[0], rtol=1e-6)
    assert jax.jit(layer).lower(parameters, x[0]).as_text().count("dot_general") == 1


def test_the_product_of_one_vector_is_computed_as_that_of_two():
    layer, (parameters, x) = run(lambda layer, x: layer(x), "bfloat16")
    one = x[0, :1]
    assert f"tensor<2x{WIDTH}xbf16>" in jax.jit(layer).lower(parameters, one).as_text()
    np.testing.assert_array_equal(layer(parameters, one), layer(parameters, x[0])[:1])
