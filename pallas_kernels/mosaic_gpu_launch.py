"""How the operators launch their Mosaic GPU kernels: arrays and references by name, and the compiler's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.mosaic_gpu_compat import forget_mesh_axes, plgpu
from pallas_kernels.sharding import vary_like

Refs = Mapping[str, Any]
"""References to device or shared memory, by the names of what they hold."""

_COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # Every exchange between lanes through shared memory is fenced by hand, once a phase instead of once a store.
    unsafe_no_auto_barriers=True,
    # Register layouts are given, not inferred.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


def launch(
    operator: str,
    body: Callable[[Refs, Refs], None],
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, Any],
    scratch: Refs,
    grid: Mapping[str, int],
    *,
    warpgroups: int = 1,
) -> dict[str, jax.Array]:
    """Runs ``body(gmem, smem)`` in every warpgroup of every block.

    Args:
        operator: what the kernel's name begins with; the body's name ends it.
        body: gets references to inputs and outputs, and to scratch memory, by name.
        inputs: arrays by name.
        outputs: types of the results by name.
        scratch: shared memory and barriers of a block, by name.
        grid: blocks along each axis, by the name that ``jax.lax.axis_index`` knows it under. The last may have any
            number of them, the others no more than 65,535.
        warpgroups: of a block, along an axis of this name.

    Returns:
        Results by name.
    """

    def kernel_body(*gmem: Any, **smem: Any) -> None:
        body(dict(zip([*inputs, *outputs], gmem, strict=True)), smem)

    kernel_body.__name__ = f"{operator}_{body.__name__}"
    kernel = plgpu.kernel(
        kernel_body,
        out_type=tuple(outputs.values()),
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=_COMPILER_PARAMS,
    )
    with jax.enable_x64(False):  # Python's numbers are 32 bits wide in a kernel, whatever the caller's are.
        results = kernel(*map(forget_mesh_axes, inputs.values()))
    one_input = next(iter(inputs.values()))
    return {name: vary_like(array, one_input) for name, array in zip(outputs, results, strict=True)}
