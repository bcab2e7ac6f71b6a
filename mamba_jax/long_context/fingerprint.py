"""Which parameters a model has, in one short name."""

from __future__ import annotations

import hashlib
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from mamba_jax.long_context.attach import without_extenders
from mamba_jax.models.language_model import LanguageModel


def fingerprint(model: LanguageModel) -> str:
    """Names a model's parameters by names, shapes, dtypes and values, in 64 hexadecimal digits.

    Extenders do not count. Equal on every mesh and on every host of one, and computed where the parameters are: only
    two numbers of each array come to the host.
    """
    leaves = jax.tree.leaves_with_path(without_extenders(model))
    digest = hashlib.sha256()
    for (path, leaf), sums in zip(leaves, jax.device_get(_checksums([leaf for _, leaf in leaves])), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {sums.tolist()}\n".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(arrays: list[Array]) -> list[UInt32[Array, " two"]]:
    return [_checksum(array) for array in arrays]


def _checksum(array: Shaped[Array, "..."]) -> UInt32[Array, " two"]:
    """Two sums, modulo 2**32, of the array's bits, scrambled with their places: they tell permutations apart."""
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(array.shape):
        stride = jnp.uint32(math.prod(array.shape[dim + 1 :]) % 2**32)
        place = place + stride * jnp.arange(size, dtype=jnp.uint32).reshape(-1, *(1,) * (array.ndim - dim - 1))
    seeds = (jnp.uint32(0x9E3779B9), jnp.uint32(0x7F4A7C15))
    return jnp.stack([jnp.sum(_scrambled(words ^ _scrambled(place ^ seed)), dtype=jnp.uint32) for seed in seeds])


def _scrambled(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit of the input moves each of the output (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
