"""The operators that are timed: their inputs, calls, and what they cost at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.causal_conv1d import flops as causal_conv1d_flops
from pallas_kernels.gated_rms_norm import flops as gated_rms_norm_flops
from pallas_kernels.gated_rms_norm import gated_rms_norm
from pallas_kernels.selective_scan import flops as selective_scan_flops
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import flops as ssd_flops
from pallas_kernels.ssd import ssd
from pallas_kernels.trapezoidal_ssd import flops as trapezoidal_ssd_flops
from pallas_kernels.trapezoidal_ssd import trapezoidal_ssd

Shape = Mapping[str, int]
Arrays = dict[str, jax.Array]
Direction = Literal["forward", "backward"]

DTYPE = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a call takes at least."""

    bytes: int
    """Every input read once, every output written once."""
    flops: int
    exponentials: int
    products: int | None = None
    """Operations that matrix units can do, where they can do most of the work; those that are left are then few."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """How to call an operator, and how to count what it does."""

    name: str
    dims: Mapping[str, tuple[str, ...]]
    """Names of the dimensions of every input."""
    output_dims: tuple[str, ...]
    make: Callable[[jax.Array, Shape], Arrays]
    """Draws inputs from a random key."""
    call: Callable[..., Any]
    """``call(arrays, implementation=…)`` computes the output.

    Where there is a reference, ``initial_state`` and ``return_final_state=True`` may be given too.
    """
    costs: Callable[[Shape, Direction], Costs]
    implementations: tuple[str, ...]
    independent_dim: str = "channels"
    """Dimension along which nothing depends on anything else, but for gradients that are sums over it. Where it is the
    length, there is no state."""
    has_reference: bool = True
    """Whether ``call`` also knows the implementation "reference"."""

    @property
    def has_state(self) -> bool:
        """Whether it mixes tokens through a state, in place of attention."""
        return any("state" in dims for dims in self.dims.values())

    def sizes(self, arrays: Arrays) -> dict[str, int]:
        """Sizes of all dimensions of the inputs, by name."""
        return {dim: size for name in arrays for dim, size in zip(self.dims[name], arrays[name].shape, strict=True)}


def _normal(key: jax.Array, *dims: int, dtype: Any = DTYPE) -> jax.Array:
    return jax.random.normal(key, dims, dtype)


def _costs(count: Any, sizes: Sequence[int], direction: Direction) -> Costs:
    """Costs by an operator's ``flops.py`` whose functions all take the same sizes."""
    if direction == "forward":
        moved, flops = count.forward_bytes(*sizes, itemsize=DTYPE.itemsize), count.forward(*sizes)
    else:
        moved, flops = count.backward_bytes(*sizes, itemsize=DTYPE.itemsize), count.backward(*sizes)
    return Costs(moved, flops, count.exponentials(*sizes))


def _make_selective_scan(key: jax.Array, shape: Shape) -> Arrays:
    batch, length, channels, state = (shape[dim] for dim in ("batch", "length", "channels", "state"))
    keys = jax.random.split(key, 8)
    return {
        "x": _normal(keys[0], batch, length, channels),
        "delta": _normal(keys[1], batch, length, channels),
        "A": -jax.random.uniform(keys[2], (channels, state), minval=0.5, maxval=16.0),
        "B": _normal(keys[3], batch, length, state),
        "C": _normal(keys[4], batch, length, state),
        "D": _normal(keys[5], channels, dtype=jnp.float32),
        "z": _normal(keys[6], batch, length, channels),
        # Step sizes from about 1e-3 to 1e-1 after the softplus, as Mamba begins with.
        "delta_bias": jax.random.uniform(keys[7], (channels,), minval=-7.0, maxval=-2.0),
    }


def _call_selective_scan(arrays: Arrays, **options: Any) -> Any:
    return selective_scan(**arrays, delta_softplus=True, **options)


def _selective_scan_costs(shape: Shape, direction: Direction) -> Costs:
    sizes = [shape[dim] for dim in ("batch", "length", "channels", "state")]
    return _costs(selective_scan_flops, sizes, direction)


def _make_ssd(key: jax.Array, shape: Shape) -> Arrays:
    token = [shape[dim] for dim in ("batch", "length", "heads")]
    head_dim, groups, state = (shape[dim] for dim in ("head_dim", "groups", "state"))
    heads = shape["heads"]
    keys = jax.random.split(key, 7)
    return {
        "x": _normal(keys[0], *token, head_dim),
        "delta": _normal(keys[1], *token),
        "A": -jax.random.uniform(keys[2], (heads,), minval=1.0, maxval=16.0),
        "B": _normal(keys[3], *token[:2], groups, state),
        "C": _normal(keys[4], *token[:2], groups, state),
        "D": _normal(keys[5], heads, dtype=jnp.float32),
        # Step sizes from about 1e-3 to 1e-1 after the softplus, as Mamba-2 begins with.
        "delta_bias": jax.random.uniform(keys[6], (heads,), minval=-7.0, maxval=-2.0),
    }


