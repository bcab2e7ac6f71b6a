"""The gated norm as Pallas Mosaic GPU kernels, which should be as fast as memory is: each pass reads its arrays once.

A block of one warpgroup goes through some of a sequence's tokens, for one group of heads, while the next ones are
loaded. Each warp has a quarter of the channels; sums over all of them take one exchange a token. Backward, the weight's
gradient stays in registers until the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batching import Arrays, batch_by_folding
from pallas_kernels.elementwise import sigmoid
from pallas_kernels.gated_rms_norm.inputs import Inputs
from pallas_kernels.mosaic_gpu_compat import (
    LANES,
    WARPS,
    load_float32,
    missing_hardware,
    plgpu,
    register_tile,
    store,
    synchronize,
)
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.mosaic_gpu_stream import Stream, stream_barriers

_VECTOR = 4
"""Channels that a lane loads at once."""
_SPAN = LANES * _VECTOR
"""Channels that a warp loads at once."""
_MAX_WIDTH = 8192
"""Channels of a group: of more, a lane's do not fit in its registers."""
_FORWARD_BLOCKS, _BACKWARD_BLOCKS = 8 * 132, 4 * 132
"""At least so many, where there are as many tokens: a few for each of an H200's multiprocessors. Backward each block
leaves a sum behind."""
_STAGES = 2
"""Tokens in shared memory at once, of each block."""

_CHANNELS = register_tile(
    [(WARPS, 1, _SPAN), (1, 1, _SPAN), (1, 1, _VECTOR)], warp_dims=(-9,), lane_dims=(-4,), vector_dim=-1
)
"""Registers of a group's channels, as (WARPS, spans, _SPAN)."""


def unsupported_reason(inputs: Inputs, *, groups: int, epsilon: float) -> str | None:
    """Says what stands in the way of running these kernels here, or None."""
    del epsilon
    for name in ("x", "z"):
        dtype = getattr(inputs, name).dtype
        if dtype.name not in ("bfloat16", "float32"):
            return f"x and z must be bfloat16 or float32, {name} is {dtype}"
    _, _, heads, head_dim = inputs.x.shape
    width = heads // groups * head_dim
    if width % (WARPS * _SPAN) or width > _MAX_WIDTH:
        return f"the channels of a group must be a multiple of {WARPS * _SPAN} up to {_MAX_WIDTH}, got {width}"
    return missing_hardware()


