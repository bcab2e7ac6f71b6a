"""Mamba-3: heads whose state decays and rotates, by the trapezoidal rule (Lahoti et al. 2026, arXiv:2603.15569)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mamba_jax import initializers, settings, sharding
from mamba_jax.layers.linear import Linear
from mamba_jax.layers.norm import RMSNorm
from mamba_jax.mixers.base import Leaf
from mamba_jax.mixers.selective import Extender, Selection, extend, extended_rates, init_position
from pallas_kernels.trapezoidal_ssd import (
    State,
    trapezoidal_ssd,
    trapezoidal_ssd_recurrence,
    trapezoidal_ssd_step,
)
from pallas_kernels.trapezoidal_ssd import flops as trapezoidal_ssd_flops


@dataclasses.dataclass(frozen=True)
class Mamba3Config:
    expand: int = 2
    """Channels inside the mixer, as a multiple of the model's width."""
    head_dim: int = 64
    """Channels a head; it divides those inside the mixer."""
    state_size: int = 128
    """Size N of the state each channel keeps."""
    groups: int = 1
    """Groups of heads, each with a B and C of its own."""
    rank: int = 1
    """Inputs and outputs a head: 1 (SISO), or more (MIMO; the paper takes 4)."""
    rotary_fraction: float = 0.5
    """Part of the state that rotates, above 0 and at most 1."""
    decay_rate_floor: float = 1e-4
    """Decay rates -A are never smaller than this."""
    delta_min: float = 1e-3
    """Smallest step size an untrained model starts from."""
    delta_max: float = 0.1
    """Largest step size an untrained model starts from."""
    delta_floor: float = 1e-4
    """Step sizes start no lower than this."""
    output_norm: bool = False
    """Whether the outputs of each head are normalised before the gate."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in each norm."""
    implementation: str | None = None
    """Implementation of the recurrence ('mosaic_gpu', 'xla', 'reference'); None takes the best one here."""

    def __post_init__(self):
        settings.at_least_one(self, "expand", "head_dim", "state_size", "groups", "rank")
        settings.ordered(self, "delta_min", "delta_max")
        settings.above_zero(self, "decay_rate_floor", "norm_epsilon")
        some_rotate = 0 < self.rotary_fraction <= 1 and self.pairs >= 1
        accepted = f"above 0, at most 1, and of state_size ({self.state_size}) at least 2"
        settings.require(some_rotate, self, "rotary_fraction", accepted)

    @property
    def pairs(self) -> int:
        """Pairs of components of the state that rotate, each by an angle of its own."""
        return int(self.state_size * self.rotary_fraction) // 2

    def num_heads(self, width: int) -> int:
        """Heads in a model of this width.

        Raises:
            ValueError: the channels cannot be divided into such heads, or the heads into such groups.
        """
        return settings.num_heads(self, width)

    def build(self, width: int, *, num_layers: int, compute_dtype: DTypeLike, rngs: nnx.Rngs) -> Mamba3:
        return Mamba3(self, width, num_layers=num_layers, compute_dtype=compute_dtype, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba3State:
    """What a Mamba-3 layer remembers of the tokens before, in float32."""

    ssm: Leaf
    """State h, (batch, heads, head_dim, state)."""
    B: Leaf
    """Input matrices of the last token, after the bias, (batch, heads, rank, state)."""
    x: Leaf
    """Input of the last token, (batch, heads, head_dim)."""
    position: Leaf | None = None
    """Tokens of the document so far, (batch,), where the layer has an extender."""


class Mamba3(nnx.Module):
    """u -> z, x, B, C, delta, A, lambda, theta; B, C -> norm; trapezoidal SSD, gated by z -> out_proj.

    The published in_proj is stored as the parts that a mesh shards differently: by heads, by groups, or not at all.

    A token that an extender leaves out takes no step: the state neither decays nor turns, and the token's own input
    does not enter it. The step of the token after it still begins there, and sees its input as that of any token
    before.
    """

    extender: Extender | None = None
    delta_floor = 0.0

    def __init__(self, config: Mamba3Config, width: int, *, num_layers: int, compute_dtype: DTypeLike, rngs: nnx.Rngs):
        heads = config.num_heads(width)
        # What follows heads or groups is sharded only where the whole ones can be dealt out evenly.
        head_axis, group_axis = sharding.partition_spec((heads, config.groups), (sharding.TENSOR, sharding.TENSOR))
        self.config = config
        self.heads = heads

        def linear(in_features, out_features, axes, scale=1.0):
            return Linear(
                in_features,
                out_features,
                axes=axes,
                weight_init=initializers.fan_in_uniform(in_features, scale),
                compute_dtype=compute_dtype,
                rngs=rngs,
            )

        def head_parameter(value, *, weight_decay=False):
            axes = (head_axis, *(None,) * (value.ndim - 1))
            return nnx.Param(sharding.reshard(value, axes), weight_decay=weight_decay)

        def mimo_weight(value):
            if config.rank == 1:
                return None
            return head_parameter(jnp.full((heads, config.rank, config.head_dim), value), weight_decay=True)

        self.zx_proj = linear(width, (2, heads, config.head_dim), (sharding.FSDP, None, head_axis, None))
        self.BC_proj = linear(
            width, (config.groups, 2, config.rank, config.state_size), (sharding.FSDP, group_axis, None, None, None)
        )
        self.dynamics_proj = linear(width, (3, heads), (sharding.FSDP, None, head_axis))
        self.angle_proj = linear(width, config.pairs, (sharding.FSDP, None))
        self.dt_bias = head_parameter(
            initializers.delta_bias(
                rngs.params(), heads, minimum=config.delta_min, maximum=config.delta_max, floor=config.delta_floor
            )
        )
        self.B_norm = RMSNorm(config.state_size, epsilon=config.norm_epsilon)
        self.C_norm = RMSNorm(config.state_size, epsilon=config.norm_epsilon)
        self.B_bias = head_parameter(jnp.ones((heads, config.rank, config.state_size)))
        self.C_bias = head_parameter(jnp.ones((heads, config.rank, config.state_size)))
        self.D = head_parameter(jnp.ones((heads,)))
        # The ranks share the input, and the output is their mean.
        self.mimo_x = mimo_weight(1 / config.rank)
        self.mimo_z = mimo_weight(1.0)
        self.mimo_o = mimo_weight(1 / config.rank)
        self.norm_weight = head_parameter(jnp.ones((heads, config.head_dim))) if config.output_norm else None
        # The residual stream sums num_layers outputs: scaled like GPT-2's, its variance does not grow with depth.
        self.out_proj = linear(heads * config.head_dim, width, (head_axis, sharding.FSDP), num_layers**-0.5)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Mamba3State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length width"], Mamba3State]:
        inputs, position = self._ssd_inputs(x, None if state is None else state.position, segment_ids)
        y, ssd_state = trapezoidal_ssd(  # pyright: ignore[reportAssignmentType]
            **inputs,
            **self._ssd_parameters(),
            segment_ids=segment_ids,
            initial_state=None if state is None else State(state.ssm, state.B, state.x),
            return_final_state=True,
            implementation=self.config.implementation,
        )
        return self._project_out(y), Mamba3State(*ssd_state, position=position)  # pyright: ignore[reportReturnType]

    def step(
        self, x: Float[Array, "batch width"], state: Mamba3State
    ) -> tuple[Float[Array, "batch width"], Mamba3State]:
        inputs, position = self._ssd_inputs(x[:, None], state.position)
        y, ssd_state = trapezoidal_ssd_step(
            State(state.ssm, state.B, state.x),
            **{name: array[:, 0] for name, array in inputs.items()},
            **self._ssd_parameters(),
        )
        return self._project_out(y), Mamba3State(*ssd_state, position=position)

    def selection(
        self,
        x: Float[Array, "batch length width"],
        *,
        state: Mamba3State | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Selection:
        inputs, _ = self._ssd_inputs(x, None if state is None else state.position, segment_ids)
        delta = jax.nn.softplus(inputs["delta"] + self.dt_bias[...])
        seen = self._recurrence(inputs)
        x, B, C = (array[:, :, :, 0] if self.config.rank == 1 else array for array in (seen.x, seen.B, seen.C))
        return Selection(x, delta, inputs["A"][..., None], B, C, seen.weight, seen.own_weight)

    def init_state(self, batch_size: int) -> Mamba3State:
        config = self.config

        def zeros(*shape):
            axes = (sharding.BATCH, sharding.TENSOR, *(None,) * len(shape))
            return sharding.reshard(jnp.zeros((batch_size, self.heads, *shape)), axes)

        return Mamba3State(
            ssm=zeros(config.head_dim, config.state_size),
            B=zeros(config.rank, config.state_size),
            x=zeros(config.head_dim),
            position=init_position(self.extender, batch_size),
        )

    def flops(self, length: int) -> int:
        config = self.config
        projections = (self.zx_proj, self.BC_proj, self.dynamics_proj, self.angle_proj, self.out_proj)
        # Square, its sum and two products for each number that is normalised.
        norms = 4 * 2 * config.groups * config.rank * config.state_size
        if config.output_norm:
            norms += 4 * config.rank * self.heads * config.head_dim
        recurrence = trapezoidal_ssd_flops.forward(
            1, length, self.heads, config.head_dim, config.state_size, pairs=config.pairs, rank=config.rank
        )
        return length * (sum(projection.flops for projection in projections) + norms) + recurrence

    def _ssd_inputs(self, u, position, segment_ids=None):
        """What ``trapezoidal_ssd`` takes of each token, and the position of the last one."""
        z, x = self.zx_proj.parts(u)
        BC = self.BC_proj(u)
        dynamics = self.dynamics_proj(u).astype(jnp.float32)
        delta, position = extend(
            self.extender, dynamics[..., 0, :], self.dt_bias[...], position=position, segment_ids=segment_ids
        )
        A = -jnp.maximum(heavy_tail(dynamics[..., 1, :]), self.config.decay_rate_floor)
        inputs = {
            "x": x,
            "delta": delta,
            "A": extended_rates(self.extender, A),
            "B": self.B_norm(BC[..., 0, :, :]),
            "C": self.C_norm(BC[..., 1, :, :]),
            "lambda_": jax.nn.sigmoid(dynamics[..., 2, :]),
            "theta": jnp.tanh(self.angle_proj(u).astype(jnp.float32)),
            "z": z,
        }
        return inputs, position

    def _recurrence(self, inputs):
        """What ``trapezoidal_ssd`` makes of its inputs, as weights."""
        # Brought together but for the batch: it adds angles up along the sequence.
        tokens = {
            name: sharding.reshard(array, (sharding.BATCH, *(None,) * (array.ndim - 1)))
            for name, array in inputs.items()
            if name != "z"
        }
        parameters: dict[str, Any] = {
            name: None if array is None else sharding.reshard(array, (None,) * array.ndim)
            for name, array in self._ssd_parameters().items()
            if name in ("delta_bias", "B_bias", "C_bias", "mimo_x")
        }
        return trapezoidal_ssd_recurrence(**tokens, **parameters, delta_softplus=True)

    def _ssd_parameters(self):
        def value(parameter):
            return None if parameter is None else parameter[...]

        return {
            "D": self.D[...],
            "delta_bias": self.dt_bias[...],
            "delta_softplus": True,
            "B_bias": self.B_bias[...],
            "C_bias": self.C_bias[...],
            "mimo_x": value(self.mimo_x),
            "mimo_z": value(self.mimo_z),
            "mimo_o": value(self.mimo_o),
            "norm_weight": value(self.norm_weight),
            "norm_epsilon": self.config.norm_epsilon,
        }

    def _project_out(self, y):
        return self.out_proj(y.reshape(*y.shape[:-2], -1))


def heavy_tail(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """1 + x where x is positive, 1 / (1 - x) elsewhere: positive, and never as close to zero as a softplus.

    The authors' code took it up for decay rates in June 2026 (state-spaces/mamba pull request 962): rates close to zero
    made training at high learning rates diverge.
    """
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))
