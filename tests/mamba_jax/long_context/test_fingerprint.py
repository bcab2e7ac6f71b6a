import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba_jax.long_context.calibration import calibrate
from mamba_jax.long_context.fingerprint import _checksum, fingerprint
from mamba_jax.long_context.scaling import ScalingConfig, apply_scaling
from tests.mamba_jax.long_context.models import language_model, on_mesh, tokens
from tests.mamba_jax.meshes import mesh


@pytest.fixture(scope="module")
def model():
    return language_model(pattern="M2", repeats=1)


def test_any_other_parameter_is_another_model(model):
    names = {fingerprint(model)}
    leaves, structure = jax.tree.flatten(model)
    for i in range(len(leaves)):
        changed = [leaf.at[(-1,) * leaf.ndim].add(1e-3) if i == j else leaf for j, leaf in enumerate(leaves)]
        names.add(fingerprint(jax.tree.unflatten(structure, changed)))
    assert len(names) == len(leaves) + 1


def test_the_same_numbers_elsewhere_or_in_another_shape_are_another_model(model):
    weight = model.embedding.weight[...]
    names = {fingerprint(model)}
    for changed in (weight[::-1], weight[:, ::-1], weight.reshape(weight.shape[::-1]), weight.astype(jnp.bfloat16)):
        other = jax.tree.map(lambda leaf: leaf, model)
        other.embedding.weight = nnx.Param(changed)
        names.add(fingerprint(other))
    assert len(names) == 5


def test_a_checksum_depends_on_every_bit_and_place():
    random = np.random.default_rng(0)
    array = random.normal(size=(5, 7)).astype(np.float32)
    sums = {tuple(np.asarray(_checksum(jnp.asarray(array))).tolist())}
    for bit in range(32):
        changed = array.view(np.uint32).copy()
        changed[2, 3] ^= np.uint32(1 << bit)
        sums.add(tuple(np.asarray(_checksum(jnp.asarray(changed))).tolist()))
    for _ in range(50):
        sums.add(tuple(np.asarray(_checksum(jnp.asarray(random.permutation(array.ravel()).reshape(5, 7)))).tolist()))
    swapped = array.copy()
    swapped[1, 2], swapped[2, 1] = array[2, 1], array[1, 2]
    sums.add(tuple(np.asarray(_checksum(jnp.asarray(swapped))).tolist()))
    assert len(sums) == 84


def test_extenders_do_not_count(model):
    assert fingerprint(apply_scaling(model, ScalingConfig(delta=0.5))) == fingerprint(model)


def test_a_sharded_model_is_the_same_model(model):
    expected = fingerprint(model)
    with jax.set_mesh(mesh(fsdp=2, tensor=2)):
        sharded = on_mesh(model)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
        assert fingerprint(sharded) == expected


def test_a_calibration_fits_only_its_own_model(model):
    calibration = calibrate(model, tokens(0, 1, 8))
    calibration.require_model(model)
    calibration.require_model(apply_scaling(model, ScalingConfig(delta=0.5)))
    with pytest.raises(ValueError, match=r"the calibration is of checkpoint [0-9a-f]{12}, but the model is"):
        calibration.require_model(language_model(pattern="M2", repeats=1, seed=1))
