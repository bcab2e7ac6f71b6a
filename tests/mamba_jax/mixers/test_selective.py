import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.long_context.token_filter import TokenFilter
from mamba_jax.mixers.mamba1 import Mamba1Config
from mamba_jax.mixers.mamba2 import Mamba2Config
from mamba_jax.mixers.mamba3 import Mamba3Config
from mamba_jax.mixers.selective import FROZEN, SelectiveMixer, document_positions, extend
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from tests.mamba_jax.mixers.contract import VariantContract


class LeavesOutTokens(VariantContract):
    """From the fourth token on, more and more of those whose step is below a bound of the channel's own."""

    channels: int
    test_it_starts_with_the_same_numbers_on_a_mesh = None  # an extender starts with no numbers of its own

    def build(self, compute_dtype=jnp.float32):
        mixer = super().build(compute_dtype)
        bounds = np.linspace(0.3, 1.5, self.channels)
        growing = np.linspace(0, 1, 8)[:, None] ** 0.25 * bounds
        mixer.extender = TokenFilter(growing, last_positions=(3, 4, 5, 6, 8, 10, 12))
        return mixer

    def test_flops_grow_with_the_length_from_at_least_two_a_weight(self):
        # An extender costs a comparison a channel and token: not counted.
        assert self.build().flops(100) == super().build().flops(100)

    def test_tokens_are_left_out_and_kept(self):
        share = np.mean(self.build().selection(self.input()).delta == 0)
        assert 0.1 < share < 0.9

    def test_it_is_a_mixer_with_a_delta(self):
        assert isinstance(self.build(), SelectiveMixer)


class TestMamba1ThatLeavesOutTokens(LeavesOutTokens):
    config = Mamba1Config(state_size=4)
    channels = 32


class TestMamba2ThatLeavesOutTokens(LeavesOutTokens):
    config = Mamba2Config(state_size=4, head_dim=4, groups=2, delta_limit_max=1.0)
    channels = 8


class TestMamba3ThatLeavesOutTokens(LeavesOutTokens):
    config = Mamba3Config(state_size=4, head_dim=4, groups=2)
    channels = 8


def test_a_frozen_token_leaves_state_and_output_as_they_are():
    keys = jax.random.split(jax.random.key(0), 5)
    x, delta = (jax.random.normal(key, (1, 5, 4)) for key in keys[:2])
    B, C = (jax.random.normal(key, (1, 5, 3)) for key in keys[2:4])
    A = -jnp.exp(jax.random.normal(keys[4], (4, 3)))
    bias = jnp.array([-3.0, 0.0, 3.0, 8.0])
    frozen = delta.at[:, 2:].set(FROZEN)
    for implementation in ("reference", "xla"):
        _, state = selective_scan(
            x, frozen, A, B, C, delta_bias=bias, delta_softplus=True, return_final_state=True,
            implementation=implementation,
        )  # fmt: skip
        _, before = selective_scan(
            x[:, :2], delta[:, :2], A, B[:, :2], C[:, :2], delta_bias=bias, delta_softplus=True,
            return_final_state=True, implementation=implementation,
        )  # fmt: skip
        np.testing.assert_allclose(state, before, rtol=1e-6)


def test_a_frozen_token_leaves_the_state_of_mamba_2_as_it_is():
    keys = jax.random.split(jax.random.key(0), 4)
    x, delta = jax.random.normal(keys[0], (1, 5, 4, 2)), jax.random.normal(keys[1], (1, 5, 4))
    B, C = (jax.random.normal(key, (1, 5, 2, 3)) for key in keys[2:])
    A, bias = -jnp.arange(1.0, 5.0), jnp.array([-3.0, 0.0, 3.0, 8.0])
    options = {"delta_bias": bias, "delta_softplus": True, "return_final_state": True}
    frozen = delta.at[:, 2:].set(FROZEN)
    for implementation in ("reference", "xla"):
        _, state = ssd(x, frozen, A, B, C, implementation=implementation, **options)
        _, before = ssd(x[:, :2], delta[:, :2], A, B[:, :2], C[:, :2], implementation=implementation, **options)
        np.testing.assert_allclose(state, before, rtol=1e-6)


def test_without_an_extender_nothing_is_counted_or_changed():
    delta = jnp.ones((2, 3, 4))
    assert extend(None, delta, jnp.zeros(4)) == (delta, None)


@pytest.mark.parametrize("length", [1, 2, 5, 40, 130])
def test_positions_of_any_length_restart_where_documents_do(length):
    starts = np.random.default_rng(length).random((3, length)) < 0.15
    starts[:, 0] = False
    expected = np.empty((3, length), int)
    for row in range(3):
        position = 4
        for t in range(length):
            position = 1 if starts[row, t] else position + 1
            expected[row, t] = position
    segment_ids, before = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32), jnp.full((3,), 4, jnp.int32)
    np.testing.assert_array_equal(document_positions(3, length, before, segment_ids), expected)
    _, last = extend(
        TokenFilter(np.ones((1, 2))), jnp.ones((3, length, 2)), jnp.zeros(2), position=before, segment_ids=segment_ids
    )
    np.testing.assert_array_equal(last, expected[:, -1])


@pytest.mark.parametrize("before", [None, [0, 7]])
def test_positions_count_the_tokens_of_each_document(before):
    segment_ids = np.random.default_rng(0).integers(0, 2, (2, 40)).cumsum(axis=1) // 5
    expected = np.zeros_like(segment_ids)
    for row in range(2):
        count = 0 if before is None else before[row]
        for t in range(40):
            count = 1 if t and segment_ids[row, t] != segment_ids[row, t - 1] else count + 1
            expected[row, t] = count
    state = None if before is None else jnp.array(before, jnp.int32)
    np.testing.assert_array_equal(document_positions(2, 40, state, jnp.asarray(segment_ids)), expected)
    expected = np.arange(1, 41) + (np.zeros((2, 1), int) if before is None else np.array(before)[:, None])
    np.testing.assert_array_equal(document_positions(2, 40, state), expected)


def test_positions_are_counted_without_comparing_tokens_pairwise():
    """Comparisons of all pairs in a block once took longer than the filter that wanted the positions."""
    batch_size, length = 2, 4096
    counted = jax.make_jaxpr(lambda segment_ids: document_positions(batch_size, length, None, segment_ids))(
        jnp.zeros((batch_size, length), jnp.int32)
    )
    sizes = [out.aval.size for equation in equations(counted.jaxpr) for out in equation.outvars]
    assert max(sizes) <= batch_size * (length + 1)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in equation.params.values():
            if hasattr(inner, "eqns"):
                yield from equations(inner)
