"""The batching rule of kernels, which have a batch dimension already."""

from __future__ import annotations

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Arrays = dict[str, jax.Array]


def batch_by_folding(run: Callable[[Arrays], Arrays], *, parameters: Collection[str]) -> Callable[[Arrays], Arrays]:
    """Gives a function a rule for ``jax.vmap``: the new dimension joins the batch.

    Where parameters have the new dimension too, the function runs once for each of them.

    Args:
        run: takes and returns arrays by name, all with the batch as their first dimension, parameters excepted.
        parameters: names of the inputs without a batch.
    """
    batched = custom_vmap(run)

    @batched.def_vmap
    def rule(axis_size: int, in_batched: list[dict[str, bool]], arrays: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = in_batched
        if any(is_batched[name] for name in parameters if name in arrays):
            stacked = {name: array for name, array in arrays.items() if is_batched[name]}
            shared = {name: array for name, array in arrays.items() if not is_batched[name]}
            results = jax.lax.map(lambda one: batched(shared | one), stacked)
        else:
            folded = {}
            for name, array in arrays.items():
                if name not in parameters:
                    if not is_batched[name]:
                        array = jnp.broadcast_to(array, (axis_size, *array.shape))
                    array = array.reshape(-1, *array.shape[2:])
                folded[name] = array
            results = {name: array.reshape(axis_size, -1, *array.shape[1:]) for name, array in batched(folded).items()}
        return results, dict.fromkeys(results, True)

    return batched
