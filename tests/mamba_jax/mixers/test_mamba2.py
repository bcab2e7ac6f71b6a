import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.mixers.mamba2 import Mamba2, Mamba2Config
from pallas_kernels.ssd import ssd
from tests.mamba_jax.mixers.contract import MixerContract, MixerWithHeadsContract
from tests.mamba_jax.mixers.distributions import assert_log_uniform, assert_uniform


class TestMamba2(MixerWithHeadsContract):
    config = Mamba2Config(state_size=6, head_dim=4)


class TestMamba2WithEveryOption(MixerContract):
    config = Mamba2Config(
        expand=3,
        state_size=3,
        head_dim=4,
        groups=2,
        conv_width=2,
        delta_limit_min=0.02,
        delta_limit_max=0.3,
        conv_bias=False,
        projection_bias=True,
        implementation="reference",
    )


@pytest.fixture(scope="module")
def mixer() -> Mamba2:
    config = Mamba2Config(head_dim=4, state_size=5, groups=2)
    return config.build(512, num_layers=9, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_step_sizes_start_log_uniform_between_their_bounds(mixer):
    assert_log_uniform(jax.nn.softplus(mixer.dt_bias[...]), 1e-3, 0.1)


def test_decay_rates_start_uniform_between_1_and_16(mixer):
    assert_uniform(np.exp(np.asarray(mixer.A_log[...], np.float64)), 1, 16, rounding=1e-5)


def test_skip_and_norm_start_at_one(mixer):
    np.testing.assert_array_equal(mixer.D[...], 1)
    np.testing.assert_array_equal(mixer.norm.weight[...], 1)


def test_projections_start_uniform_within_their_fan_in(mixer):
    for weight, bound in [
        (mixer.zx_proj.weight, 512**-0.5),
        (mixer.BC_proj.weight, 512**-0.5),
        (mixer.dt_proj.weight, 512**-0.5),
        (mixer.conv_x.weight, 4**-0.5),
        (mixer.out_proj.weight, 1024**-0.5 / 3),
    ]:
        assert_uniform(weight[...], -bound, bound)


def test_weight_decay_spares_what_sets_time_scales_and_norms(mixer):
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias, mixer.norm.weight, mixer.conv_x.bias):
        assert parameter.get_metadata("weight_decay") is False
    assert mixer.zx_proj.weight.get_metadata().get("weight_decay", True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expand", 0),
        ("head_dim", 0),
        ("state_size", 0),
        ("groups", 0),
        ("conv_width", 0),
        ("decay_rate_min", 0.0),
        ("decay_rate_min", 17.0),
        ("delta_min", 0.0),
        ("delta_min", 1.0),
        ("delta_limit_min", -1.0),
        ("norm_epsilon", 0.0),
    ],
)
def test_settings_that_cannot_be_used_are_named(field, value):
    with pytest.raises(ValueError, match=rf"Mamba2\.{field} = {value}"):
        Mamba2Config(**{field: value})


def test_its_selection_is_what_it_scans():
    mixer = Mamba2Config(head_dim=4, state_size=5, groups=2, delta_limit_min=0.004, delta_limit_max=0.03).build(
        16, num_layers=1, compute_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    selection = mixer.selection(x)
    delta = np.asarray(selection.delta)
    assert (delta.min(), delta.max()) == (np.float32(0.004), np.float32(0.03))
    y = ssd(selection.x, selection.delta, selection.A, selection.B, selection.C, mixer.D[...])
    np.testing.assert_allclose(mixer._project_out(y, mixer._project_in(x)[0]), mixer(x)[0], atol=1e-6)
