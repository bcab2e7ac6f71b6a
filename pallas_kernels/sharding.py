"""Operators on sharded arrays."""

from __future__ import annotations

import jax


def vary_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Marks an array, equal on all devices, as varying over the manual mesh axes that another one varies over.

    Inside ``jax.shard_map`` the carry of a loop must be marked so from the start. Elsewhere it changes nothing.
    """
    axes = _varying_axes(like) - _varying_axes(array)
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def _varying_axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
