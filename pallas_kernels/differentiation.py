"""Operators that are differentiated by a backward pass of their own, as kernels are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.batching import Arrays, batch_by_folding
from pallas_kernels.sharding import vary_like


def with_backward_pass(
    forward: Callable[..., Arrays], backward: Callable[[Arrays], Arrays], *, parameters: Collection[str]
) -> Callable[[Arrays], tuple[jax.Array, jax.Array]]:
    """Joins two passes to an operator, ``operator(arrays) -> (y, final_state)``, that JAX can differentiate and batch.

    Both passes take and return arrays by name, with the batch as their first dimension; only the inputs that are
    parameters have no batch.

    Args:
        forward: ``forward(arrays, save_states=...)`` returns "y", "final_state", and with ``save_states`` whatever else
            the backward pass will want.
        backward: called with the same arrays, what was saved, "dy", and "dfinal_state" unless nothing depends on the
            final state; returns the gradient of every one of the arrays by its name, those of parameters too one an
            element of the batch.
        parameters: names of the parameters, whether a call has them or not.
    """
    fold = functools.partial(batch_by_folding, parameters=parameters)
    run = fold(functools.partial(forward, save_states=False))
    run_and_save = fold(functools.partial(forward, save_states=True))
    run_backward = fold(backward)

    @jax.custom_vjp
    def operator(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        results = run(arrays)
        return results["y"], results["final_state"]

    def operator_forward(primals: dict[str, Any]) -> tuple[tuple[jax.Array, jax.Array], tuple[Arrays, Arrays]]:
        arrays = {name: primal.value for name, primal in primals.items()}
        saved = run_and_save(arrays)
        return (saved.pop("y"), saved.pop("final_state")), (arrays, saved)

    def operator_backward(residuals: tuple[Arrays, Arrays], cotangents: tuple[Any, Any]) -> tuple[Arrays]:
        arrays, saved = residuals
        dy, dfinal_state = cotangents
        given = {"dy": _as_array(dy, like=next(iter(arrays.values())))}
        if not isinstance(dfinal_state, SymbolicZero):
            given["dfinal_state"] = dfinal_state
        gradients = run_backward(arrays | saved | given)
        for name in parameters:
            if name in arrays:
                gradients[name] = jnp.sum(gradients[name], axis=0)
        return ({name: gradients[name].astype(array.dtype) for name, array in arrays.items()},)

    # Training has no use for the final state, and zeros in its place would be written and read again.
    operator.defvjp(operator_forward, operator_backward, symbolic_zeros=True)
    return operator


def _as_array(cotangent: Any, *, like: jax.Array) -> jax.Array:
    """Makes zeros of the cotangent of what nothing depends on, which vary over a mesh's axes as an input does."""
    if isinstance(cotangent, SymbolicZero):
        aval = cast(Any, cotangent).aval
        return vary_like(jnp.zeros(aval.shape, aval.dtype), like)
    return cotangent