def _call_ssd(arrays: Arrays, **options: Any) -> Any:
    return ssd(**arrays, delta_softplus=True, **options)


def _ssd_costs(shape: Shape, direction: Direction) -> Costs:
    sizes = [shape[dim] for dim in ("batch", "length", "heads", "head_dim", "state")]
    count, options = ssd_flops, {"groups": shape["groups"], "itemsize": DTYPE.itemsize}
    if direction == "forward":
        moved = count.forward_bytes(*sizes, **options)
        flops, products = count.forward(*sizes), count.forward_products(*sizes)
    else:
        moved = count.backward_bytes(*sizes, **options)
        flops, products = count.backward(*sizes), count.backward_products(*sizes)
    return Costs(moved, flops, count.exponentials(*sizes[:3]), products)


def _make_trapezoidal_ssd(key: jax.Array, shape: Shape) -> Arrays:
    token = [shape[dim] for dim in ("batch", "length", "heads")]
    heads, head_dim, groups, rank, state = (shape[dim] for dim in ("heads", "head_dim", "groups", "rank", "state"))
    keys = jax.random.split(key, 9)
    # As Mamba-3 begins with: step sizes as in Mamba-2, decay rates of about one, biases of one.
    arrays = {
        "x": _normal(keys[0], *token, head_dim),
        "delta": _normal(keys[1], *token),
        "A": -jax.nn.softplus(_normal(keys[2], *token)) - 1e-4,
        "B": _normal(keys[3], *token[:2], groups, rank, state),
        "C": _normal(keys[4], *token[:2], groups, rank, state),
        "lambda_": jax.nn.sigmoid(_normal(keys[5], *token)),
        "theta": jnp.tanh(_normal(keys[6], *token[:2], shape["pairs"])),
        "D": _normal(keys[7], heads, dtype=jnp.float32),
        "delta_bias": jax.random.uniform(keys[8], (heads,), minval=-7.0, maxval=-2.0),
        "B_bias": jnp.ones((heads, rank, state)),
        "C_bias": jnp.ones((heads, rank, state)),
    }
    if rank > 1:
        arrays |= dict.fromkeys(("mimo_x", "mimo_o"), jnp.full((heads, rank, head_dim), 1 / rank))
    return arrays


def _call_trapezoidal_ssd(arrays: Arrays, **options: Any) -> Any:
    return trapezoidal_ssd(**arrays, delta_softplus=True, **options)


def _trapezoidal_ssd_costs(shape: Shape, direction: Direction) -> Costs:
    sizes = [shape[dim] for dim in ("batch", "length", "heads", "head_dim", "state")]
    count, rank = trapezoidal_ssd_flops, shape["rank"]
    options = {"pairs": shape["pairs"], "rank": rank, "gated": False}
    of_bytes = {**options, "groups": shape["groups"], "itemsize": DTYPE.itemsize}
    if direction == "forward":
        moved = count.forward_bytes(*sizes, **of_bytes)
        flops, products = count.forward(*sizes, **options), count.forward_products(*sizes, rank=rank)
    else:
        moved = count.backward_bytes(*sizes, **of_bytes)
        flops, products = count.backward(*sizes, **options), count.backward_products(*sizes, rank=rank)
    return Costs(moved, flops, count.exponentials(*sizes[:4], **options), products)


def _make_causal_conv1d(key: jax.Array, shape: Shape) -> Arrays:
    batch, length, channels, width = (shape[dim] for dim in ("batch", "length", "channels", "width"))
    keys = jax.random.split(key, 3)
    return {
        "x": _normal(keys[0], batch, length, channels),
        "weight": _normal(keys[1], width, channels, dtype=jnp.float32),
        "bias": _normal(keys[2], channels, dtype=jnp.float32),
    }


def _call_causal_conv1d(arrays: Arrays, **options: Any) -> Any:
    return causal_conv1d(**arrays, activation="silu", **options)


def _causal_conv1d_costs(shape: Shape, direction: Direction) -> Costs:
    batch, length, channels, width = (shape[dim] for dim in ("batch", "length", "channels", "width"))
    count = causal_conv1d_flops
    if direction == "forward":
        moved = count.forward_bytes(batch, length, channels, itemsize=DTYPE.itemsize)
        flops = count.forward(batch, length, channels, width)
    else:
        moved = count.backward_bytes(batch, length, channels, itemsize=DTYPE.itemsize)
        flops = count.backward(batch, length, channels, width)
    return Costs(moved, flops, count.exponentials(batch, length, channels))


