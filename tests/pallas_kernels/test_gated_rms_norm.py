"""``gated_rms_norm`` against its formula; its kernels interpreted, lowered for CUDA, and run where there is a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.gated_rms_norm import gated_rms_norm, mosaic_gpu, reference, xla
from pallas_kernels.gated_rms_norm.inputs import Inputs
from pallas_kernels.implementation import UnsupportedError
from tests.pallas_kernels.fences import unfenced

EPSILON = 1e-2
"""So large that leaving it out would be seen."""
NAMES = ("y", *Inputs._fields)
AXES = ("data", "sequence", "tensor")


def make(batch: int, length: int, heads: int, head_dim: int, dtype: str = "bfloat16") -> tuple[Inputs, jax.Array]:
    """Inputs, and a gradient of the output; tokens of very different sizes."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(-4, 4, (batch, length, 1, 1)))
    x, z, dy = (random.normal(size=(batch, length, heads, head_dim)) for _ in range(3))
    weight = jnp.asarray(random.normal(size=(heads, head_dim)), jnp.float64 if dtype == "float64" else jnp.float32)
    x, z, dy = (jnp.asarray(array, dtype) for array in (sizes * x, 2 * z, dy))
    return Inputs(x, z, weight), dy


def formula(x, z, weight, *, groups: int) -> np.ndarray:
    """y, by groups, of float64 arrays."""
    gated = x * z / (1 + np.exp(-z))
    y = np.empty_like(gated)
    for of_group in np.split(np.arange(x.shape[2]), groups):
        part = gated[:, :, of_group]
        y[:, :, of_group] = part / np.sqrt(np.mean(part**2, axis=(2, 3), keepdims=True) + EPSILON)
    return y * weight


def expected(inputs: Inputs, dy: jax.Array, *, groups: int) -> dict[str, np.ndarray]:
    """y by the formula, and the definition's gradients, in float64."""
    arrays = [np.asarray(array, np.float64) for array in inputs]
    with jax.enable_x64(True):
        wide = Inputs(*map(jnp.asarray, arrays))
        gradients = results(reference, wide, jnp.asarray(np.asarray(dy, np.float64)), groups=groups)[1:]
    return dict(zip(NAMES, (formula(*arrays, groups=groups), *map(np.asarray, gradients)), strict=True))


def results(implementation, inputs: Inputs, dy: jax.Array, *, groups: int) -> tuple[jax.Array, ...]:
    """y, and the gradients of the inputs."""
    run = functools.partial(implementation.gated_rms_norm, groups=groups, epsilon=EPSILON)
    (y,), vjp = jax.vjp(run, inputs)
    return y, *vjp((dy,))[0]


def assert_right(got, want: dict[str, np.ndarray], bar: float) -> None:
    for array, (name, truth) in zip(got, want.items(), strict=True):
        error = np.linalg.norm(np.asarray(array, np.float64) - truth) / np.linalg.norm(truth)
        assert error < bar, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("implementation", [reference, xla], ids=["reference", "xla"])
def test_computes_the_formula_and_its_gradient(implementation, dtype, groups):
    with jax.enable_x64(dtype == "float64"):
        inputs, dy = make(2, 5, 4, 8, dtype)
        got = results(implementation, inputs, dy, groups=groups)
        assert [array.dtype for array in got] == [inputs.x.dtype, *(array.dtype for array in inputs)]
        bar = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 3e-3}[dtype]
        assert_right(got, expected(inputs, dy, groups=groups), bar)


def test_gradients_of_the_definition_are_the_slopes_of_the_formula():
    with jax.enable_x64(True):
        inputs, dy = make(1, 3, 4, 8, "float64")
        want = expected(inputs, dy, groups=2)
    arrays, random, step = [np.asarray(array) for array in inputs], np.random.default_rng(1), 1e-5
    for i, name in enumerate(Inputs._fields):
        direction = random.normal(size=arrays[i].shape)
        ends = [[*arrays[:i], arrays[i] + sign * step * direction, *arrays[i + 1 :]] for sign in (1, -1)]
        difference = np.subtract(*(formula(*end, groups=2) for end in ends))
        slope = np.sum(difference * np.asarray(dy)) / (2 * step)
        np.testing.assert_allclose(np.sum(want[name] * direction), slope, rtol=1e-6)


def test_xla_keeps_nothing_for_the_backward_pass_but_a_number_a_head():
    inputs, _ = make(2, 32, 4, 64)
    _, vjp = jax.vjp(lambda inputs: xla.gated_rms_norm(inputs, groups=1, epsilon=EPSILON), inputs)
    kept = sum(array.nbytes for array in jax.tree.leaves(vjp)) - sum(array.nbytes for array in inputs)
    assert kept == 2 * 32 * 4 * 4


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((2, 9, 8, 64), 1, "bfloat16"), ((1, 5, 16, 128), 2, "bfloat16"), ((1, 1, 12, 128), 1, "float32")],
    ids=["a sequence", "groups", "one token in float32"],
)
def test_interpreted_kernels_compute_the_formula_and_its_gradient(monkeypatch, shape, groups, dtype):
    # So that a block has several tokens, more than it holds at once, and the last one fewer.
    for blocks in ("_FORWARD_BLOCKS", "_BACKWARD_BLOCKS"):
        monkeypatch.setattr(mosaic_gpu, blocks, 4)
    inputs, dy = make(*shape, dtype)
    got = results(mosaic_gpu, inputs, dy, groups=groups)
    assert_right(got, expected(inputs, dy, groups=groups), 3e-3 if dtype == "bfloat16" else 1e-6)


