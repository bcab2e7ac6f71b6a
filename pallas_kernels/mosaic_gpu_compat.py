"""The one door to Pallas' Mosaic GPU backend, whose API still changes from one jax release to the next.

Kernels import ``plgpu`` and everything private from here, so that a new jax release means one file to mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import config
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = [
    "LANES",
    "MAX_SHARED_MEMORY",
    "WARPS",
    "WGMMA",
    "arith",
    "forget_mesh_axes",
    "interpreted",
    "ir",
    "llvm",
    "load_float32",
    "plgpu",
    "register_tile",
    "store",
    "synchronize",
    "utils",
    "vector",
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


def load_float32(ref: Any, layout: Any) -> jax.Array:
    """Loads an array of numbers in a layout, as float32."""
    array = plgpu.load(ref, layout=layout, optimized=False)
    if array.dtype != jnp.bfloat16 or interpreted():
        return array.astype(jnp.float32)
    return_type = plgpu.ShapeDtypeStruct(array.shape, jnp.dtype("float32"), layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=return_type)(_bfloat16_to_float32)(array)


def _bfloat16_to_float32(_: Any, array: fragmented_array.FragmentedArray) -> fragmented_array.FragmentedArray:
    """Converts with one instruction a number, where the compiler's own conversion takes two for every other one."""
    (length,) = ir.VectorType(array.registers.flat[0].type).shape
    if length % 2:
        return array.astype(ir.F32Type.get())
    word = ir.IntegerType.get_signless(32)

    def convert(register: ir.Value) -> ir.Value:
        words = utils.bitcast(register, ir.VectorType.get((length // 2,), word))
        halves = []
        for i in range(length // 2):
            pair = vector.extract(words, dynamic_position=[], static_position=[i])
            halves += [arith.shli(pair, utils.c(16, word)), arith.andi(pair, utils.c(-(1 << 16), word))]
        bits = vector.from_elements(ir.VectorType.get((length,), word), halves)
        return utils.bitcast(bits, ir.VectorType.get((length,), ir.F32Type.get()))

    registers = np.empty_like(array.registers)
    for index, register in np.ndenumerate(array.registers):
        registers[index] = convert(register)
    return fragmented_array.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


def synchronize() -> None:
    """Waits until all warps of the warpgroup are here and see what each other wrote to shared memory.

    ``plgpu.commit_smem`` does this too, but it also fences off bulk copies, which takes its time and is only needed
    where such a copy follows. Waiting for copies out, of which there are none in flight, leaves the bare barrier.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def forget_mesh_axes(array: jax.Array) -> jax.Array:
    """Removes from an array's type the manual mesh axes that it varies over; the array itself stays as it is.

    Inside ``jax.shard_map`` references to an array that varies are marked so too, and ``plgpu.warp_map`` refuses them.
    """
    with config._check_vma(False):
        return jax.lax.reshape(jax.lax.reshape(array, (1, *array.shape)), array.shape)


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