def _make_gated_rms_norm(key: jax.Array, shape: Shape) -> Arrays:
    dims = [shape[dim] for dim in ("batch", "length", "heads", "head_dim")]
    keys = jax.random.split(key, 3)
    return {
        "x": _normal(keys[0], *dims),
        "z": _normal(keys[1], *dims),
        "weight": 1 + _normal(keys[2], *dims[2:], dtype=jnp.float32) / 8,
    }


def _call_gated_rms_norm(arrays: Arrays, implementation: str) -> jax.Array:
    return gated_rms_norm(arrays["x"], arrays["z"], arrays["weight"], implementation=implementation)


def _gated_rms_norm_costs(shape: Shape, direction: Direction) -> Costs:
    sizes = [shape[dim] for dim in ("batch", "length", "heads", "head_dim")]
    return _costs(gated_rms_norm_flops, sizes, direction)


def _make_attention(key: jax.Array, shape: Shape) -> Arrays:
    dims = [shape[dim] for dim in ("batch", "length", "heads", "head_dim")]
    return {name: _normal(k, *dims) for name, k in zip("qkv", jax.random.split(key, 3), strict=True)}


def _call_attention(arrays: Arrays, implementation: str) -> jax.Array:
    return jax.nn.dot_product_attention(*arrays.values(), is_causal=True, implementation=implementation)  # type: ignore[arg-type]


def _attention_costs(shape: Shape, direction: Direction) -> Costs:
    batch, length, heads, head_dim = (shape[dim] for dim in ("batch", "length", "heads", "head_dim"))
    # Two matrix products over the lower triangle; backward these again and four more, less what forward has stored.
    products, arrays = (2, 4) if direction == "forward" else (5, 8)
    pairs = batch * heads * length * (length + 1) // 2
    flops = products * 2 * pairs * head_dim
    return Costs(arrays * batch * length * heads * head_dim * DTYPE.itemsize, flops, pairs, flops)


_TOKEN = ("batch", "length", "channels")
_MATRIX = ("batch", "length", "state")
_HEADS = ("batch", "length", "heads", "head_dim")

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "selective_scan",
            {
                **dict.fromkeys(("x", "delta", "z"), _TOKEN),
                **dict.fromkeys(("B", "C"), _MATRIX),
                **dict.fromkeys(("D", "delta_bias"), ("channels",)),
                "A": ("channels", "state"),
            },
            _TOKEN,
            _make_selective_scan,
            _call_selective_scan,
            _selective_scan_costs,
            ("mosaic_gpu", "xla"),
        ),
        Operator(
            "ssd",
            {
                "x": _HEADS,
                "delta": _HEADS[:3],
                "A": ("heads",),
                **dict.fromkeys(("B", "C"), ("batch", "length", "groups", "state")),
                **dict.fromkeys(("D", "delta_bias"), ("heads",)),
            },
            _HEADS,
            _make_ssd,
            _call_ssd,
            _ssd_costs,
            ("mosaic_gpu", "xla"),
            independent_dim="heads",
        ),
        Operator(
            "trapezoidal_ssd",
            {
                "x": _HEADS,
                **dict.fromkeys(("delta", "A", "lambda_"), _HEADS[:3]),
                **dict.fromkeys(("B", "C"), ("batch", "length", "groups", "rank", "state")),
                "theta": ("batch", "length", "pairs"),
                **dict.fromkeys(("D", "delta_bias"), ("heads",)),
                **dict.fromkeys(("B_bias", "C_bias"), ("heads", "rank", "state")),
                **dict.fromkeys(("mimo_x", "mimo_o"), ("heads", "rank", "head_dim")),
            },
            _HEADS,
            _make_trapezoidal_ssd,
            _call_trapezoidal_ssd,
            _trapezoidal_ssd_costs,
            ("mosaic_gpu", "xla"),
            independent_dim="heads",
        ),
        Operator(
            "causal_conv1d",
            {"x": _TOKEN, "weight": ("width", "channels"), "bias": ("channels",)},
            _TOKEN,
            _make_causal_conv1d,
            _call_causal_conv1d,
            _causal_conv1d_costs,
            ("mosaic_gpu", "xla"),
        ),
        Operator(
            "gated_rms_norm",
            {"x": _HEADS, "z": _HEADS, "weight": ("heads", "head_dim")},
            _HEADS,
            _make_gated_rms_norm,
            _call_gated_rms_norm,
            _gated_rms_norm_costs,
            ("mosaic_gpu", "xla"),
            independent_dim="length",
        ),
    )
}

ATTENTION = Operator(
    "attention",
    dict.fromkeys("qkv", _HEADS),
    _HEADS,
    _make_attention,
    _call_attention,
    _attention_costs,
    ("cudnn", "xla"),
    has_reference=False,
)
"""What a state-space model replaces, to compare with."""
