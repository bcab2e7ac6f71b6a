"""Mamba-1: a selective state-space model behind a short convolution (Gu & Dao 2023, arXiv:2312.00752, section 3)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba_jax import initializers, settings, sharding
from mamba_jax.layers.linear import Linear
from mamba_jax.mixers.base import Leaf
from mamba_jax.mixers.selective import Extender, Selection, extend, extended_rates, init_position
from pallas_kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from pallas_kernels.causal_conv1d import flops as causal_conv1d_flops
from pallas_kernels.selective_scan import flops as selective_scan_flops
from pallas_kernels.selective_scan import selective_scan, selective_scan_step


@dataclasses.dataclass(frozen=True)
class Mamba1Config:
    expand: int = 2
    """Channels inside the mixer, as a multiple of the model's width."""
    state_size: int = 16
    """Size N of the state each channel keeps."""
    conv_width: int = 4
    """Tokens the causal convolution sees."""
    delta_rank: int | None = None
    """Rank of the projection to delta; None takes width / 16, rounded up."""
    delta_min: float = 1e-3
    """Smallest step size an untrained model starts from."""
    delta_max: float = 0.1
    """Largest step size an untrained model starts from."""
    delta_floor: float = 1e-4
    """Step sizes start no lower than this."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    projection_bias: bool = False
    """Whether the input and output projections have a bias."""
    implementation: str | None = None
    """Implementation of scan and convolution ('mosaic_gpu', 'xla', 'reference'); None takes the best one here."""

    def __post_init__(self):
        settings.at_least_one(self, "expand", "state_size", "conv_width")
        settings.require(self.delta_rank is None or self.delta_rank >= 1, self, "delta_rank", "at least 1, or None")
        settings.ordered(self, "delta_min", "delta_max")

    def build(self, width: int, *, num_layers: int, compute_dtype: DTypeLike, rngs: nnx.Rngs) -> Mamba1:
        return Mamba1(self, width, num_layers=num_layers, compute_dtype=compute_dtype, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba1State:
    """What a Mamba-1 layer remembers of the tokens before."""

    conv: Leaf
    """Last inputs of the convolution, (batch, conv_width - 1, channels) in the compute dtype."""
    ssm: Leaf
    """State h, (batch, channels, state) in float32."""
    position: Leaf | None = None
    """Tokens of the document so far, (batch,), where the layer has an extender."""


class Mamba1(nnx.Module):
    """in_proj -> (x, z); x -> conv, SiLU -> (delta, B, C) -> selective scan, gated by SiLU(z) -> out_proj."""

    extender: Extender | None = None
    delta_floor = 0.0

    def __init__(self, config: Mamba1Config, width: int, *, num_layers: int, compute_dtype: DTypeLike, rngs: nnx.Rngs):
        channels = config.expand * width
        delta_rank = config.delta_rank or math.ceil(width / 16)
        self.config = config
        self.delta_rank = delta_rank
        self.compute_dtype = jnp.dtype(compute_dtype)

        def linear(in_features, out_features, axes, scale=1.0, bias=False):
            init = initializers.fan_in_uniform(in_features, scale)
            return Linear(
                in_features,
                out_features,
                axes=axes,
                weight_init=init,
                bias=bias,
                compute_dtype=compute_dtype,
                rngs=rngs,
            )

        def conv_parameter(shape, axes, weight_decay):
            init = initializers.fan_in_uniform(config.conv_width)
            out_sharding = sharding.out_sharding(*sharding.partition_spec(shape, axes))
            value = init(rngs.params(), shape, jnp.float32, out_sharding)
            return nnx.Param(value, weight_decay=weight_decay)

        def channel_parameter(value):
            axes = (sharding.TENSOR,) + (None,) * (value.ndim - 1)
            return nnx.Param(sharding.reshard(value, axes), weight_decay=False)

        # x and z are two slices of a dimension that is never sharded, so that splitting them moves nothing.
        self.in_proj = linear(width, (2, channels), (sharding.FSDP, None, sharding.TENSOR), bias=config.projection_bias)
        self.conv_weight = conv_parameter((config.conv_width, channels), (None, sharding.TENSOR), weight_decay=True)
        self.conv_bias = (
            conv_parameter((channels,), (sharding.TENSOR,), weight_decay=False) if config.conv_bias else None
        )
        self.x_proj = linear(channels, delta_rank + 2 * config.state_size, ((sharding.TENSOR, sharding.FSDP), None))
        self.dt_proj = linear(delta_rank, channels, (None, (sharding.TENSOR, sharding.FSDP)))
        self.dt_bias = channel_parameter(
            initializers.delta_bias(
                rngs.params(), channels, minimum=config.delta_min, maximum=config.delta_max, floor=config.delta_floor
            )
        )
        self.A_log = channel_parameter(initializers.s4d_real_log(channels, config.state_size))
        self.D = channel_parameter(jnp.ones((channels,)))
        # The residual stream sums num_layers outputs: scaled like GPT-2's, its variance does not grow with depth.
        self.out_proj = linear(
            channels, width, (sharding.TENSOR, sharding.FSDP), num_layers**-0.5, bias=config.projection_bias
        )

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Mamba1State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length width"], Mamba1State]:
        x, z = self.in_proj.parts(x)
        x, conv_state = self._convolve(x, None if state is None else state.conv, segment_ids)
        delta, B, C = self._select(x)
        delta, position = extend(
            self.extender,
            delta,
            self.dt_bias[...],
            position=None if state is None else state.position,
            segment_ids=segment_ids,
        )
        y, ssm_state = selective_scan(
            x,
            delta,
            self._A(),
            B,
            C,
            self.D[...],
            z,
            delta_bias=self.dt_bias[...],
            delta_softplus=True,
            segment_ids=segment_ids,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            implementation=self.config.implementation,
        )
        return self.out_proj(y), Mamba1State(conv=conv_state, ssm=ssm_state, position=position)

    def step(
        self, x: Float[Array, "batch width"], state: Mamba1State
    ) -> tuple[Float[Array, "batch width"], Mamba1State]:
        x, z = self.in_proj.parts(x)
        x, conv_state = causal_conv1d_step(
            state.conv, x, self.conv_weight[...].astype(self.compute_dtype), self._conv_bias(), activation="silu"
        )
        delta, B, C = self._select(x)
        delta, position = extend(self.extender, delta[:, None], self.dt_bias[...], position=state.position)
        y, ssm_state = selective_scan_step(
            state.ssm,
            x,
            delta[:, 0],
            self._A(),
            B,
            C,
            self.D[...],
            z,
            delta_bias=self.dt_bias[...],
            delta_softplus=True,
        )
        return self.out_proj(y), Mamba1State(conv=conv_state, ssm=ssm_state, position=position)

    def selection(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Mamba1State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Selection:
        x, _ = self.in_proj.parts(x)
        x, _ = self._convolve(x, None if state is None else state.conv, segment_ids)
        delta, B, C = self._select(x)
        position = None if state is None else state.position
        delta, _ = extend(self.extender, delta, self.dt_bias[...], position=position, segment_ids=segment_ids)
        return Selection(x, jax.nn.softplus(delta.astype(jnp.float32) + self.dt_bias[...]), self._A(), B, C)

    def init_state(self, batch_size: int) -> Mamba1State:
        channels, state_size = self.A_log.shape
        conv_shape = (batch_size, self.config.conv_width - 1, channels)
        ssm_shape = (batch_size, channels, state_size)
        return Mamba1State(
            conv=sharding.reshard(jnp.zeros(conv_shape, self.compute_dtype), (sharding.BATCH, None, sharding.TENSOR)),
            ssm=sharding.reshard(jnp.zeros(ssm_shape, jnp.float32), (sharding.BATCH, sharding.TENSOR, None)),
            position=init_position(self.extender, batch_size),
        )

    def flops(self, length: int) -> int:
        channels, state_size = self.A_log.shape
        projections = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        return (
            length * sum(projection.flops for projection in projections)
            + causal_conv1d_flops.forward(1, length, channels, self.config.conv_width)
            + selective_scan_flops.forward(1, length, channels, state_size)
        )

    def _convolve(self, x, state, segment_ids):
        return causal_conv1d(
            x,
            self.conv_weight[...].astype(self.compute_dtype),
            self._conv_bias(),
            activation="silu",
            segment_ids=segment_ids,
            initial_state=state,
            return_final_state=True,
            implementation=self.config.implementation,
        )

    def _conv_bias(self):
        return None if self.conv_bias is None else self.conv_bias[...].astype(self.compute_dtype)

    def _select(self, x):
        """Delta (before bias and softplus), B and C of each token: the selection mechanism (algorithm 2)."""
        low_rank, B, C = jnp.split(self.x_proj(x), [self.delta_rank, self.delta_rank + self.config.state_size], axis=-1)
        return self.dt_proj(low_rank), B, C

    def _A(self):
        return extended_rates(self.extender, -jnp.exp(self.A_log[...]))
