"""Matrix products with a learned weight."""

from __future__ import annotations

import string
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mamba_jax import sharding


class Linear(nnx.Module):
    """y = x W + b over the last dimension of x; the output may have several dimensions.

    The weight, float32 of shape (in_features, *out_features), is gathered over ``fsdp`` and rounded to the compute
    dtype at each use. Where input and weight are both sharded along the contracted dimension, the partial products
    are summed over the mesh.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | tuple[int, ...],
        *,
        axes: tuple[sharding.Axis, ...],
        weight_init: Initializer,
        bias: bool = False,
        compute_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        out_shape = (out_features,) if isinstance(out_features, int) else out_features
        shape = (in_features, *out_shape)
        spec = sharding.partition_spec(shape, axes)
        weight = weight_init(rngs.params(), shape, jnp.float32, out_sharding=sharding.out_sharding(*spec))
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(sharding.reshard(jnp.zeros(out_shape), spec[1:]), weight_decay=False) if bias else None
        self.compute_dtype = jnp.dtype(compute_dtype)

    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch ..."]:
        return self._product(_matmul, x, self._weight(), self._bias())

    def parts(self, x: Float[Array, "*batch in_features"]) -> tuple[Float[Array, "*batch ..."], ...]:
        """The slices of the output's first dimension, each a product and an array of its own.

        A kernel takes whole arrays: a slice of one product would be copied for it. Of one token a row, ``x`` having no
        length, the weight is what would be copied.
        """
        if x.ndim == 2:
            y = self(x)
            return tuple(y[:, part] for part in range(y.shape[1]))
        weight, bias = self._weight(), self._bias()
        return tuple(
            self._product(_matmul_apart, x, weight[:, part], None if bias is None else bias[part])
            for part in range(weight.shape[1])
        )

    def round(self) -> None:
        """Rounds weight and bias to the compute dtype for good, which each use would do again."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.set_value(parameter[...].astype(self.compute_dtype))

    def _weight(self):
        return sharding.gather(self.weight[...].astype(self.compute_dtype))

    def _bias(self):
        return None if self.bias is None else sharding.gather(self.bias[...].astype(self.compute_dtype))

    def _product(self, matmul: Callable[..., jax.Array], x, weight, bias):
        y = matmul(x.astype(self.compute_dtype), weight)
        return y if bias is None else y + bias

    @property
    def flops(self) -> int:
        """Floating-point operations for one vector."""
        return 2 * self.weight.size


def _matmul(x, weight):
    """The product over the last dimension of x and the first of the weight."""
    if x.shape[:-1] == (1,) and x.dtype.itemsize == 2:
        # XLA computes one vector's product term by term, and writes the terms to memory; that of two is a kernel.
        return _matmul(jnp.concatenate([x, x]), weight)[:1]
    batch_dims, out_dims = x.ndim - 1, weight.ndim - 1
    letters = iter(string.ascii_letters)
    batch = "".join(next(letters) for _ in range(batch_dims))
    contracted = next(letters)
    out = "".join(next(letters) for _ in range(out_dims))
    return jnp.einsum(
        f"{batch}{contracted},{contracted}{out}->{batch}{out}",
        x,
        weight,
        out_sharding=sharding.out_sharding(*sharding.spec_of(x)[:-1], *sharding.spec_of(weight)[1:]),
    )


def _product_apart(x, weight):
    """As ``_matmul``. XLA makes one product of several with the same x; behind a barrier it is not the same.

    Nor is it for the weight's gradient, before whose one product the gradients of the parts would be copied together.
    """
    return _matmul(*jax.lax.optimization_barrier((x, weight)))


_matmul_apart = jax.custom_vjp(_product_apart)
# Without a rule of its own x would be kept for the backward pass from behind each barrier.
_matmul_apart.defvjp(
    lambda x, weight: (_product_apart(x, weight), (x, weight)),
    lambda operands, dy: jax.vjp(_matmul, *jax.lax.optimization_barrier(operands))[1](dy),
)
