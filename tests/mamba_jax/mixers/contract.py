"""What every mixer must do, as tests that a mixer's test class inherits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mamba_jax import sharding
from mamba_jax.mixers import Mixer, MixerConfig
from tests.mamba_jax.meshes import mesh, on_current_mesh


def relative_error(actual, expected) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    if np.array_equal(actual, expected):
        return 0.0  # also where both are zero, as gradients of what only decides are
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_trees_close(actual, expected, tolerance: float) -> None:
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, e) <= tolerance, jax.tree_util.keystr(path)


@jax.jit
def apply(mixer: Mixer, x, state=None, segment_ids=None):
    return mixer(x, state=state, segment_ids=segment_ids)


@jax.jit
def apply_by_step(mixer: Mixer, x, state):
    def step(state, x):
        y, state = mixer.step(x, state)
        return state, y

    state, y = jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(y, 0, 1), state


def value_and_gradients(mixer: Mixer, x, segment_ids):
    def loss(mixer, x):
        y, state = mixer(x, segment_ids=segment_ids)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))

    return jax.value_and_grad(loss, argnums=(0, 1))(mixer, x)


def mesh_name(sizes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


class MixerContract:
    """Inherit, set ``config``, and every mixer is held to the same promises."""

    config: MixerConfig
    width = 16
    batch_size = 2
    length = 13

    def build(self, compute_dtype=jnp.float32) -> Mixer:
        mixer = self.config.build(self.width, num_layers=2, compute_dtype=compute_dtype, rngs=nnx.Rngs(3))
        # Away from the initialisation's ones and zeros, which hide what is not connected.
        leaves, structure = jax.tree.flatten(mixer)
        keys = jax.random.split(jax.random.key(5), len(leaves))
        moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, moved)

    def input(self, seed: int = 0):
        return jax.random.normal(jax.random.key(seed), (self.batch_size, self.length, self.width))

    def test_steps_compute_what_a_whole_sequence_does(self):
        mixer, x = self.build(), self.input()
        whole, state = apply(mixer, x)
        by_step, state_by_step = apply_by_step(mixer, x, mixer.init_state(self.batch_size))
        assert relative_error(by_step, whole) < 1e-5
        assert_trees_close(state_by_step, state, 1e-5)

    def test_no_state_means_the_initial_state(self):
        mixer, x = self.build(), self.input()
        without, _ = apply(mixer, x)
        given, _ = apply(mixer, x, mixer.init_state(self.batch_size))
        np.testing.assert_array_equal(without, given)

    @pytest.mark.parametrize("cuts", [(1,), (2, 3), (5, 6, 12)])
    def test_chunks_with_the_state_passed_on_equal_the_whole(self, cuts):
        mixer, x = self.build(), self.input()
        whole, final = apply(mixer, x)
        state, outputs = None, []
        for chunk in jnp.split(x, cuts, axis=1):
            y, state = apply(mixer, chunk, state)
            outputs.append(y)
        assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 1e-5
        assert_trees_close(state, final, 1e-5)

    def test_packed_documents_equal_each_alone(self):
        mixer, x = self.build(), self.input()
        first = 5
        segment_ids = jnp.broadcast_to(jnp.where(jnp.arange(self.length) < first, 3, 8), x.shape[:2])
        packed, state = apply(mixer, x, None, segment_ids)
        alone = [apply(mixer, part) for part in (x[:, :first], x[:, first:])]
        assert relative_error(packed, jnp.concatenate([y for y, _ in alone], axis=1)) < 1e-5
        assert_trees_close(state, alone[1][1], 1e-5)

    def test_an_output_depends_on_no_later_input(self):
        mixer, x = self.build(), self.input()
        changed = x.at[:, 7:].set(self.input(seed=1)[:, 7:])
        y, changed_y = apply(mixer, x)[0], apply(mixer, changed)[0]
        np.testing.assert_array_equal(y[:, :7], changed_y[:, :7])
        assert not np.allclose(y[:, 7:], changed_y[:, 7:])

    def test_gradients_equal_those_of_the_steps(self):
        mixer, x = self.build(), self.input()
        target = self.input(seed=2)

        def gradients(forward):
            loss = lambda mixer, x: jnp.sum(forward(mixer, x, mixer.init_state(self.batch_size))[0] * target)  # noqa: E731
            return jax.jit(jax.grad(loss, argnums=(0, 1)))(mixer, x)

        assert_trees_close(gradients(apply), gradients(apply_by_step), 1e-4)

    def test_bfloat16_stays_close_to_float32(self):
        exact = apply(self.build(), self.input())[0]
        rounded = apply(self.build(jnp.bfloat16), self.input().astype(jnp.bfloat16))[0]
        assert rounded.dtype == jnp.bfloat16
        assert relative_error(rounded, exact) < 3e-2

    def test_state_has_the_size_of_one_token_whatever_the_length(self):
        mixer = self.build()
        initial = jax.eval_shape(lambda: mixer.init_state(self.batch_size))
        assert jax.eval_shape(lambda x: mixer(x)[1], self.input()) == initial
        assert jax.eval_shape(lambda x: mixer(x)[1], self.input()[:, :1]) == initial

    def test_flops_grow_with_the_length_from_at_least_two_a_weight(self):
        mixer = self.build()
        weights = sum(leaf.size for leaf in jax.tree.leaves(mixer))
        assert mixer.flops(1) > weights
        assert mixer.flops(2000) > 1999 * mixer.flops(1) * 0.9

    @pytest.fixture(scope="class")
    @classmethod
    def unsharded(cls):
        """A loss and its gradients by mixer and input."""
        return jax.jit(value_and_gradients)(cls().build(), *cls().documents())

    def documents(self):
        """An input and the documents that its tokens are of."""
        x = jax.random.normal(jax.random.key(0), (4, 12, self.width))
        return x, jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.15, (4, 12)), axis=1)

    @pytest.mark.parametrize(
        "sizes",
        [{"data": 2}, {"fsdp": 2}, {"tensor": 4}, {"sequence": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
        ids=mesh_name,
    )
    def test_sharded_equals_unsharded(self, sizes, unsharded):
        unplaced, (x, segment_ids) = self.build(), self.documents()
        with jax.set_mesh(mesh(**sizes)):
            mixer = on_current_mesh(unplaced, self.build)
            placed = jax.device_put(x, P(sharding.BATCH, sharding.SEQUENCE, None))
            ids = jax.device_put(segment_ids, P(sharding.BATCH, sharding.SEQUENCE))
            actual = jax.jit(value_and_gradients)(mixer, placed, ids)
        if "fsdp" in sizes or "tensor" in sizes:
            assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(mixer))
        assert_trees_close(actual, unsharded, 1e-4)

    def test_it_starts_with_the_same_numbers_on_a_mesh(self):
        with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2)):
            built, expected = jax.jit(self.build)(), on_current_mesh(self.build(), self.build)
        assert jax.tree.structure(built) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(built), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


class VariantContract(MixerContract):
    """The same for other options of a mixer; more meshes add nothing that the mixer's own tests do not see."""

    @pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"sequence": 2}], ids=mesh_name)
    def test_sharded_equals_unsharded(self, sizes, unsharded):
        super().test_sharded_equals_unsharded(sizes, unsharded)


class MixerWithHeadsContract(MixerContract):
    """The same for a mixer whose channels come in heads, ``head_dim`` each, and these in groups."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "head_dim = 64 cannot be used: it must divide 32 channels"),
            ({"head_dim": 4, "groups": 3}, "groups = 3 cannot be used: it must divide 8 heads"),
        ],
        ids=["heads", "groups"],
    )
    def test_heads_that_do_not_fit_the_width_are_a_mistake(self, settings, message):
        config_type = type(self.config)
        name = config_type.__name__.removesuffix("Config")
        with pytest.raises(ValueError, match=rf"{name}\.{message}"):
            config_type(**settings).build(16, num_layers=1, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
