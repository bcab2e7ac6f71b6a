"""Cross-entropy of a language model without ever holding the logits of a batch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mamba_jax import sharding


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, each token times its weight."""

    objective: Float[Array, ""]
    """Negative log-likelihood plus z_loss * log(sum(exp(logits)))**2; the only differentiable one."""
    nll: Float[Array, ""]
    """Negative log-likelihood, in nats."""
    weight: Float[Array, ""]
    """Weights."""


def cross_entropy(
    hidden: Float[Array, "batch length width"],
    output_weight: Float[Array, "width vocabulary"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    z_loss: float = 0.0,
    chunk_size: int = 2048,
) -> LossSums:
    """Sums of the loss of predicting ``targets`` from ``hidden @ output_weight``, a chunk of tokens at a time.

    The forward pass of a differentiated call computes the gradients of a chunk while its logits are there, so that no
    chunk is computed twice: what is saved is the size of the inputs. Matrix products are in the dtype of the inputs,
    with float32 sums; the softmax is float32. Over a mesh, tokens lie along the batch and ``sequence`` axes and the
    vocabulary along ``tensor``, where maxima and sums cross devices.

    Args:
        hidden: what the output layer sees.
        output_weight: its weight.
        targets: the token that follows each one, below the vocabulary.
        weights: 0 where there is nothing to predict.
        z_loss: weight of the squared logarithm of the softmax's normaliser (PaLM, arXiv:2204.02311, section 5).
        chunk_size: tokens a device turns into logits at a time.
    """
    return _cross_entropy(hidden, output_weight, targets, weights, z_loss, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, output_weight, targets, weights, z_loss, chunk_size):
    sums, _ = _sharded(hidden, output_weight, targets, weights, z_loss, chunk_size, with_gradients=False)
    return sums


def _forward(hidden, output_weight, targets, weights, z_loss, chunk_size):
    return _sharded(hidden, output_weight, targets, weights, z_loss, chunk_size, with_gradients=True)


def _backward(z_loss, chunk_size, gradients, cotangents):
    scale = cotangents.objective
    d_hidden, d_output_weight = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_output_weight, None, None


_cross_entropy.defvjp(_forward, _backward)


def _sharded(hidden, output_weight, targets, weights, z_loss, chunk_size, with_gradients):
    """Runs ``_local`` on each device's tokens and part of the vocabulary."""
    local = functools.partial(_local, z_loss=z_loss, chunk_size=chunk_size, with_gradients=with_gradients)
    if not sharding.explicit_axes():
        return local(hidden, output_weight, targets, weights, token_axes=(), vocab_axes=())
    tokens = P(*sharding.spec_of(hidden)[:2])
    vocab = sharding.spec_of(output_weight)[1]
    by_tokens, by_vocab = P(*tokens, None), P(None, vocab)
    # Not differentiated (the gradients are computed in here), and every sum over the mesh is written out.
    mapped = jax.shard_map(
        functools.partial(local, token_axes=_names(*tokens), vocab_axes=_names(vocab)),
        in_specs=(by_tokens, by_vocab, tokens, tokens),
        out_specs=(P(), (by_tokens, by_vocab) if with_gradients else None),
        check_vma=False,
    )
    return mapped(hidden, output_weight, jax.sharding.reshard(targets, tokens), jax.sharding.reshard(weights, tokens))


def _names(*axes: sharding.Axis) -> tuple[str, ...]:
    grouped = (axis if isinstance(axis, tuple) else (axis,) for axis in axes)
    return tuple(name for group in grouped for name in group if name is not None)


def _local(hidden, output_weight, targets, weights, *, z_loss, chunk_size, with_gradients, token_axes, vocab_axes):
    """Sums over all devices, and the gradients of this device's hidden vectors and of its part of the weight."""
    width, vocab = output_weight.shape
    chunks = _Chunks(targets.size, min(chunk_size, targets.size))
    first_token = _linear_index(vocab_axes) * vocab

    def one_chunk(carry, chunk):
        sums, d_output_weight = carry
        hidden, targets, weights = chunk
        logits = jnp.dot(hidden, output_weight, preferred_element_type=jnp.float32)
        target = targets - first_token
        maximum = jax.lax.pmax(jnp.max(logits, axis=-1), vocab_axes) if vocab_axes else jnp.max(logits, axis=-1)
        unnormalised = jnp.exp(logits - maximum[:, None])
        normaliser = _sum_over(jnp.sum(unnormalised, axis=-1), vocab_axes)
        log_normaliser = maximum + jnp.log(normaliser)
        target_logit = _sum_over(_entries(logits, target), vocab_axes)
        nll = log_normaliser - target_logit
        objective = nll + z_loss * jnp.square(log_normaliser)
        # A padded or masked token contributes exactly zero, whatever its logits are.
        total = lambda x: jnp.sum(jnp.where(weights == 0, 0.0, x * weights))  # noqa: E731
        sums = LossSums(sums.objective + total(objective), sums.nll + total(nll), sums.weight + jnp.sum(weights))
        if not with_gradients:
            return (sums, None), None
        softmax = unnormalised / normaliser[:, None]
        d_logits = softmax * (1.0 + 2.0 * z_loss * log_normaliser)[:, None] - (target[:, None] == jnp.arange(vocab))
        d_logits = jnp.where(weights[:, None] == 0, 0.0, d_logits * weights[:, None]).astype(hidden.dtype)
        d_hidden = _sum_over(jnp.dot(d_logits, output_weight.T, preferred_element_type=jnp.float32), vocab_axes)
        d_output_weight += jnp.dot(hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (sums, d_output_weight), d_hidden.astype(hidden.dtype)

    zero = jnp.zeros((), jnp.float32)
    start = (LossSums(zero, zero, zero), jnp.zeros((width, vocab), jnp.float32) if with_gradients else None)
    by_chunk = (
        chunks.split(hidden.reshape(-1, width)),
        chunks.split(targets.reshape(-1)),
        chunks.split(weights.reshape(-1)),
    )
    (sums, d_output_weight), d_hidden = jax.lax.scan(one_chunk, start, by_chunk)
    sums = jax.tree.map(lambda x: _sum_over(x, token_axes), sums)
    if d_output_weight is None:
        return sums, None
    d_hidden = chunks.join(d_hidden).reshape(hidden.shape)
    return sums, (d_hidden, _sum_over(d_output_weight, token_axes).astype(output_weight.dtype))


def _entries(rows, places):
    """One entry of each row, by its place; zero where the row, which is part of a longer one, does not have it."""
    last = rows.shape[1] - 1
    entries = jnp.take_along_axis(rows, jnp.clip(places, 0, last)[:, None], axis=1)[:, 0]
    return jnp.where((places >= 0) & (places <= last), entries, 0.0)


class _Chunks(NamedTuple):
    """Cuts the first dimension into equal chunks, the last one padded with zeros."""

    size: int
    chunk_size: int

    def split(self, x):
        padding = -self.size % self.chunk_size
        padded = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x
        return padded.reshape(-1, self.chunk_size, *x.shape[1:])

    def join(self, x):
        return x.reshape(-1, *x.shape[2:])[: self.size]


def _sum_over(x, axes):
    return jax.lax.psum(x, axes) if axes else x


def _linear_index(axes):
    return jax.lax.axis_index(axes) if axes else 0
