"""What a device can do at most, to compare measurements with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.operators import Costs
from benchmarks.timing import time_calls

_FLOPS_AND_EXPONENTIALS = {
    # 132 SMs of 128 float32 lanes (a multiply-add is two operations) and 16 lanes for exponentials, at 1.98 GHz.
    "H200": (132 * 128 * 2 * 1.98e9, 132 * 16 * 1.98e9),
    "H100": (132 * 128 * 2 * 1.98e9, 132 * 16 * 1.98e9),
}
"""Float32 operations and exponentials a second, by part of the device's name."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most that the device does in a second."""

    device: str
    bytes: float
    """Of a copy, read and written, as measured."""
    flops: float | None
    """Float32, outside the matrix units; None where unknown, as are the exponentials then."""
    exponentials: float | None

    def seconds(self, costs: Costs) -> float:
        """Least time for these costs, when memory, arithmetic and exponentials overlap entirely."""
        times = [costs.bytes / self.bytes]
        if self.flops is not None and self.exponentials is not None:
            times += [costs.flops / self.flops, costs.exponentials / self.exponentials]
        return max(times)


def measure_limits(copy_bytes: int) -> Limits:
    """Looks the default device up, and measures copies of so many bytes."""
    device = jax.devices()[0].device_kind
    known = next((rates for name, rates in _FLOPS_AND_EXPONENTIALS.items() if name in device), (None, None))
    sets = [(jax.random.bits(jax.random.key(i), (copy_bytes // 4,), jnp.uint32),) for i in range(2)]
    seconds = time_calls(jnp.copy, sets, samples=5).median
    return Limits(device, 2 * copy_bytes / seconds, *known)
