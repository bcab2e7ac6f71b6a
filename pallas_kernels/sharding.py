"""Operators on sharded arrays.

The compiler cannot split a kernel over devices. So an operator runs inside ``jax.shard_map``, where every device calls
the kernel on its own part of the arrays, and the parts follow the sharding of the operator's main input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

Dims = tuple[str, ...]
"""Names of an array's dimensions; those of the same name are sharded alike."""

Axis = str | tuple[str, ...]
"""The mesh axis, or axes, that a dimension is sharded over."""


def map_shards[Outputs: tuple[jax.Array, ...]](
    function: Callable[[Any, Axis | None], Outputs],
    inputs: Any,
    input_dims: Mapping[str, Dims],
    output_dims: tuple[Dims, ...],
) -> Outputs:
    """Calls a function on every device's part of the inputs.

    The sharding in the type of the first input decides, if it is one of a mesh with explicit axes: every other input
    is resharded so that dimensions of the same name are split alike, and dimensions the first one does not have are
    not split. Without such a mesh, and inside a ``jax.shard_map``, the inputs are taken for local already.

    Gradients of inputs that are the same on several devices are summed over these devices.

    Args:
        function: called with the local inputs, and with the mesh axis that "length" is sharded over or None.
        inputs: a NamedTuple of arrays, the main one, with a dimension "length", first; others may be None.
        input_dims: names of each input's dimensions.
        output_dims: names of each output's dimensions.
    """
    main_dims = input_dims[inputs._fields[0]]
    sharding = jax.typeof(inputs[0]).sharding
    explicit = _explicit_axes(sharding.mesh)
    if not explicit:
        return function(_vary_together(inputs), None)

    axes = dict(zip(main_dims, sharding.spec, strict=True))
    resharded = {
        name: None if array is None else jax.sharding.reshard(array, _spec(input_dims[name], axes))
        for name, array in inputs._asdict().items()
    }

    @jax.shard_map(out_specs=tuple(_spec(dims, axes) for dims in output_dims), axis_names=explicit)
    def run(inputs: Any) -> Outputs:
        inputs, axis = _vary_together(inputs), axes["length"]
        if axis is None or jax.lax.axis_size(axis) > 1:
            return function(inputs, axis)
        # An axis of one device splits nothing: the whole sequence is here, and a second pass over it would be wasted.
        outputs = function(inputs, None)
        return tuple(
            output if "length" in dims else from_last(output, axis)
            for output, dims in zip(outputs, output_dims, strict=True)
        )  # pyright: ignore[reportReturnType]

    return run(type(inputs)(**resharded))


def shard_groups(inputs: Any, input_dims: Mapping[str, Dims], members: str) -> tuple[Any, dict[str, Dims]]:
    """Makes groups of channels or heads ready for ``map_shards``: several are sharded along with their members.

    Groups that several shards need are repeated, so that each shard has its own. A single group serves all shards and
    stays as it is.

    Args:
        inputs: a NamedTuple of arrays, the main one first.
        input_dims: names of each input's dimensions. Those with a dimension "groups" have the same number of groups.
        members: the dimension of the main input that is cut into groups.

    Returns:
        What ``map_shards`` takes for both.
    """
    shards = shard_count(inputs[0], input_dims[inputs._fields[0]].index(members))
    sharded_dims = dict(input_dims)
    for name, dims in input_dims.items():
        if "groups" not in dims:
            continue
        array, dim = getattr(inputs, name), dims.index("groups")
        groups = array.shape[dim]
        if groups == 1:
            continue
        if groups % shards:
            array = jnp.repeat(array, math.lcm(groups, shards) // groups, axis=dim)
        inputs = inputs._replace(**{name: array})
        sharded_dims[name] = (*dims[:dim], members, *dims[dim + 1 :])
    return inputs, sharded_dims


def shard_count(array: jax.Array, dim: int) -> int:
    """Number of parts that ``map_shards`` finds this dimension of an array in: 1 where it is not sharded."""
    sharding = jax.typeof(array).sharding
    axis = sharding.spec[dim] if _explicit_axes(sharding.mesh) else None
    if axis is None:
        return 1
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(sharding.mesh.shape[name] for name in names)


def vary_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Marks an array, equal on all devices, as varying over the manual mesh axes that another one varies over.

    Inside ``jax.shard_map`` the carry of a loop must be marked so from the start. Elsewhere it changes nothing.
    """
    return _vary_over(array, _varying_axes(like))


def _vary_together(inputs: Any) -> Any:
    # A kernel with its own derivative returns cotangents that vary as its outputs do. An input that varies less must
    # be cast first: the transpose of the cast then sums its cotangents over the devices.
    axes = frozenset[str]().union(*(_varying_axes(array) for array in jax.tree.leaves(inputs)))
    return jax.tree.map(lambda array: _vary_over(array, axes), inputs)


def _vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _varying_axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _explicit_axes(mesh: Any) -> frozenset[str]:
    return frozenset(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )


def _spec(dims: Dims, axes: dict[str, Axis | None]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(dim) for dim in dims))


def continues_previous(segment_ids: jax.Array, axis: Axis) -> jax.Array:
    """Tells, for each row, whether this device's first token is of the same segment as the last one before it.

    Args:
        segment_ids: (batch, length), this device's part.
        axis: mesh axis that the length is sharded over. The first device's token counts as continuing.
    """
    previous_last = from_previous(segment_ids[:, -1], axis)
    return (segment_ids[:, 0] == previous_last) | (jax.lax.axis_index(axis) == 0)


def from_previous(array: jax.Array, axis: Axis) -> jax.Array:
    """Returns the array of the device before this one along a mesh axis; zeros on the first."""
    count = jax.lax.axis_size(axis)
    return jax.lax.ppermute(array, axis, [(source, source + 1) for source in range(count - 1)])


def from_last(array: jax.Array, axis: Axis) -> jax.Array:
    """Returns the array of the last device along a mesh axis, the same on all of them."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, array, 0), axis)
