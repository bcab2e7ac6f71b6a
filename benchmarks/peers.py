"""The CUDA and Triton kernels of mamba_ssm and causal_conv1d, where they are installed."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.operators import Direction, Shape
from benchmarks.timing import Timing

_PACKAGES = {"selective_scan": "mamba_ssm", "ssd": "mamba_ssm", "causal_conv1d": "causal_conv1d"}
_CALLS = 20


def package(operator: str) -> str | None:
    """Name of the package that has this operator too, if it is installed."""
    name = _PACKAGES.get(operator)
    return name if name is not None and importlib.util.find_spec(name) is not None else None


def is_peer(implementation: str) -> bool:
    """Whether an implementation is one of these packages, and not one of ours."""
    return implementation in _PACKAGES.values()


def time_peer(operator: str, direction: Direction, shape: Shape, *, samples: int) -> Timing:
    """Times the package's operator by CUDA events around several calls, on random inputs of the same kind."""
    import torch  # pyright: ignore[reportMissingImports]

    call, leaves = _ARGUMENTS[operator](torch, dict(shape))
    y = call()
    dy = torch.randn_like(y)

    def run() -> None:
        if direction == "forward":
            with torch.no_grad():
                call()
        else:
            torch.autograd.grad(y, leaves, dy, retain_graph=True)

    run()
    times = []
    for _ in range(samples):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(_CALLS):
            run()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3 / _CALLS)
    lower, median, upper = statistics.quantiles(times, n=4)
    return Timing(median, lower, upper, samples, samples * _CALLS)


def _selective_scan(torch: Any, shape: dict[str, int]) -> tuple[Callable[[], Any], list[Any]]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    batch, length, channels, state = (shape[dim] for dim in ("batch", "length", "channels", "state"))
    draw = _draw(torch)
    u, delta, z = (draw(batch, channels, length) for _ in range(3))
    B, C = (draw(batch, state, length) for _ in range(2))
    A = (-16 * torch.rand(channels, state, device="cuda") - 0.5).requires_grad_()
    D = draw(channels, dtype=torch.float32)
    bias = (5 * torch.rand(channels, device="cuda") - 7).requires_grad_()

    def call() -> Any:
        return selective_scan_fn(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)

    return call, [u, delta, A, B, C, D, z, bias]


def _ssd(torch: Any, shape: dict[str, int]) -> tuple[Callable[[], Any], list[Any]]:
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    batch, length, heads, head_dim = (shape[dim] for dim in ("batch", "length", "heads", "head_dim"))
    draw = _draw(torch)
    x, delta = draw(batch, length, heads, head_dim), draw(batch, length, heads)
    B, C = (draw(batch, length, shape["groups"], shape["state"]) for _ in range(2))
    A = (-15 * torch.rand(heads, device="cuda") - 1).requires_grad_()
    D = draw(heads, dtype=torch.float32)
    bias = (5 * torch.rand(heads, device="cuda") - 7).requires_grad_()

    def call() -> Any:
        # In chunks of 256, as its Mamba-2 layer has them.
        return mamba_chunk_scan_combined(x, delta, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)

    return call, [x, delta, A, B, C, D, bias]


def _causal_conv1d(torch: Any, shape: dict[str, int]) -> tuple[Callable[[], Any], list[Any]]:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    batch, length, channels, width = (shape[dim] for dim in ("batch", "length", "channels", "width"))
    draw = _draw(torch)
    x = draw(batch, length, channels)
    weight, bias = draw(channels, width, dtype=torch.float32), draw(channels, dtype=torch.float32)
    return lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu"), [x, weight, bias]


def _draw(torch: Any) -> Callable[..., Any]:
    def draw(*dims: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(dims, device="cuda", dtype=dtype, requires_grad=True)

    return draw


_ARGUMENTS = {"selective_scan": _selective_scan, "ssd": _ssd, "causal_conv1d": _causal_conv1d}
