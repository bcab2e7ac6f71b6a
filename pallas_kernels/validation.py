"""Checks of operators' arguments, with errors that say what would fit."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

REAL = (jnp.floating,)
REAL_OR_COMPLEX = (jnp.floating, jnp.complexfloating)
INTEGER = (jnp.integer,)

_KIND_NAMES = {jnp.floating: "floating-point", jnp.complexfloating: "complex", jnp.integer: "integer"}

_KINDS = {"segment_ids": INTEGER}


class Checker:
    """Checks the arrays of one call against dimensions that they share by name.

    The first array with a dimension fixes its size for all later ones.
    """

    def __init__(self, operator: str):
        self._operator = operator
        self._sizes: dict[str, int] = {}
        self._fixed_by: dict[str, str] = {}

    def __call__(self, name: str, array: jax.Array, dims: tuple[str, ...], kinds: tuple[type, ...] = REAL) -> None:
        """Raises a ValueError unless the array has these dimensions and a dtype of one of these kinds."""
        if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            accepted = " or ".join(_KIND_NAMES[kind] for kind in kinds)
            raise self.error(f"{name} must be {accepted}, got {array.dtype}")
        if array.ndim != len(dims):
            raise self.error(f"{name} must be ({', '.join(dims)}), got shape {array.shape}")
        for dim, size in zip(dims, array.shape, strict=True):
            if dim not in self._sizes:
                if size == 0:
                    raise self.error(f"{name} has no elements: shape {array.shape}, {dim} must be at least 1")
                self.fix(dim, size, name)
            elif size != self._sizes[dim]:
                raise self.error(
                    f"{name} must be ({', '.join(dims)}) with {dim} {self._sizes[dim]} as in "
                    f"{self._fixed_by[dim]}, got shape {array.shape}"
                )

    def arrays(
        self,
        arrays: Mapping[str, jax.Array | None],
        dims: Mapping[str, tuple[str, ...]],
        kinds: Mapping[str, tuple[type, ...]] = _KINDS,
    ) -> None:
        """Checks the arrays that there are, in their order, against the dimensions and kinds of the same names."""
        for name, array in arrays.items():
            if array is not None:
                self(name, array, dims[name], kinds.get(name, REAL))

    def multiple(self, dim: str, of: str) -> None:
        """Raises a ValueError unless the size of one dimension is a multiple of another's."""
        size, unit = self._sizes[dim], self._sizes[of]
        if size % unit:
            raise self.error(f"{dim} must be a multiple of {of}, got {size} {dim} and {unit} {of}")

    def optional_size(self, name: str, size: int | None) -> None:
        """Raises a ValueError unless a size is None or a number from 1."""
        if size is not None and size < 1:
            raise self.error(f"{name} must be None or at least 1, got {size}")

    def fix(self, dim: str, size: int, name: str) -> None:
        """Fixes the size of a dimension that follows from an array which does not have it."""
        self._sizes[dim] = size
        self._fixed_by[dim] = name

    def error(self, message: str) -> ValueError:
        """Returns an error that starts with the operator's name."""
        return ValueError(f"{self._operator}: {message}.")
