"""What a device can do at most, to compare measurements with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.operators import Costs
from benchmarks.timing import time_calls

_HOPPER = {
    # 132 SMs of 128 float32 lanes (a multiply-add is two operations) and 16 lanes for exponentials, at 1.98 GHz; four
    # matrix units of 512 multiply-adds of 16-bit numbers each.
    "flops": 132 * 128 * 2 * 1.98e9,
    "exponentials": 132 * 16 * 1.98e9,
    "products": 132 * 4 * 512 * 2 * 1.98e9,
}
_RATES = {"H200": _HOPPER, "H100": _HOPPER}
"""Operations a second, by part of the device's name."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most that the device does in a second."""

    device: str
    bytes: float
    """Of a copy, read and written, as measured."""
    flops: float | None = None
    """Float32, outside the matrix units; None where unknown, as are the others then."""
    exponentials: float | None = None
    products: float | None = None
    """Operations of the matrix units on 16-bit numbers."""

    def seconds(self, costs: Costs) -> float:
        """Least time for these costs, when memory, arithmetic and exponentials overlap entirely."""
        times = [costs.bytes / self.bytes]
        if self.flops is not None and self.exponentials is not None and self.products is not None:
            arithmetic = costs.flops / self.flops if costs.products is None else costs.products / self.products
            times += [arithmetic, costs.exponentials / self.exponentials]
        return max(times)


def measure_limits(copy_bytes: int) -> Limits:
    """Looks the default device up, and measures copies of so many bytes."""
    device = jax.devices()[0].device_kind
    known = next((rates for name, rates in _RATES.items() if name in device), {})
    sets = [(jax.random.bits(jax.random.key(i), (copy_bytes // 4,), jnp.uint32),) for i in range(2)]
    seconds = time_calls(jnp.copy, sets, samples=5).median
    return Limits(device, 2 * copy_bytes / seconds, **known)
