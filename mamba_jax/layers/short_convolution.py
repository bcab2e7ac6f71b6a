"""The short causal convolution in front of a state-space model."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba_jax import initializers, sharding
from pallas_kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from pallas_kernels.causal_conv1d import flops as causal_conv1d_flops


class ShortConvolution(nnx.Module):
    """SiLU of a causal convolution with a few taps a channel, in the compute dtype.

    Its state are the last ``width - 1`` inputs, (batch, width - 1, channels) in the compute dtype.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        axis: sharding.Axis,
        bias: bool,
        compute_dtype: DTypeLike,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        """Makes a convolution whose channels lie along the mesh axis ``axis``."""
        init = initializers.fan_in_uniform(width)

        def parameter(shape, axes, weight_decay):
            out_sharding = sharding.out_sharding(*sharding.partition_spec(shape, axes))
            return nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding), weight_decay=weight_decay)

        self.weight = parameter((width, channels), (None, axis), weight_decay=True)
        self.bias = parameter((channels,), (axis,), weight_decay=False) if bias else None
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.implementation = implementation
        self.axis = axis

    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        *,
        state: Float[Array, "batch past channels"] | None,
        segment_ids: Int[Array, "batch length"] | None,
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch past channels"]]:
        return causal_conv1d(  # pyright: ignore[reportReturnType]
            x,
            *self._parameters(),
            activation="silu",
            segment_ids=segment_ids,
            initial_state=state,
            return_final_state=True,
            implementation=self.implementation,
        )

    def step(
        self, x: Float[Array, "batch channels"], state: Float[Array, "batch past channels"]
    ) -> tuple[Float[Array, "batch channels"], Float[Array, "batch past channels"]]:
        return causal_conv1d_step(state, x, *self._parameters(), activation="silu")

    def init_state(self, batch_size: int) -> Float[Array, "batch past channels"]:
        width, channels = self.weight.shape
        state = jnp.zeros((batch_size, width - 1, channels), self.compute_dtype)
        return sharding.reshard(state, (sharding.BATCH, None, self.axis))

    def flops(self, length: int) -> int:
        """Floating-point operations for one sequence of this length."""
        width, channels = self.weight.shape
        return causal_conv1d_flops.forward(1, length, channels, width)

    def _parameters(self):
        bias = None if self.bias is None else self.bias[...].astype(self.compute_dtype)
        return self.weight[...].astype(self.compute_dtype), bias
