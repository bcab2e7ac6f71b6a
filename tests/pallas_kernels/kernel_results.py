"""Running kernels, and comparing all that they compute with a definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_gpu_compat import plgpu

VALUES = ("y", "final_state")


def values_and_gradients(
    run: Callable[..., tuple[jax.Array, ...]],
    inputs: Any,
    cotangents: Sequence[jax.Array | None],
    *,
    values: Sequence[str] = VALUES,
    **options: Any,
) -> dict[str, jax.Array]:
    """All results of an operator by name: its values, and as "dNAME" the gradient of every floating-point input.

    Nothing depends on a result whose cotangent is None.
    """
    arrays = {name: a for name, a in inputs._asdict().items() if a is not None and name != "segment_ids"}

    def compute(arrays: dict[str, jax.Array]) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        results = run(inputs._replace(**arrays), **options)
        return [result for result, seed in zip(results, cotangents, strict=True) if seed is not None], results

    used, vjp, results = jax.vjp(compute, arrays, has_aux=True)
    seeds = [seed for seed in cotangents if seed is not None]
    (gradients,) = vjp([seed.astype(result.dtype) for seed, result in zip(seeds, used, strict=True)])
    return dict(zip(values, results, strict=True)) | {f"d{name}": gradient for name, gradient in gradients.items()}


def widened(tree: Any) -> Any:
    """The same numbers in float64; to be called in JAX's 64-bit mode."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def run_kernels(function: Callable[..., Mapping[str, Any]], *arguments: Any, interpret: bool) -> Mapping[str, Any]:
    """Runs kernels in Pallas' interpreter, or twice on a GPU, where the bits must be the same."""
    run = jax.jit(function)
    if interpret:
        with plgpu.force_gpu_interpret_mode():
            return run(*arguments)
    results, again = run(*arguments), run(*arguments)
    for name, array in results.items():
        assert (array == again[name]).all(), f"{name} differs from run to run"
    return results


def norms(results: Mapping[str, jax.Array]) -> dict[str, float]:
    """What the errors of results are measured by."""
    return {name: float(np.linalg.norm(np.asarray(array))) for name, array in results.items()}


def assert_within(bar: Callable[[str], float], results, expected, scales: Mapping[str, float]) -> None:
    """Compares results with what is expected, by the norm of the difference over the scale of the same name.

    Args:
        bar: largest error of a result, by its name.
        results: arrays by name.
        expected: the same in float64.
        scales: by name.
    """
    wrong = []
    for name, array in results.items():
        error = np.linalg.norm(np.asarray(array, np.float64) - np.asarray(expected[name])) / scales[name]
        if not error <= bar(name):
            wrong.append(f"{name}: relative error {error:.1e}, allowed {bar(name):.0e}")
    # All at once: which results are wrong tells where to look.
    assert not wrong, "\n".join(wrong)


def assert_vmap_is_a_loop(
    run: Callable[[Any], Sequence[jax.Array]], instances: Sequence[Any], shared: Collection[str], *, rtol, atol
) -> None:
    """Compares the sum of all results, and its gradient, under ``jax.vmap`` and for one instance after the other.

    Args:
        run: computes the results from an operator's NamedTuple.
        instances: of inputs without segments.
        shared: names of the inputs that all instances have from the first.
        rtol: as for ``np.testing.assert_allclose``.
        atol: the same.
    """
    common = {name: getattr(instances[0], name) for name in shared}
    instances = [one._replace(**common) for one in instances]

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)

    stacked = stack(instances)._replace(**common)
    axes = type(stacked)(*(None if array is None else 0 for array in stacked))._replace(**dict.fromkeys(shared))

    def loss_and_gradient(inputs: Any) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda inputs: sum(jnp.sum(a.astype(jnp.float32)) for a in run(inputs)))(inputs)

    with plgpu.force_gpu_interpret_mode():
        results = jax.jit(jax.vmap(loss_and_gradient, in_axes=(axes,)))(stacked)
        loop = jax.jit(loss_and_gradient)
        expected = stack([loop(one) for one in instances])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=atol),
        results,
        expected,
    )
