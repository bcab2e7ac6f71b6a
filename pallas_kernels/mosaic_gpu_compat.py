"""The one door to Pallas' Mosaic GPU backend, whose API still changes from one jax release to the next.

Kernels import ``plgpu`` and everything private from here, so that a new jax release means one file to mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src import config
from jax.experimental.mosaic.gpu import fragmented_array

__all__ = [
    "LANES",
    "MAX_SHARED_MEMORY",
    "WARPS",
    "WGMMA",
    "interpreted",
    "plgpu",
    "register_tile",
    "store",
    "synchronize",
]

WARPS = 4
"""Warps of a warpgroup, which is what Pallas calls a thread on this backend."""
LANES = 32
"""Lanes of a warp."""

MAX_SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper."""

# Consumer GPUs after Hopper have the bulk copies but less than half of the shared memory.
_BULK_COPIES = {"9.0": "Hopper", "10.0": "Blackwell"}
WGMMA = {"9.0": "Hopper"}
"""Capabilities with the matrix instructions of a warpgroup, which no later GPU has."""


def register_tile(
    tiles: Sequence[Sequence[int]], warp_dims: Sequence[int], lane_dims: Sequence[int], vector_dim: int
) -> Any:
    """Returns the layout of an array over the registers of a warpgroup.

    The array is cut into ``tiles[0]``, these into ``tiles[1]`` and so on; counted from the end of the resulting shape,
    ``warp_dims`` are spread over the 4 warps, ``lane_dims`` over the 32 lanes, and ``vector_dim`` is what a lane loads
    and stores at once. Unlike ``plgpu.Layout.TILED`` it accepts dimensions of size 1.
    """
    layout = fragmented_array.TiledLayout(
        plgpu.Tiling(tuple(tuple(tile) for tile in tiles)),
        tuple(warp_dims),
        tuple(lane_dims),
        vector_dim,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def store(ref: Any, value: jax.Array) -> None:
    """Stores an array in whatever pattern its layout and the reference give."""
    if hasattr(plgpu, "store"):
        # jax 0.12 refuses patterns that it cannot prove to be fast, rightly or not, unless told.
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def synchronize() -> None:
    """Waits until all warps of the warpgroup are here and see what each other wrote to shared memory.

    ``plgpu.commit_smem`` does this too, but it also fences off bulk copies, which takes its time and is only needed
    where such a copy follows. Waiting for copies out, of which there are none in flight, leaves the bare barrier.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def interpreted() -> bool:
    """Whether kernels that are traced now run in Pallas' interpreter."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def missing_hardware(capabilities: Mapping[str, str] = _BULK_COPIES) -> str | None:
    """Says what the default device lacks to run Mosaic GPU kernels, or None.

    Args:
        capabilities: the compute capabilities that have what the kernel needs, and what they are called; by default
            bulk copies.
    """
    device = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, the default device is a {device.platform}"
    capability = str(getattr(device, "compute_capability", ""))
    if capability.split(".")[0] not in {accepted.split(".")[0] for accepted in capabilities}:
        names = " or ".join(f"{accepted} ({name})" for accepted, name in capabilities.items())
        return f"it needs compute capability {names}, {device.device_kind} has {capability or 'none'}"
    return None
