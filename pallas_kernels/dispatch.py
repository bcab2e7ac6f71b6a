"""How an operator's call gets to an implementation, on every device that holds a part of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels import implementation as implementations
from pallas_kernels.sharding import Axis, Dims, map_shards


def dispatch[Outputs: tuple[jax.Array, ...]](
    operator: str,
    implementation: str | None,
    inputs: Any,
    input_dims: Mapping[str, Dims],
    output_dims: tuple[Dims, ...],
    along_length: Callable[[Callable[[Any], Outputs], Any, Axis], Outputs] | None = None,
    **options: Any,
) -> Outputs:
    """Computes an operator on every device's part of its inputs, by the implementation that is chosen there.

    Args:
        operator: name of the operator's folder.
        implementation: as for ``implementation.choose``.
        inputs: the operator's NamedTuple, validated.
        input_dims: names of each input's dimensions, as for ``map_shards``.
        output_dims: names of each result's dimensions.
        along_length: ``along_length(compute, inputs, axis)`` computes a device's part where the length is sharded over
            a mesh axis, by calls of ``compute`` on its own tokens; None where no token sees another one.
        **options: what implementations are called with besides the inputs.

    Raises:
        ValueError: there is no implementation of this name.
        UnsupportedError: the named implementation does not support the call.
    """

    def compute(inputs: Any) -> Outputs:
        return implementations.choose(operator, implementation, inputs, **options)(inputs, **options)

    def compute_shard(inputs: Any, sequence_axis: Axis | None) -> Outputs:
        if sequence_axis is None or along_length is None:
            return compute(inputs)
        return along_length(compute, inputs, sequence_axis)

    return map_shards(compute_shard, inputs, input_dims, output_dims)


def one_token(*arrays: jax.Array | None) -> tuple[Any, ...]:
    """Gives what a step has of its token, (batch, ...), a length of 1, (batch, 1, ...); None stays None."""
    return tuple(None if array is None else array[:, None] for array in arrays)
