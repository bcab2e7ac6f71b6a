"""The operator as a Pallas Mosaic GPU kernel, which should be as fast as memory is.

XLA's loop has four numbers a thread, and so fewer bytes on their way than the memory of an H200 could deliver. Here a
block has a tile copied in, compares it, and has it copied out, and a multiprocessor has nine such blocks or more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batching import Arrays, batch_by_folding
from pallas_kernels.keep_above import xla
from pallas_kernels.keep_above.inputs import Inputs
from pallas_kernels.mosaic_gpu_compat import missing_hardware, plgpu, store
from pallas_kernels.mosaic_gpu_launch import Refs, launch

_TOKENS, _CHANNELS = 32, 256
"""Of a tile; a bulk copy takes no more than 256 along a dimension."""
_VECTOR = 2
"""Channels of a thread."""
_COPY_BYTES = 16
"""Rows that the copy engine moves must be a multiple of it."""


def unsupported_reason(inputs: Inputs, *, fill: float) -> str | None:
    """Says what stands in the way of running this kernel here, or None."""
    del fill
    _, length, channels = inputs.x.shape
    if inputs.x.dtype.name not in ("bfloat16", "float16", "float32"):
        return f"x must be bfloat16, float16 or float32, got {inputs.x.dtype}"
    if channels * inputs.x.dtype.itemsize % _COPY_BYTES:
        return (
            f"the channels of a token must fill a multiple of {_COPY_BYTES} bytes, got {channels} of {inputs.x.dtype}"
        )
    if length < _TOKENS:
        return f"there must be at least {_TOKENS} tokens, which fill a tile, got {length}"
    return missing_hardware()


def keep_above(inputs: Inputs, *, fill: float) -> tuple[jax.Array]:
    """Computes y; see ``Inputs``."""
    return (_keep({name: array for name, array in inputs._asdict().items() if array is not None}, fill),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _keep(arrays: Arrays, fill: float) -> jax.Array:
    return _batched(fill)(arrays)["y"]


def _keep_forward(arrays: Arrays, fill: float) -> tuple[jax.Array, Arrays]:
    return _keep(arrays, fill), arrays


def _keep_backward(fill: float, arrays: Arrays, dy: jax.Array) -> tuple[dict[str, Any]]:
    _, transpose = jax.vjp(lambda x: xla.keep_above(Inputs(**(arrays | {"x": x})), fill=fill), arrays["x"])
    return (dict.fromkeys(arrays) | {"x": transpose((dy,))[0]},)


_keep.defvjp(_keep_forward, _keep_backward)


@functools.cache
def _batched(fill: float) -> Callable[[Arrays], Arrays]:
    return batch_by_folding(functools.partial(_run, fill=fill), parameters=("thresholds",))


def _run(arrays: Arrays, *, fill: float) -> Arrays:
    x = arrays["x"]
    batch, length, channels = x.shape
    token_tiles, channel_tiles = -(-length // _TOKENS), -(-channels // _CHANNELS)
    # A bulk copy stops where the array ends, other loads do not.
    more_tokens, more_channels = token_tiles * _TOKENS - length, channel_tiles * _CHANNELS - channels
    inputs = {"x": x, "thresholds": jnp.pad(arrays["thresholds"], ((0, 0), (0, more_channels)))}
    if "row" in arrays:
        inputs["row"] = jnp.pad(arrays["row"].astype(jnp.int32), ((0, 0), (0, more_tokens)))
    layout = plgpu.Layout.WG_STRIDED((_CHANNELS,), vec_size=_VECTOR)

    def forward(gmem: Refs, smem: Refs) -> None:
        column, first = lax.axis_index("columns"), lax.axis_index("tokens") * _TOKENS
        sequence, channels = (
            lax.div(column, channel_tiles),
            pl.ds(lax.rem(column, channel_tiles) * _CHANNELS, _CHANNELS),
        )
        tile = (sequence, pl.ds(first, _TOKENS), channels)
        plgpu.copy_gmem_to_smem(gmem["x"].at[tile], smem["tile"], smem["barrier"])

        def load(ref: Any) -> jax.Array:
            return plgpu.load(ref, layout=layout, optimized=False)

        # Loaded while the tile is on its way.
        if "row" in gmem:
            rows = [gmem["row"][sequence, first + t] for t in range(_TOKENS)]
            thresholds = [load(gmem["thresholds"].at[row, channels]) for row in rows]
        else:
            thresholds = [load(gmem["thresholds"].at[0, channels])] * _TOKENS
        plgpu.barrier_wait(smem["barrier"])
        for t, threshold in enumerate(thresholds):
            numbers = load(smem["tile"].at[t])
            store(smem["tile"].at[t], jnp.where(numbers <= threshold, jnp.asarray(fill, x.dtype), numbers))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["tile"], gmem["y"].at[tile])
        plgpu.wait_smem_to_gmem(0)

    scratch = {"tile": plgpu.SMEM((_TOKENS, _CHANNELS), x.dtype), "barrier": plgpu.Barrier(num_arrivals=1)}
    outputs = {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    grid = {"tokens": token_tiles, "columns": batch * channel_tiles}
    return launch("keep_above", forward, inputs, outputs, scratch, grid)
