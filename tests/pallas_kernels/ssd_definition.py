"""The SSD operator as its paper writes it, with inputs for it: what the GPU kernels are compared with."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssd.inputs import Inputs
from tests.pallas_kernels.kernel_results import norms, values_and_gradients, widened
from tests.pallas_kernels.random_arrays import RandomArrays

OPTIONAL = ("D", "z", "delta_bias", "segment_ids", "initial_state")
OPTIONS = {"delta_softplus": True, "delta_limit": (0.0, math.inf), "chunk_size": None}


def make_inputs(batch, length, heads, head_dim, state, *, groups=1, optional=OPTIONAL, rates=(-6, 4), seed=0):
    """Random inputs; decay rates are e to a power between ``rates``."""
    random = RandomArrays(seed, batch, length, heads, head_dim, state)
    extra = {
        "D": random.floats(heads, head_dim),
        "z": random.tokens(batch, length, heads, head_dim),
        "delta_bias": random.floats(heads) - 3,
        "segment_ids": random.segment_ids(batch, length),
        "initial_state": random.floats(batch, heads, head_dim, state),
    }
    return Inputs(
        x=random.tokens(batch, length, heads, head_dim),
        delta=random.tokens(batch, length, heads),
        A=random.decay_rates(heads, powers=rates),
        B=random.tokens(batch, length, groups, state),
        C=random.tokens(batch, length, groups, state),
        **{name: array for name, array in extra.items() if name in optional},
    )


def definition(inputs, *, delta_softplus=True, delta_limit=(0.0, math.inf), chunk_size=None):
    """The operator as the paper writes it, in its inputs' precision; parameters may differ from token to token."""
    del chunk_size
    heads, groups = inputs.x.shape[2], inputs.B.shape[2]
    delta = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias
    delta = jnp.clip(jnp.logaddexp(delta, 0.0) if delta_softplus else delta, *delta_limit)
    group = np.arange(heads) // (heads // groups)
    decay = jnp.exp(delta * inputs.A)
    if inputs.segment_ids is not None:
        starts = jnp.diff(inputs.segment_ids, axis=1, prepend=inputs.segment_ids[:, :1]) != 0
        decay = jnp.where(starts[..., None], 0.0, decay)

    def step(h, token):
        x, B, C, decay = token
        h = decay[..., None, None] * h + x[..., None] * B[:, group, None]
        return h, jnp.sum(C[:, group, None] * h, axis=-1)

    h = inputs.initial_state
    h = jnp.zeros(state_shape(inputs), inputs.x.dtype) if h is None else h
    tokens = (inputs.x * delta[..., None], inputs.B, inputs.C, decay)
    h, y = jax.lax.scan(step, h, jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), tokens))
    y = jnp.swapaxes(y, 0, 1)
    y = y if inputs.D is None else y + inputs.D * inputs.x
    return (y if inputs.z is None else y * inputs.z / (1 + jnp.exp(-inputs.z))), h


def state_shape(inputs):
    batch, _, heads, head_dim = inputs.x.shape
    return batch, heads, head_dim, inputs.B.shape[3]


def expected_and_scales(inputs, cotangents, **options):
    """The results in float64, and what their errors are measured by: their norm.

    A parameter's gradient is a sum over all tokens that may cancel, though its terms err alike. Its error is measured
    by the sum of their sizes.
    """
    with jax.enable_x64(True):
        wide, cotangents = widened((inputs, cotangents))
        parameters = {name: getattr(wide, name) for name in ("A", "D", "delta_bias") if getattr(wide, name) is not None}
        each = {name: jnp.broadcast_to(a, (*inputs.x.shape[:2], *a.shape)) for name, a in parameters.items()}
        run = jax.jit(functools.partial(values_and_gradients, definition, **OPTIONS | options))
        results = run(wide._replace(**each), cotangents)
        sizes = results | {f"d{name}": jnp.sum(jnp.abs(results[f"d{name}"]), axis=(0, 1)) for name in parameters}
        results |= {f"d{name}": jnp.sum(results[f"d{name}"], axis=(0, 1)) for name in parameters}
    return results, norms(sizes)


def cotangents(inputs):
    """Of both results; without a state before nothing depends on the one after either, as in training."""
    random = RandomArrays(0, dtype=inputs.x.dtype)
    dy = random.tokens(*inputs.x.shape)
    return dy, None if inputs.initial_state is None else random.floats(*state_shape(inputs))
