import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.mixers.mamba1 import Mamba1, Mamba1Config
from tests.mamba_jax.mixers.contract import MixerContract, VariantContract
from tests.mamba_jax.mixers.distributions import assert_log_uniform, assert_uniform


class TestMamba1(MixerContract):
    config = Mamba1Config(state_size=4)


class TestMamba1WithEveryOption(VariantContract):
    config = Mamba1Config(
        expand=3, state_size=3, conv_width=2, delta_rank=5, conv_bias=False, projection_bias=True, implementation="xla"
    )


@pytest.fixture(scope="module")
def mixer() -> Mamba1:
    return Mamba1Config().build(256, num_layers=9, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_step_sizes_start_log_uniform_between_their_bounds(mixer):
    assert_log_uniform(jax.nn.softplus(mixer.dt_bias[...]), 1e-3, 0.1)


def test_step_sizes_start_no_lower_than_the_floor():
    config = Mamba1Config(delta_min=1e-8, delta_max=1e-6, delta_floor=1e-4)
    mixer = config.build(32, num_layers=1, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(jax.nn.softplus(mixer.dt_bias[...]), 1e-4, rtol=1e-3)


def test_A_starts_at_minus_one_to_minus_N_in_every_channel(mixer):
    np.testing.assert_allclose(-np.exp(mixer.A_log[...]), np.tile(-np.arange(1.0, 17.0), (512, 1)), rtol=1e-6)


def test_projections_start_uniform_within_their_fan_in(mixer):
    for weight, bound in [
        (mixer.in_proj.weight, 256**-0.5),
        (mixer.x_proj.weight, 512**-0.5),
        (mixer.dt_proj.weight, 16**-0.5),
        (mixer.conv_weight, 4**-0.5),
        (mixer.out_proj.weight, 512**-0.5 / 3),
    ]:
        assert_uniform(weight[...], -bound, bound)


@pytest.mark.parametrize(
    ("field", "value"),
    [("expand", 0), ("state_size", 0), ("conv_width", 0), ("delta_rank", 0), ("delta_min", 0.0), ("delta_min", 1.0)],
)
def test_settings_that_cannot_be_used_are_named(field, value):
    with pytest.raises(ValueError, match=rf"Mamba1\.{field} = {value}"):
        Mamba1Config(**{field: value})
