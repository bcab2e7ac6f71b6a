"""The causal convolution's Mosaic GPU kernels: interpreted on a CPU, lowered for CUDA, run where there is a GPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv1d import causal_conv1d, mosaic_gpu, reference
from pallas_kernels.causal_conv1d.inputs import Inputs
from pallas_kernels.causal_conv1d.mosaic_gpu import geometry
from pallas_kernels.causal_conv1d.mosaic_gpu.geometry import Geometry
from pallas_kernels.implementation import UnsupportedError

FORWARD_ERROR = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
GRADIENT_ERROR = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}

Results = dict[str, Any]


def make(
    shape: tuple[int, int, int], width: int = 4, dtype: str = "float32", *, bias=True, segments=False, state=False
) -> Inputs:
    """Random inputs; where there are segments they are a few tokens long."""
    rng = np.random.default_rng(0)
    batch, length, channels = shape

    def draw(*dims: int, dtype: str = dtype) -> jax.Array:
        return jnp.asarray(rng.normal(size=dims), dtype)

    return Inputs(
        draw(*shape),
        draw(width, channels, dtype="float32"),
        draw(channels, dtype="float32") if bias else None,
        jnp.asarray(np.cumsum(rng.random((batch, length)) < 0.3, axis=1), jnp.int32) if segments else None,
        draw(batch, width - 1, channels) if state else None,
    )


def cotangents(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    batch, _, channels = inputs.x.shape
    state = (batch, inputs.weight.shape[0] - 1, channels)
    return tuple(jnp.asarray(rng.normal(size=dims), inputs.x.dtype) for dims in (inputs.x.shape, state))


def differentiable(inputs: Inputs) -> dict[str, jax.Array]:
    return {name: array for name, array in inputs._asdict().items() if array is not None and name != "segment_ids"}


def run(inputs: Inputs, dy: jax.Array, dstate: jax.Array, activation: str | None) -> tuple[Results, Results]:
    """Outputs and gradients of the kernels."""

    def convolve(arrays: dict[str, jax.Array]) -> Results:
        y, state = mosaic_gpu.causal_conv1d(inputs._replace(**arrays), activation=activation)
        return {"y": y, "final_state": state}

    outputs, transpose = jax.vjp(convolve, differentiable(inputs))
    return outputs, transpose({"y": dy, "final_state": dstate})[0]


compiled_run = jax.jit(run, static_argnums=3)


def expected(inputs: Inputs, dy: jax.Array, dstate: jax.Array, activation: str | None) -> tuple[Results, Results]:
    """Outputs and gradients by the definition: float64 loops over tokens and taps."""
    x, weight, dy, dstate = (np.asarray(a, np.float64) for a in (inputs.x, inputs.weight, dy, dstate))
    batch, length, channels = x.shape
    width = len(weight)
    before = np.zeros((batch, width - 1, channels))
    if inputs.initial_state is not None:
        before = np.asarray(inputs.initial_state, np.float64)
    tokens = np.concatenate([before, x], axis=1)
    segments = np.zeros((batch, length)) if inputs.segment_ids is None else np.asarray(inputs.segment_ids)
    segments = np.concatenate([np.repeat(segments[:, :1], width - 1, axis=1), segments], axis=1)
    sees = lambda t, k: (segments[:, t + k] == segments[:, t + width - 1])[:, None]  # noqa: E731

    y = (
        np.zeros_like(x)
        if inputs.bias is None
        else np.broadcast_to(np.asarray(inputs.bias, np.float64), x.shape).copy()
    )
    for t, k in itertools.product(range(length), range(width)):
        y[:, t] += weight[k] * np.where(sees(t, k), tokens[:, t + k], 0.0)
    kept = (segments[:, length:] == segments[:, -1:])[..., None]
    outputs = {"y": y, "final_state": np.where(kept, tokens[:, length:], 0.0)}
    if activation == "silu":
        gate = 1 / (1 + np.exp(-y))
        outputs["y"] = y * gate
        dy = dy * gate * (1 + y * (1 - gate))

    dtokens, dweight = np.zeros_like(tokens), np.zeros_like(weight)
    dtokens[:, length:] += np.where(kept, dstate, 0.0)
    for t, k in itertools.product(range(length), range(width)):
        dtokens[:, t + k] += np.where(sees(t, k), weight[k] * dy[:, t], 0.0)
        dweight[k] += np.sum(np.where(sees(t, k), tokens[:, t + k] * dy[:, t], 0.0), axis=0)
    gradients = {"x": dtokens[:, width - 1 :], "weight": dweight}
    if inputs.bias is not None:
        gradients["bias"] = dy.sum((0, 1))
    if inputs.initial_state is not None:
        gradients["initial_state"] = dtokens[:, : width - 1]
    return outputs, gradients


def assert_close(got: Results, want: Results, bound: float) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        difference = np.linalg.norm(np.asarray(got[name], np.float64) - array)
        assert difference <= bound * np.linalg.norm(array), name


def assert_right(inputs: Inputs, activation: str | None = "silu", run: Callable[..., Any] = run) -> None:
    dy, dstate = cotangents(inputs)
    got, want = run(inputs, dy, dstate, activation), expected(inputs, dy, dstate, activation)
    dtype = inputs.x.dtype.name
    assert_close(got[0], want[0], FORWARD_ERROR[dtype])
    assert_close(got[1], want[1], GRADIENT_ERROR[dtype])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and more chunks than stages, in a short sequence with few channels."""
    small = Geometry(vector=2, steps=4, stages=3, chunks=5, unroll=2)
    for direction in ("forward", "backward"):
        monkeypatch.setattr(geometry, direction, lambda *_: small)


