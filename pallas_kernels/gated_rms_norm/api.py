"""Signature of the gated norm: what it accepts, and which implementation gets it."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch
from pallas_kernels.gated_rms_norm import reference, xla
from pallas_kernels.gated_rms_norm.inputs import Inputs
from pallas_kernels.implementation import UnsupportedError
from pallas_kernels.sharding import shard_count
from pallas_kernels.validation import Checker

_TOKEN = ("batch", "length", "heads", "head_dim")
_INPUT_DIMS = {"x": _TOKEN, "z": _TOKEN, "weight": ("heads", "head_dim")}


def gated_rms_norm(
    x: Float[Array, "batch length heads head_dim"],
    z: Float[Array, "batch length heads head_dim"],
    weight: Float[Array, "heads head_dim"],
    *,
    groups: int = 1,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Normalises, over each group of heads, what a gate lets through.

    With ``g = x silu(z)``, for each token and group: ``y = g / sqrt(mean(g**2) + epsilon) * weight``. This is the norm
    before the output projection of Mamba-2 (Dao and Gu 2024, section 7.1). In float32 whatever the inputs' dtypes
    (float64 for float64 ``x``), differentiable in all three, in reverse mode.

    Args:
        x: input.
        z: gate.
        weight: one a channel.
        groups: groups of heads, in their order; they divide the heads.
        epsilon: added to the mean square.
        implementation: "mosaic_gpu", "xla" or "reference"; None takes the best that supports the call.

    Returns:
        y, in ``x``'s dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the groups do not divide the heads.
        UnsupportedError: the named implementation cannot run this call.
    """
    check = Checker("gated_rms_norm")
    inputs = Inputs(x, z, weight)
    check.arrays(inputs._asdict(), _INPUT_DIMS)
    if groups < 1 or x.shape[2] % groups:
        raise check.error(f"groups must divide the {x.shape[2]} heads, got {groups}")
    if not epsilon > 0:
        raise check.error(f"epsilon must be above 0, got {epsilon}")
    shards = shard_count(x, _TOKEN.index("heads"))
    if groups % shards == 0:
        options = {"groups": groups // shards, "epsilon": epsilon}
        (y,) = dispatch("gated_rms_norm", implementation, inputs, _INPUT_DIMS, (_TOKEN,), **options)
        return y
    # A group spans devices, so its mean crosses them: the compiler's work, which cannot split a kernel.
    across = {None: xla, "xla": xla, "reference": reference}
    if implementation not in across:
        raise UnsupportedError(
            f"gated_rms_norm: implementation={implementation!r} cannot run this call: {shards} devices share {groups} "
            "groups of heads. Use implementation=None, 'xla' or 'reference'."
        )
    (y,) = across[implementation].gated_rms_norm(inputs, groups=groups, epsilon=epsilon)
    return y
