import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.mixers.mamba3 import Mamba3, Mamba3Config, heavy_tail
from mamba_jax.mixers.selective import FROZEN
from tests.mamba_jax.mixers.contract import MixerContract, MixerWithHeadsContract, apply, relative_error
from tests.mamba_jax.mixers.distributions import assert_log_uniform, assert_uniform


class TestMamba3(MixerWithHeadsContract):
    config = Mamba3Config(state_size=8, head_dim=4)


class TestMamba3WithEveryOption(MixerContract):
    config = Mamba3Config(
        expand=3,
        state_size=6,
        head_dim=4,
        groups=2,
        rank=2,
        rotary_fraction=1.0,
        decay_rate_floor=0.5,
        output_norm=True,
        implementation="reference",
    )


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def rms_norm(v, weight):
    return v / np.sqrt(np.mean(v**2, axis=-1, keepdims=True) + 1e-5) * weight


def turned(v, angle):
    """Rotary embedding of (heads, rank, state): components n and n + state / 2 by angle n, the others by none."""
    half = v.shape[-1] // 2
    angle = np.pad(angle, ((0, 0), (0, half - angle.shape[-1])))[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = v[..., :half], v[..., half:]
    return np.concatenate([cos * first - sin * second, sin * first + cos * second], axis=-1)


def published_layer(mixer: Mamba3, u, kept=None):
    """The published layer for one sequence in float64, one token after the other; tokens not kept have a delta of 0.

    Here B and C are turned by the angle so far, as in the authors' code, and the state stands still.
    """
    weights = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    weights = jax.tree.map(lambda value: np.asarray(value, float), weights)
    config, heads = mixer.config, mixer.heads
    ones = np.ones((heads, config.rank, 1))
    h, before, angle, outputs = 0.0, 0.0, 0.0, []
    for t, token in enumerate(u):
        z, x = np.einsum("w,wkhp->khp", token, weights["zx_proj"]["weight"])
        B, C = np.moveaxis(np.einsum("w,wgkrn->gkrn", token, weights["BC_proj"]["weight"]), 1, 0)
        delta, A, trapezoid = np.einsum("w,wkh->kh", token, weights["dynamics_proj"]["weight"])
        theta = np.pi * np.tanh(token @ weights["angle_proj"]["weight"])

        delta = np.logaddexp(0, delta + weights["dt_bias"]) * (1 if kept is None else kept[t])
        A = -np.maximum(np.where(A >= 0, 1 + A, 1 / (1 - np.minimum(A, 0))), config.decay_rate_floor)
        lambda_ = sigmoid(trapezoid)
        angle = angle + delta[:, None] * theta
        repeats = heads // config.groups
        B = turned(np.repeat(rms_norm(B, weights["B_norm"]["weight"]), repeats, axis=0) + weights["B_bias"], angle)
        C = turned(np.repeat(rms_norm(C, weights["C_norm"]["weight"]), repeats, axis=0) + weights["C_bias"], angle)

        x = x[:, None] * weights.get("mimo_x", ones)
        alpha = np.exp(delta * A)[:, None, None]
        input_state = np.einsum("hrp,hrn->hpn", x, B)
        beta, gamma = ((1 - lambda_) * delta)[:, None, None] * alpha, (lambda_ * delta)[:, None, None]
        h = alpha * h + beta * before + gamma * input_state
        before = input_state

        y = np.einsum("hpn,hrn->hrp", h, C) + weights["D"][:, None, None] * x
        if config.output_norm:
            y = rms_norm(y, weights["norm_weight"][:, None])
        z = z[:, None] * weights.get("mimo_z", ones)
        y = np.sum(y * z * sigmoid(z) * weights.get("mimo_o", ones), axis=1)
        outputs.append(y.reshape(-1) @ weights["out_proj"]["weight"])
    return np.stack(outputs)


@pytest.mark.parametrize(
    "config",
    [
        Mamba3Config(state_size=8, head_dim=4),
        Mamba3Config(state_size=12, head_dim=8, groups=2, rank=3, decay_rate_floor=0.7, output_norm=True),
    ],
    ids=["SISO", "MIMO"],
)
def test_computes_the_published_layer(config):
    mixer = config.build(16, num_layers=2, compute_dtype=jnp.float32, rngs=nnx.Rngs(1))
    leaves, structure = jax.tree.flatten(mixer)
    rng = np.random.default_rng(0)
    mixer = jax.tree.unflatten(structure, [leaf + 0.5 * rng.normal(size=leaf.shape) for leaf in leaves])
    mixer = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), mixer)
    u = jnp.asarray(rng.normal(size=(2, 30, 16)), jnp.float32)
    expected = np.stack([published_layer(mixer, row) for row in np.asarray(u, float)])
    assert relative_error(apply(mixer, u)[0], expected) < 1e-5


class Keeps(nnx.Module):
    """An extender that leaves out the same tokens in all sequences."""

    A_scale = None

    def __init__(self, kept):
        self.kept = nnx.data(jnp.asarray(kept))

    def __call__(self, delta, bias, position):
        return jnp.where(self.kept[position - 1], delta, FROZEN)