class TestInterpreted:
    """On the CPU, by Pallas' interpreter."""

    @pytest.mark.usefixtures("interpreted", "small_blocks")
    def test_everything_at_once_over_many_blocks(self):
        assert_right(make((2, 93, 72), segments=True, state=True))

    @pytest.mark.usefixtures("interpreted")
    @pytest.mark.parametrize("length", [1, 2, 33])
    def test_plain(self, length):
        assert_right(make((1, length, 5), width=3, dtype="bfloat16", bias=False), activation=None)

    @pytest.mark.usefixtures("interpreted", "small_blocks")
    def test_under_vmap_each_element_gets_its_own_result(self):
        inputs = make((2, 9, 3), bias=False)
        weights = jnp.stack([inputs.weight, -inputs.weight, 2 * inputs.weight])

        def convolve(x: jax.Array, weight: jax.Array) -> jax.Array:
            return mosaic_gpu.causal_conv1d(Inputs(x[None], weight), activation=None)[0][0]

        y = jax.jit(jax.vmap(convolve, in_axes=(0, None)))(inputs.x, inputs.weight)
        np.testing.assert_array_equal(y, mosaic_gpu.causal_conv1d(inputs, activation=None)[0])
        scaled = jax.jit(jax.vmap(convolve, in_axes=(None, 0)))(inputs.x[0], weights)
        np.testing.assert_allclose(scaled, jnp.stack([y[0], -y[0], 2 * y[0]]), rtol=1e-6)

    @pytest.mark.usefixtures("interpreted", "small_blocks")
    def test_gradient_under_vmap(self):
        inputs = make((2, 9, 3), segments=True)

        def loss(convolve: Any, weight: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(convolve(Inputs(x[None], weight, inputs.bias, ids[None]), activation="silu")[0]))

        def gradients(convolve: Any) -> Any:
            gradient = jax.grad(functools.partial(loss, convolve), argnums=(0, 1))
            return jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))(inputs.weight, inputs.x, inputs.segment_ids)

        for got, want in zip(gradients(mosaic_gpu.causal_conv1d), gradients(reference.causal_conv1d), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


class TestLowering:
    """For CUDA, without a GPU."""

    @pytest.mark.parametrize("segments", [False, True], ids=["whole", "packed"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("shape", [(8, 2048, 5120), (1, 131072, 1536), (2, 1000, 130)], ids=str)
    def test_benchmark_shapes(self, shape, dtype, segments):
        lower_gradient(shape, dtype, segments)

    @pytest.mark.parametrize("width", [1, 2, 3, 8])
    def test_widths(self, width):
        lower_gradient((2, 300, 256), "float16", True, width)

    def test_more_elements_than_32_bits_can_count(self):
        lower_gradient((8, 300_000, 1536), "bfloat16", False)

    def test_sharded_over_batch_and_channels(self, monkeypatch):
        monkeypatch.setattr(mosaic_gpu, "missing_hardware", lambda: None)
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), (jax.sharding.AxisType.Explicit,) * 2)
        with jax.set_mesh(mesh):
            spec = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
            x = jax.ShapeDtypeStruct((4, 64, 512), "bfloat16", sharding=spec)
            weight = jax.ShapeDtypeStruct((4, 512), "float32")
            loss = lambda x, w: jnp.sum(causal_conv1d(x, w, implementation="mosaic_gpu").astype("float32") ** 2)  # noqa: E731
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, weight).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def lower_gradient(shape: tuple[int, int, int], dtype: str, segments: bool, width: int = 4) -> None:
    batch, length, channels = shape
    x = jax.ShapeDtypeStruct(shape, dtype)
    weight = jax.ShapeDtypeStruct((width, channels), "float32")
    bias = jax.ShapeDtypeStruct((channels,), "float32")
    state = jax.ShapeDtypeStruct((batch, width - 1, channels), dtype)
    ids = jax.ShapeDtypeStruct((batch, length), "int32")

    @jax.checkpoint
    def loss(x, weight, bias, state, ids):
        inputs = Inputs(x, weight, bias, ids if segments else None, state if segments else None)
        y, final_state = mosaic_gpu.causal_conv1d(inputs, activation="silu")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(final_state.astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    lowered = gradient.trace(x, weight, bias, state, ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu") in (2, 3)


class TestErrors:
    """Calls that the kernels cannot run."""

    def test_names_the_device_and_the_alternatives(self):
        if jax.default_backend() == "gpu":
            pytest.skip("this device can")
        inputs = make((1, 4, 8))
        with pytest.raises(UnsupportedError, match=r"needs an NVIDIA GPU, .* cpu.*\['xla', 'reference'\]"):
            causal_conv1d(inputs.x, inputs.weight, implementation="mosaic_gpu")

    def test_names_the_largest_width(self):
        inputs = make((1, 4, 8), width=9)
        with pytest.raises(UnsupportedError, match=r"width must be at most 8, got 9"):
            causal_conv1d(inputs.x, inputs.weight, implementation="mosaic_gpu")

    def test_names_the_dtypes(self):
        x = jnp.zeros((1, 4, 8), "float8_e4m3fn")
        with pytest.raises(UnsupportedError, match=r"x must be one of .*'bfloat16'.*, got float8_e4m3fn"):
            causal_conv1d(x, jnp.zeros((4, 8)), implementation="mosaic_gpu")


def all_pairs() -> list[tuple[int, int, str]]:
    """Every length with every number of channels, and every dtype with each of both: a third of all combinations."""
    lengths, channels, dtypes = (1, 2, 63, 64, 65, 1000, 2048, 4097), (8, 130, 256, 1536), list(FORWARD_ERROR)
    pairs = itertools.product(enumerate(lengths), enumerate(channels))
    return [(length, width, dtypes[(i + j) % 3]) for (i, length), (j, width) in pairs]


@pytest.mark.gpu
class TestOnGpu:
    """On the hardware."""

    @pytest.mark.parametrize(("length", "channels", "dtype"), all_pairs())
    def test_correct(self, length, channels, dtype):
        assert_right(make((2, length, channels), dtype=dtype, segments=True, state=True), run=compiled_run)
        assert_right(make((2, length, channels), dtype=dtype, bias=False), activation=None, run=compiled_run)

    @pytest.mark.parametrize("width", range(1, 9))
    def test_widths(self, width):
        assert_right(make((3, 500, 264), width=width, segments=True, state=True), run=compiled_run)

    def test_two_runs_agree_to_the_bit(self):
        inputs = make((4, 3000, 640), dtype="bfloat16", segments=True, state=True)
        dy, dstate = cotangents(inputs)
        first, second = (compiled_run(inputs, dy, dstate, "silu") for _ in range(2))
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), first, second)))

    def test_more_elements_than_32_bits_can_count(self):
        length, channels = 1_100_000, 2048  # 2.25e9 elements
        x = jax.random.normal(jax.random.key(0), (1, length, channels), jnp.bfloat16)
        weight = jax.random.normal(jax.random.key(1), (4, channels))

        def convolve(x: jax.Array, weight: jax.Array) -> jax.Array:
            return mosaic_gpu.causal_conv1d(Inputs(x, weight), activation="silu")[0]

        y, transpose = jax.vjp(jax.jit(convolve), x, weight)
        dx, _ = transpose(y)
        want, transpose_end = jax.vjp(convolve, x[:, -200:], weight)
        want_dx, _ = transpose_end(y[:, -200:])
        for got, wanted in ((y, want), (dx, want_dx)):
            np.testing.assert_allclose(*(np.asarray(a[:, -100:], np.float32) for a in (got, wanted)), rtol=1e-2)
