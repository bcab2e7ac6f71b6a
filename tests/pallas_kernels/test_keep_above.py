"""``keep_above`` against a loop over tokens; its kernel interpreted, lowered for CUDA, and run where there is a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.implementation import UnsupportedError
from pallas_kernels.keep_above import keep_above, mosaic_gpu, xla
from pallas_kernels.keep_above.inputs import Inputs
from tests.pallas_kernels.fences import unfenced

FILL = -1e4
SHAPES = [((2, 33, 264), "bfloat16"), ((1, 32, 8), "float16"), ((3, 40, 20), "float32")]
"""Whole tiles and parts of tiles."""


def make(shape: tuple[int, int, int], dtype: str = "bfloat16", rows: int = 5) -> Inputs:
    """Numbers of which some equal their threshold, some are infinite, and some are no numbers."""
    random = np.random.default_rng(0)
    x = random.normal(size=shape).round(1)
    x[random.random(shape) < 0.02] = np.nan
    x[random.random(shape) < 0.02] = np.inf
    thresholds = random.normal(size=(rows, shape[2])).round(1)
    thresholds[:, 0] = -np.inf
    row = jnp.asarray(random.integers(0, rows, shape[:2]), jnp.int32) if rows > 1 else None
    return Inputs(jnp.asarray(x, dtype), jnp.asarray(thresholds, dtype), row)


def expected(inputs: Inputs, otherwise: float = FILL) -> np.ndarray:
    y = np.array(inputs.x)
    for index in np.ndindex(*y.shape[:2]):
        row = 0 if inputs.row is None else inputs.row[index]
        small = y[index] <= np.asarray(inputs.thresholds)[row]
        y[index][small] = otherwise
    return y


def assert_same_bits(y, expected) -> None:
    assert y.dtype == expected.dtype
    bits = [np.asarray(array).view(f"u{array.dtype.itemsize}") for array in (y, expected)]
    np.testing.assert_array_equal(bits[0], bits[1])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
@pytest.mark.parametrize("implementation", [xla, mosaic_gpu], ids=["xla", "mosaic_gpu"])
def test_numbers_above_their_threshold_keep_every_bit(implementation, shape, dtype, rows):
    inputs = make(shape, dtype, rows)
    (y,) = implementation.keep_above(inputs, fill=FILL)
    assert 0.1 < np.mean(np.asarray(y == jnp.asarray(FILL, dtype))) < 0.9
    assert_same_bits(y, expected(inputs))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", [xla, mosaic_gpu], ids=["xla", "mosaic_gpu"])
def test_gradients_pass_where_numbers_do(implementation):
    inputs = make((2, 40, 24), "float32")
    weight = jnp.asarray(np.random.default_rng(1).normal(size=inputs.x.shape), jnp.float32)

    def loss(x):
        return jnp.vdot(weight, jnp.nan_to_num(*implementation.keep_above(inputs._replace(x=x), fill=FILL)))

    x = jnp.nan_to_num(inputs.x, posinf=9.0)
    passes = expected(inputs._replace(x=jnp.zeros_like(x) + x), otherwise=np.nan)
    np.testing.assert_array_equal(jax.grad(loss)(x), np.where(np.isnan(passes), 0, weight))


@pytest.mark.usefixtures("interpreted")
def test_under_vmap_each_element_has_its_own_rows():
    inputs = make((3, 33, 16))
    one = lambda x, row: mosaic_gpu.keep_above(Inputs(x[None], inputs.thresholds, row[None]), fill=FILL)[0][0]  # noqa: E731
    assert_same_bits(jax.vmap(one)(inputs.x, inputs.row), expected(inputs))


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 2)], ids=str)
def test_sharded_equals_unsharded(sizes):
    inputs, axes = make((2, 64, 32)), ("data", "sequence", "tensor")
    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * 3)):
        y = jax.jit(functools.partial(keep_above, fill=FILL))(jax.device_put(inputs.x, P(*axes)), *inputs[1:])
        assert y.sharding.spec == P(*axes)
    assert_same_bits(y, expected(inputs))


@pytest.mark.usefixtures("any_hardware")
@pytest.mark.parametrize("rows", [1, 193])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_kernel_and_its_gradient_lower_for_cuda_on_a_mesh(sizes, rows):
    axes = ("data", "sequence", "tensor")

    def loss(x, thresholds, row):
        return jnp.sum(keep_above(x, thresholds, row, fill=FILL, implementation="mosaic_gpu").astype(float))

    inputs = make((2, 64, 64), rows=rows)
    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * 3)):
        traced = jax.jit(jax.value_and_grad(loss)).trace(jax.device_put(inputs.x, P(*axes)), *inputs[1:])
        assert "custom_call @mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows", [1, 5])
def test_the_kernel_fences_every_exchange(rows):
    read, found = unfenced(lambda inputs: mosaic_gpu.keep_above(inputs, fill=FILL), make((2, 70, 264), rows=rows))
    assert read == {"keep_above_forward"}
    assert not found


class TestErrors:
    def test_several_rows_want_to_know_which(self):
        with pytest.raises(ValueError, match="row must be given, since thresholds has 5 rows"):
            keep_above(*make((1, 4, 8))[:2], fill=FILL)

    def test_thresholds_have_the_dtype_of_what_they_are_compared_with(self):
        inputs = make((1, 4, 8))
        with pytest.raises(ValueError, match="thresholds must be bfloat16 as x is, got float32"):
            keep_above(inputs.x, inputs.thresholds.astype(jnp.float32), inputs.row, fill=FILL)

    @pytest.mark.parametrize(
        ("shape", "dtype", "reason"),
        [
            ((1, 32, 9), "float32", "must fill a multiple of 16 bytes, got 9 of float32"),
            ((1, 31, 8), "float32", "at least 32 tokens, which fill a tile, got 31"),
            ((1, 32, 8), "float8_e4m3fn", "x must be bfloat16, float16 or float32, got float8_e4m3fn"),
        ],
    )
    def test_the_kernel_says_what_it_cannot_do(self, shape, dtype, reason):
        with pytest.raises(UnsupportedError, match=reason):
            keep_above(jnp.zeros(shape, dtype), jnp.zeros((1, shape[2]), dtype), fill=FILL, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 193])
@pytest.mark.parametrize("shape", [(1, 32, 8), (2, 33, 24), (3, 1000, 264), (1, 8192, 1536)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_the_kernel_keeps_and_leaves_out_what_xla_does(dtype, shape, rows):
    inputs = make(shape, dtype, rows)
    results = (jax.jit(functools.partial(run.keep_above, fill=FILL))(inputs)[0] for run in (mosaic_gpu, xla))
    assert_same_bits(*results)