def test_a_token_that_is_left_out_takes_no_step_and_the_next_one_begins_there():
    mixer = Mamba3Config(state_size=8, head_dim=4).build(16, num_layers=2, compute_dtype=jnp.float32, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    u, kept = jnp.asarray(rng.normal(size=(1, 12, 16)), jnp.float32), rng.random((12, mixer.heads)) < 0.5
    kept[5:8], kept[8] = False, True
    mixer.extender = Keeps(kept)
    assert relative_error(apply(mixer, u)[0][0], published_layer(mixer, np.asarray(u[0], float), kept)) < 1e-5
    states = [apply(mixer, u[:, :length])[1].ssm for length in (5, 8, 9)]
    np.testing.assert_allclose(states[0], states[1], rtol=1e-6)
    without = apply(mixer, u.at[:, 7].set(0)[:, :9])[1].ssm
    assert relative_error(without, states[2]) > 1e-2


def test_the_selection_has_the_step_sizes_and_decay_rates_of_each_token():
    mixer = TestMamba3WithEveryOption().build()
    u = TestMamba3WithEveryOption().input()
    dynamics = np.einsum("blw,wkh->klbh", np.asarray(u, float), np.asarray(mixer.dynamics_proj.weight[...], float))
    step, rate = np.moveaxis(dynamics[:2], 2, 1)
    selection = mixer.selection(u)
    np.testing.assert_allclose(selection.delta, np.logaddexp(0, step + np.asarray(mixer.dt_bias[...])), rtol=1e-4)
    decay_rate = np.maximum(np.where(rate >= 0, 1 + rate, 1 / (1 - np.minimum(rate, 0))), 0.5)
    np.testing.assert_allclose(selection.A[..., 0], -decay_rate, rtol=1e-4)


@pytest.fixture(scope="module")
def mixer() -> Mamba3:
    config = Mamba3Config(head_dim=4, state_size=10, groups=2, rank=4)
    return config.build(512, num_layers=9, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_step_sizes_start_log_uniform_between_their_bounds(mixer):
    assert_log_uniform(jax.nn.softplus(mixer.dt_bias[...]), 1e-3, 0.1)


def test_biases_skip_norms_and_gates_start_at_one_and_ranks_share_the_input(mixer):
    for parameter in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.B_norm.weight, mixer.C_norm.weight, mixer.mimo_z):
        np.testing.assert_array_equal(parameter[...], 1)
    for parameter in (mixer.mimo_x, mixer.mimo_o):
        np.testing.assert_array_equal(parameter[...], 1 / 4)


def test_projections_start_uniform_within_their_fan_in(mixer):
    for weight, bound in [
        (mixer.zx_proj.weight, 512**-0.5),
        (mixer.BC_proj.weight, 512**-0.5),
        (mixer.dynamics_proj.weight, 512**-0.5),
        (mixer.angle_proj.weight, 512**-0.5),
        (mixer.out_proj.weight, 1024**-0.5 / 3),
    ]:
        assert_uniform(weight[...], -bound, bound)


def test_weight_decay_spares_what_sets_time_scales_biases_and_norms(mixer):
    for parameter in (mixer.dt_bias, mixer.D, mixer.B_bias, mixer.C_bias, mixer.B_norm.weight):
        assert parameter.get_metadata("weight_decay") is False
    for parameter in (mixer.zx_proj.weight, mixer.mimo_x, mixer.mimo_z, mixer.mimo_o):
        assert parameter.get_metadata().get("weight_decay", True)


def test_one_input_a_head_needs_as_many_parameters_as_published():
    # d_in_proj = 2 d_inner + 2 N G + 3 heads + angles; dt_bias, D; biases and norms of B and C; out_proj.
    mixer = Mamba3Config().build(768, num_layers=1, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
    in_proj = 768 * (2 * 1536 + 2 * 128 + 3 * 24 + 32)
    expected = in_proj + 2 * 24 + 2 * 24 * 128 + 2 * 128 + 1536 * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(mixer)) == expected


def test_decay_rates_have_a_heavy_tail():
    x = np.array([-1e4, -3.0, 0.0, 3.0])
    np.testing.assert_allclose(heavy_tail(jnp.asarray(x)), [1 / 10001, 0.25, 1.0, 4.0], rtol=1e-6)
    slope = jax.grad(lambda x: heavy_tail(x))
    assert slope(-1e-6) == pytest.approx(1, rel=1e-4)
    assert slope(1e-6) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expand", 0),
        ("head_dim", 0),
        ("state_size", 0),
        ("groups", 0),
        ("rank", 0),
        ("rotary_fraction", 0.0),
        ("rotary_fraction", 1.5),
        ("rotary_fraction", 0.01),
        ("decay_rate_floor", 0.0),
        ("delta_min", 0.0),
        ("delta_min", 1.0),
        ("norm_epsilon", 0.0),
    ],
)
def test_settings_that_cannot_be_used_are_named(field, value):
    with pytest.raises(ValueError, match=rf"Mamba3\.{field} = {value}"):
        Mamba3Config(**{field: value})