def gated_rms_norm(inputs: Inputs, *, groups: int, epsilon: float) -> tuple[jax.Array]:
    """Computes y; see ``Inputs``."""
    return (_norm(inputs._asdict(), groups, epsilon),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _norm(arrays: Arrays, groups: int, epsilon: float) -> jax.Array:
    return _batched(_forward, groups, epsilon)(arrays)["y"]


def _norm_forward(arrays: Arrays, groups: int, epsilon: float) -> tuple[jax.Array, Arrays]:
    return _norm(arrays, groups, epsilon), arrays


def _norm_backward(groups: int, epsilon: float, arrays: Arrays, dy: jax.Array) -> tuple[Arrays]:
    gradients = _batched(_backward, groups, epsilon)(arrays | {"dy": dy})
    gradients["weight"] = jnp.sum(gradients["weight"], axis=0)
    return ({name: gradients[name].astype(array.dtype) for name, array in arrays.items()},)


_norm.defvjp(_norm_forward, _norm_backward)


@functools.cache
def _batched(run: Callable[..., Arrays], groups: int, epsilon: float) -> Callable[[Arrays], Arrays]:
    return batch_by_folding(functools.partial(run, groups=groups, epsilon=epsilon), parameters=("weight",))


def _forward(arrays: Arrays, *, groups: int, epsilon: float) -> Arrays:
    tokens = _Tokens(arrays, groups, _FORWARD_BLOCKS)

    def forward(gmem: Refs, smem: Refs) -> None:
        def work(token: Any, refs: Refs, carry: None) -> None:
            del carry
            x, z = (load_float32(refs[name], _CHANNELS) for name in ("x", "z"))
            gated = x * z * sigmoid(z)
            (square,) = tokens.sums(smem, token, gated * gated)
            scale = lax.rsqrt(square / tokens.width + epsilon)
            y = gated * scale * tokens.weight(gmem)
            store(gmem["y"].at[token], y.astype(gmem["y"].dtype))

        tokens.walk(gmem, smem, ("x", "z"), work, None)

    results = tokens.launch(forward, ("x", "z"), {"y": tokens.type_of("x")}, sums=1)
    return {"y": results["y"].reshape(arrays["x"].shape)}


def _backward(arrays: Arrays, *, groups: int, epsilon: float) -> Arrays:
    tokens = _Tokens(arrays, groups, _BACKWARD_BLOCKS)
    streamed = ("x", "z", "dy")

    def backward(gmem: Refs, smem: Refs) -> None:
        def load(refs: Refs) -> tuple[jax.Array, ...]:
            x, z, dy = (load_float32(refs[name], _CHANNELS) for name in streamed)
            gate = sigmoid(z)
            return x, gate, z * gate, dy, x * z * gate, dy * tokens.weight(gmem)

        def work(token: Any, refs: Refs, dweight: jax.Array) -> jax.Array:
            *_, gated, gradient = load(refs)
            square, along = tokens.sums(smem, token, gated * gated, gated * gradient)
            # Once more from shared memory: kept meanwhile, they would not fit in the registers.
            x, gate, silu, dy, gated, gradient = load(refs)
            scale = lax.rsqrt(square / tokens.width + epsilon)
            # The gradient of the gated input; a change along it changes nothing.
            dgated = scale * (gradient - gated * (along * scale * scale / tokens.width))
            store(gmem["dx"].at[token], (dgated * silu).astype(gmem["dx"].dtype))
            store(gmem["dz"].at[token], (dgated * x * (gate + silu * (1.0 - gate))).astype(gmem["dz"].dtype))
            return dweight + dy * gated * scale

        zeros = plgpu.layout_cast(jnp.zeros(tokens.channels, jnp.float32), _CHANNELS)
        dweight = tokens.walk(gmem, smem, streamed, work, zeros)
        place = lax.axis_index("batch"), lax.axis_index("part"), lax.axis_index("group")
        store(gmem["dweight"].at[place], dweight)

    outputs = {
        "dx": tokens.type_of("x"),
        "dz": tokens.type_of("z"),
        "dweight": jax.ShapeDtypeStruct((tokens.batch, tokens.parts, groups, *tokens.channels), jnp.float32),
    }
    results = tokens.launch(backward, streamed, outputs, sums=2)
    return {
        "x": results["dx"].reshape(arrays["x"].shape),
        "z": results["dz"].reshape(arrays["z"].shape),
        "weight": jnp.sum(results["dweight"], axis=1).reshape(tokens.batch, *arrays["weight"].shape),
    }


class _Tokens:
    """How the tokens of a call are cut, and the way of a block through its own."""

    def __init__(self, arrays: Arrays, groups: int, blocks: int) -> None:
        self.batch, self.length, heads, head_dim = arrays["x"].shape
        self.groups, self.width = groups, heads // groups * head_dim
        self.channels = (WARPS, self.width // (WARPS * _SPAN), _SPAN)
        self.parts = min(self.length, -(-blocks // (self.batch * groups)))
        self.tokens_per_part = -(-self.length // self.parts)
        self.parts = -(-self.length // self.tokens_per_part)
        self.inputs = {name: array.reshape(*array.shape[:-2], groups, *self.channels) for name, array in arrays.items()}

    def type_of(self, name: str) -> jax.ShapeDtypeStruct:
        """Type of a result that is like an input."""
        return jax.ShapeDtypeStruct(self.inputs[name].shape, self.inputs[name].dtype)

    def launch(self, body: Any, streamed: tuple[str, ...], outputs: dict[str, Any], *, sums: int) -> Arrays:
        """Runs a kernel with shared memory for ``walk`` and so many ``sums``."""
        scratch = {
            **{name: plgpu.SMEM((_STAGES, *self.channels), self.inputs[name].dtype) for name in streamed},
            "sums": plgpu.SMEM((2, sums, WARPS), jnp.float32),
            **stream_barriers(len(streamed), _STAGES),
        }
        grid = {"group": self.groups, "batch": self.batch, "part": self.parts}
        return launch("gated_rms_norm", body, self.inputs, outputs, scratch, grid)

    def weight(self, gmem: Refs) -> jax.Array:
        """The weights of the group's channels."""
        return load_float32(gmem["weight"].at[lax.axis_index("group")], _CHANNELS)

    def walk(self, gmem: Refs, smem: Refs, streamed: tuple[str, ...], work: Any, carry: Any) -> Any:
        """Calls ``work(token, refs, carry) -> carry`` for each token: its place in memory, and what was loaded."""
        batch, part, group = (lax.axis_index(name) for name in ("batch", "part", "group"))
        first = part * self.tokens_per_part
        count = jnp.minimum(self.tokens_per_part, self.length - first)

        def sources(i: Any) -> Refs:
            return {name: gmem[name].at[batch, first + i, group] for name in streamed}

        stream = Stream(smem, sources, count, _STAGES)
        stream.start()
        return stream.walk(lambda i, refs, carry: work((batch, first + i, group), refs, carry), carry)

    def sums(self, smem: Refs, token: tuple[Any, ...], *terms: jax.Array) -> list[jax.Array]:
        """Sums over all channels, of every warp."""
        # Two places take turns: who is a token ahead does not write what others still read.
        place = smem["sums"].at[lax.rem(token[1], 2)]
        for i, term in enumerate(terms):
            store(place.at[i], jnp.sum(jnp.sum(term, axis=1), axis=1))
        synchronize()
        return [functools.reduce(jnp.add, [place[i, warp] for warp in range(WARPS)]) for i in range(len(terms))]
