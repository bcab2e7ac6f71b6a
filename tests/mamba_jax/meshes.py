"""Meshes of CPU devices, and modules spread over them."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mamba_jax import sharding


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of CPU devices with these sizes of axes, 1 for all others."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Explicit,) * len(shape))


def on_current_mesh[Module](module: Module, build: Callable[[], Module]) -> Module:
    """A module's numbers in one that is built on the current mesh, sharded as that is.

    To put them there takes a fraction of the time that it takes to compile the initialisation.
    """

    def put(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        spec = wanted.sharding.spec if wanted.sharding else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(jax.sharding.get_mesh(), spec))

    built = jax.eval_shape(build)
    return jax.tree.unflatten(jax.tree.structure(built), map(put, jax.tree.leaves(module), jax.tree.leaves(built)))