@pytest.mark.usefixtures("interpreted")
def test_vmap_is_a_loop():
    inputs, _ = make(4, 3, 4, 128)
    x, z = (array[:, None] for array in inputs[:2])
    weights = jnp.stack([inputs.weight, 2 * inputs.weight, -inputs.weight, inputs.weight])

    def one(x, z, weight):
        return mosaic_gpu.gated_rms_norm(Inputs(x, z, weight), groups=1, epsilon=EPSILON)[0]

    for weight, axis in ((inputs.weight, None), (weights, 0)):
        loop = [one(x[i], z[i], weight if axis is None else weight[i]) for i in range(4)]
        np.testing.assert_array_equal(jax.vmap(one, in_axes=(0, 0, axis))(x, z, weight), jnp.stack(loop))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 2, 2)], ids=str)
def test_sharded_equals_unsharded(sizes, groups):
    """Also where a group spans devices, and where a device has several groups."""
    inputs, dy = make(2, 4, 4, 8, "float32")
    run = jax.jit(lambda inputs, dy: _value_and_gradients(inputs, dy, groups))
    with jax.set_mesh(jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)):
        x, z, gradient = (jax.device_put(array, P(*AXES)) for array in (*inputs[:2], dy))
        y, gradients = run(Inputs(x, z, jax.device_put(inputs.weight, P("tensor"))), gradient)
        assert y.sharding.spec[:3] == gradients.x.sharding.spec[:3] == AXES
        assert gradients.weight.sharding.spec[0] == "tensor"
    assert_right((y, *gradients), expected(inputs, dy, groups=groups), 1e-6)


def _value_and_gradients(inputs: Inputs, dy: jax.Array, groups: int, **options) -> tuple[jax.Array, Inputs]:
    y, vjp = jax.vjp(lambda inputs: gated_rms_norm(*inputs, groups=groups, epsilon=EPSILON, **options), inputs)
    return y, vjp(dy)[0]


@pytest.mark.usefixtures("any_hardware")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_kernels_lower_for_cuda_on_a_mesh(sizes):
    inputs, dy = make(2, 4, 16, 128)
    run = functools.partial(_value_and_gradients, groups=2, implementation="mosaic_gpu")
    with jax.set_mesh(jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)):
        x, z, gradient = (jax.device_put(array, P(*AXES)) for array in (*inputs[:2], dy))
        traced = jax.jit(run).trace(Inputs(x, z, inputs.weight), gradient)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


def test_the_kernels_fence_every_exchange():
    read, found = unfenced(functools.partial(results, mosaic_gpu, groups=1), *make(1, 5, 4, 128))
    assert read == {"gated_rms_norm_forward", "gated_rms_norm_backward"}
    assert not found


class TestErrors:
    def test_groups_divide_the_heads(self):
        with pytest.raises(ValueError, match="groups must divide the 4 heads, got 3"):
            gated_rms_norm(*make(1, 2, 4, 8)[0], groups=3)

    def test_epsilon_is_above_zero(self):
        with pytest.raises(ValueError, match=r"epsilon must be above 0, got 0\.0"):
            gated_rms_norm(*make(1, 2, 4, 8)[0], epsilon=0.0)

    @pytest.mark.parametrize(
        ("shape", "dtype", "reason"),
        [
            ((1, 2, 4, 96), "float32", "must be a multiple of 512 up to 8192, got 384"),
            ((1, 1, 72, 128), "float32", "must be a multiple of 512 up to 8192, got 9216"),
            ((1, 2, 4, 128), "float16", "x and z must be bfloat16 or float32, x is float16"),
        ],
    )
    def test_the_kernels_say_what_they_cannot_do(self, shape, dtype, reason):
        with pytest.raises(UnsupportedError, match=reason):
            gated_rms_norm(*make(*shape, dtype)[0], implementation="mosaic_gpu")

    def test_a_kernel_cannot_run_on_part_of_a_group(self):
        inputs, _ = make(1, 2, 4, 8)
        with jax.set_mesh(jax.make_mesh((1, 1, 2), AXES, axis_types=(AxisType.Explicit,) * 3)):
            x = jax.device_put(inputs.x, P(*AXES))
            with pytest.raises(UnsupportedError, match="2 devices share 1 groups of heads"):
                gated_rms_norm(x, inputs.z, inputs.weight, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 8, 64), 1),
        ((3, 7, 24, 64), 1),
        ((2, 2048, 80, 64), 1),
        ((8, 1000, 64, 128), 8),
        ((1, 4097, 128, 64), 1),
    ],
    ids=str,
)
def test_on_a_gpu(shape, groups, dtype):
    inputs, dy = make(*shape, dtype)
    run = jax.jit(functools.partial(results, mosaic_gpu, groups=groups))
    got, again = run(inputs, dy), run(inputs, dy)
    for first, second in zip(got, again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert_right(got, expected(inputs, dy, groups=groups), 3e-3 if dtype == "bfloat16" else 1e-5)
