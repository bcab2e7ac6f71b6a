"""Mamba-2: heads whose state decays by one scalar, computed as matrix products (Dao & Gu 2024, arXiv:2405.21060)."""

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
from mamba_jax.layers.norm import GatedRMSNorm
from mamba_jax.layers.short_convolution import ShortConvolution
from mamba_jax.mixers.base import Leaf
from mamba_jax.mixers.selective import Extender, Selection, extend, extended_rates, init_position
from pallas_kernels.ssd import flops as ssd_flops
from pallas_kernels.ssd import ssd, ssd_step


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    expand: int = 2
    """Channels inside the mixer, as a multiple of the model's width."""
    head_dim: int = 64
    """Channels a head; it divides those inside the mixer."""
    state_size: int = 128
    """Size N of the state each channel keeps."""
    groups: int = 1
    """Groups of heads, each with a B and C of its own and normalised apart."""
    conv_width: int = 4
    """Tokens the causal convolution sees."""
    decay_rate_min: float = 1.0
    """Smallest decay rate -A an untrained model starts from."""
    decay_rate_max: float = 16.0
    """Largest decay rate -A an untrained model starts from."""
    delta_min: float = 1e-3
    """Smallest step size an untrained model starts from."""
    delta_max: float = 0.1
    """Largest step size an untrained model starts from."""
    delta_floor: float = 1e-4
    """Step sizes start no lower than this."""
    delta_limit_min: float = 0.0
    """Step sizes are never smaller than this."""
    delta_limit_max: float | None = None
    """Step sizes are never larger than this; None sets no limit."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in the norm before the output projection."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    projection_bias: bool = False
    """Whether the input and output projections have a bias."""
    implementation: str | None = None
    """Implementation of scan and convolution ('mosaic_gpu', 'xla', 'reference'); None takes the best one here."""

    def __post_init__(self):
        settings.at_least_one(self, "expand", "head_dim", "state_size", "groups", "conv_width")
        settings.ordered(self, "delta_min", "delta_max")
        settings.ordered(self, "decay_rate_min", "decay_rate_max")
        least, most = self.delta_limit
        settings.require(0 <= least <= most, self, "delta_limit_min", f"at least 0, at most delta_limit_max ({most})")
        settings.above_zero(self, "norm_epsilon")

    @property
    def delta_limit(self) -> tuple[float, float]:
        """Least and largest step size, as ``ssd`` takes them."""
        return self.delta_limit_min, math.inf if self.delta_limit_max is None else self.delta_limit_max

    def num_heads(self, width: int) -> int:
        """Heads in a model of this width.

        Raises:
            ValueError: the channels cannot be divided into such heads, or the heads into such groups.
        """
        return settings.num_heads(self, width)

    def build(self, width: int, *, num_layers: int, compute_dtype: DTypeLike, rngs: nnx.Rngs) -> Mamba2:
        return Mamba2(self, width, num_layers=num_layers, compute_dtype=compute_dtype, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
    """What a Mamba-2 layer remembers of the tokens before."""

    conv_x: Leaf
    """Last inputs of the convolution of x, (batch, conv_width - 1, channels) in the compute dtype."""
    conv_BC: Leaf
    """Last inputs of the convolution of B and C, (batch, conv_width - 1, groups x 2 x state) in the compute dtype."""
    ssm: Leaf
    """State h, (batch, heads, head_dim, state) in float32."""
    position: Leaf | None = None
    """Tokens of the document so far, (batch,), where the layer has an extender."""


class Mamba2(nnx.Module):
    """u -> z, x, B, C, delta; x, B, C -> conv, SiLU; ssd; norm(y SiLU(z)) -> out_proj.

    The published in_proj and conv1d are stored as the parts that a mesh shards differently: by heads, or by groups.
    So neither taking them apart nor sharding them over ``tensor`` moves anything.
    """

    extender: Extender | None = None

    def __init__(self, config: Mamba2Config, width: int, *, num_layers: int, compute_dtype: DTypeLike, rngs: nnx.Rngs):
        heads, groups = config.num_heads(width), config.groups
        channels = heads * config.head_dim
        # What follows heads or groups is sharded only where the whole ones can be dealt out evenly.
        head_axis, group_axis = sharding.partition_spec((heads, groups), (sharding.TENSOR, sharding.TENSOR))
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)

        def linear(in_features, out_features, axes, scale=1.0):
            return Linear(
                in_features,
                out_features,
                axes=axes,
                weight_init=initializers.fan_in_uniform(in_features, scale),
                bias=config.projection_bias,
                compute_dtype=compute_dtype,
                rngs=rngs,
            )

        def convolution(channels, axis):
            return ShortConvolution(
                channels,
                config.conv_width,
                axis=axis,
                bias=config.conv_bias,
                compute_dtype=compute_dtype,
                implementation=config.implementation,
                rngs=rngs,
            )

        def head_parameter(value):
            return nnx.Param(sharding.reshard(value, (head_axis,)), weight_decay=False)

        self.zx_proj = linear(width, (2, heads, config.head_dim), (sharding.FSDP, None, head_axis, None))
        self.BC_proj = linear(width, (groups, 2, config.state_size), (sharding.FSDP, group_axis, None, None))
        self.dt_proj = linear(width, heads, (sharding.FSDP, head_axis))
        self.conv_x = convolution(channels, head_axis)
        self.conv_BC = convolution(groups * 2 * config.state_size, group_axis)
        self.dt_bias = head_parameter(
            initializers.delta_bias(
                rngs.params(), heads, minimum=config.delta_min, maximum=config.delta_max, floor=config.delta_floor
            )
        )
        self.A_log = head_parameter(
            initializers.uniform_log(rngs.params(), heads, minimum=config.decay_rate_min, maximum=config.decay_rate_max)
        )
        self.D = head_parameter(jnp.ones((heads,)))
        self.norm = GatedRMSNorm(heads, config.head_dim, groups=groups, axis=head_axis, epsilon=config.norm_epsilon)
        # The residual stream sums num_layers outputs: scaled like GPT-2's, its variance does not grow with depth.
        self.out_proj = linear(channels, width, (head_axis, sharding.FSDP), num_layers**-0.5)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Mamba2State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length width"], Mamba2State]:
        z, x, BC, delta = self._project_in(x)
        x, conv_x = self.conv_x(x, state=None if state is None else state.conv_x, segment_ids=segment_ids)
        BC, conv_BC = self.conv_BC(BC, state=None if state is None else state.conv_BC, segment_ids=segment_ids)
        delta, position = extend(
            self.extender,
            delta,
            self.dt_bias[...],
            position=None if state is None else state.position,
            segment_ids=segment_ids,
        )
        y, ssm = ssd(
            *self._ssd_inputs(x, BC, delta),
            **self._ssd_options(),
            segment_ids=segment_ids,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            implementation=self.config.implementation,
        )
        return self._project_out(y, z), Mamba2State(conv_x, conv_BC, ssm, position)

    def step(
        self, x: Float[Array, "batch width"], state: Mamba2State
    ) -> tuple[Float[Array, "batch width"], Mamba2State]:
        z, x, BC, delta = self._project_in(x)
        x, conv_x = self.conv_x.step(x, state.conv_x)
        BC, conv_BC = self.conv_BC.step(BC, state.conv_BC)
        delta, position = extend(self.extender, delta[:, None], self.dt_bias[...], position=state.position)
        y, ssm = ssd_step(state.ssm, *self._ssd_inputs(x, BC, delta[:, 0]), **self._ssd_options())
        return self._project_out(y, z), Mamba2State(conv_x, conv_BC, ssm, position)

    @property
    def delta_floor(self) -> float:
        return self.config.delta_limit_min

    def selection(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Mamba2State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Selection:
        _, x, BC, delta = self._project_in(x)
        x, _ = self.conv_x(x, state=None if state is None else state.conv_x, segment_ids=segment_ids)
        BC, _ = self.conv_BC(BC, state=None if state is None else state.conv_BC, segment_ids=segment_ids)
        position = None if state is None else state.position
        delta, _ = extend(self.extender, delta, self.dt_bias[...], position=position, segment_ids=segment_ids)
        x, delta, A, B, C, _ = self._ssd_inputs(x, BC, delta)
        delta = jax.nn.softplus(delta.astype(jnp.float32) + self.dt_bias[...])
        return Selection(x, jnp.clip(delta, *self.config.delta_limit), A, B, C)

    def init_state(self, batch_size: int) -> Mamba2State:
        heads, head_dim = self.norm.weight.shape
        ssm = jnp.zeros((batch_size, heads, head_dim, self.config.state_size), jnp.float32)
        return Mamba2State(
            conv_x=self.conv_x.init_state(batch_size),
            conv_BC=self.conv_BC.init_state(batch_size),
            ssm=sharding.reshard(ssm, (sharding.BATCH, sharding.TENSOR, None, None)),
            position=init_position(self.extender, batch_size),
        )

    def flops(self, length: int) -> int:
        heads, head_dim = self.norm.weight.shape
        projections = (self.zx_proj, self.BC_proj, self.dt_proj, self.out_proj)
        return (
            length * sum(projection.flops for projection in projections)
            + self.conv_x.flops(length)
            + self.conv_BC.flops(length)
            + ssd_flops.forward(1, length, heads, head_dim, self.config.state_size)
            + length * self.norm.flops
        )

    def _project_in(self, u):
        """z and delta by head, (..., heads, head_dim) and (..., heads); x, and B and C together, by channel."""
        z, x = self.zx_proj.parts(u)
        BC = self.BC_proj(u)
        return z, x.reshape(*x.shape[:-2], -1), BC.reshape(*BC.shape[:-3], -1), self.dt_proj(u)

    def _ssd_inputs(self, x, BC, delta):
        config = self.config
        x = x.reshape(*x.shape[:-1], -1, config.head_dim)
        BC = BC.reshape(*BC.shape[:-1], config.groups, 2, config.state_size)
        A = extended_rates(self.extender, -jnp.exp(self.A_log[...]))
        return x, delta, A, BC[..., 0, :], BC[..., 1, :], self.D[...]

    def _ssd_options(self):
        return {"delta_bias": self.dt_bias[...], "delta_softplus": True, "delta_limit": self.config.delta_limit}

    def _project_out(self, y, z):
        y = self.norm(y, z)
        return self.out_proj(y.reshape(*y.shape[:-2], -1))
