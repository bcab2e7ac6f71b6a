"""How arrays lie on a mesh of devices, said once for all layers.

A model runs unchanged on one device or on any mesh with (some of) the axes below, set with ``jax.set_mesh``. Axes are
explicit: the sharding of every array is part of its type, follows from its inputs, and only the layers that mix
shardings (matrix products, lookups) name it. Axes that the current mesh lacks, and dimensions that an axis does not
divide, are left whole.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

REPLICA = "replica"
DATA = "data"
FSDP = "fsdp"
TENSOR = "tensor"
SEQUENCE = "sequence"

AXES = (REPLICA, DATA, FSDP, TENSOR, SEQUENCE)
"""Mesh axes from the slowest links to the fastest."""

BATCH = (REPLICA, DATA, FSDP)
"""Axes that the batch is divided over."""

Axis = str | tuple[str, ...] | None
"""Mesh axes along one dimension of an array."""


def explicit_axes() -> dict[str, int]:
    """Sizes of the explicit axes of the current mesh; empty where there is none, or inside ``jax.shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in types if kind == AxisType.Explicit}


def partition_spec(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> PartitionSpec:
    """Spec that puts ``axes[i]`` along dimension i, without the axes that the mesh lacks or that do not divide it."""
    if len(shape) != len(axes):
        raise ValueError(f"an array of shape {shape} has {len(shape)} dimensions, but {axes} names {len(axes)}")
    sizes = explicit_axes()

    def along(dim: int, axis: Axis) -> Axis:
        names = axis if isinstance(axis, tuple) else (axis,)
        present = tuple(name for name in names if name in sizes)
        if dim % math.prod(sizes[name] for name in present):
            return None
        return present or None

    return PartitionSpec(*(along(dim, axis) for dim, axis in zip(shape, axes, strict=True)))


def spec_of(x: ArrayLike) -> PartitionSpec:
    """Spec of an array on the current mesh, one entry a dimension."""
    aval = jax.typeof(x)
    spec = tuple(aval.sharding.spec)
    return PartitionSpec(*spec, *(None,) * (len(aval.shape) - len(spec)))


def out_sharding(*axes: Axis) -> PartitionSpec | None:
    """Sharding to ask of an operation whose inputs do not decide that of its result; None where there is no mesh."""
    return PartitionSpec(*axes) if explicit_axes() else None


def reshard(x: Shaped[Array, "..."], axes: tuple[Axis, ...]) -> Shaped[Array, "..."]:
    """Moves an array to ``axes``; returns it as it is where there is no mesh."""
    return jax.sharding.reshard(x, partition_spec(x.shape, axes)) if explicit_axes() else x


def gather(weight: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Brings the shards of a parameter together over the ``fsdp`` axis and leaves it sharded over the others.

    The transpose is the reduce-scatter of its gradient, so that FSDP is this one line.
    """
    if FSDP not in explicit_axes():
        return weight

    def without_fsdp(axis: Axis) -> Axis:
        names = axis if isinstance(axis, tuple) else (axis,)
        return tuple(name for name in names if name is not None and name != FSDP) or None

    return jax.sharding.reshard(weight, PartitionSpec(*map(without_fsdp, spec_of(weight))))
