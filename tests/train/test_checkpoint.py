from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mamba_jax import sharding
from mamba_jax.models.language_model import LanguageModelConfig
from train.checkpoint import Checkpointer, load_for_inference
from train.config import CheckpointConfig, Experiment, MeshConfig, OptimizerConfig, TrainConfig
from train.errors import UserError
from train.mesh import make_mesh
from train.settings import without_unused_layers

DEFAULT = Experiment()
open_run = functools.partial(Checkpointer, tokenizer={"kind": "bytes"})


class Layer(nnx.Module):
    def __init__(self, key: jax.Array, width: int):
        shape, axes = (width, width), (sharding.FSDP, sharding.TENSOR)
        spec = sharding.partition_spec(shape, axes)
        weight = jax.random.normal(key, shape)
        self.weight = nnx.Param(jax.sharding.reshard(weight, spec) if sharding.explicit_axes() else weight)
        self.width = width


class Model(nnx.Module):
    def __init__(self, seed: int, width: int):
        keys = jax.random.split(jax.random.key(seed), 3)
        self.layers = nnx.List([jax.vmap(lambda key: Layer(key, width))(keys)])
        self.norm = nnx.Param(jnp.ones((width,), jnp.bfloat16))
        self.head = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    model: Model
    optimizer: Any
    ema: Model | None
    key: jax.Array
    skipped: jax.Array
    poles: jax.Array


def make_state(seed: int, width: int = 8) -> State:
    model = Model(seed, width)
    return State(
        step=jnp.asarray(seed, jnp.int32),
        model=model,
        optimizer=optax.adamw(1e-3).init(model),
        ema=Model(seed + 1, width),
        key=jax.random.key(seed),
        skipped=jnp.asarray(True),
        poles=jax.lax.complex(jnp.arange(3.0), jnp.full(3, seed, jnp.float32)),
    )


def plain(tree: Any) -> list[np.ndarray]:
    """Leaves as NumPy arrays, typed keys as their data."""
    leaves = jax.tree.leaves(tree)
    keys = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves)
    return [np.asarray(x) for x in keys]


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(plain(found), plain(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def batches() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).batch(4).to_iter_dataset())


@pytest.fixture
def save(tmp_path):
    """Saves states of the given steps, each with its step as the seed and that many batches read."""

    def save(*steps: int, experiment: Experiment = DEFAULT, losses: dict[int, float] | None = None) -> Path:
        data = batches()
        with open_run(tmp_path / "run", experiment) as checkpointer:
            for step in steps:
                next(data)
                loss = (losses or {}).get(step)
                checkpointer.save(step, make_state(step), data, None if loss is None else {"eval_loss": loss})
        return tmp_path / "run"

    return save


def restore(workdir: Path, experiment: Experiment = DEFAULT, data: Any = None):
    with open_run(workdir, experiment) as checkpointer:
        abstract = jax.eval_shape(functools.partial(make_state, 0))
        return checkpointer.restore_latest(abstract, batches() if data is None else data)


def saved_steps(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def test_there_is_nothing_to_restore_in_a_new_run(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_newest_state_and_position_in_the_data_come_back(save):
    workdir = save(1, 2)
    data, expected = batches(), batches()
    step, state = restore(workdir, data=data)
    assert step == 2
    assert_equal(state, make_state(2))
    for _ in range(2):
        next(expected)
    np.testing.assert_array_equal(next(data), next(expected))


def test_a_checkpoint_holds_the_state_as_it_was_when_saved(tmp_path):
    """The arrays are donated while the save is still under way, as the training loop does."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    make = jax.jit(lambda: [jnp.arange(2.0**22), jnp.arange(2.0**20)])
    with open_run(tmp_path / "run", DEFAULT) as checkpointer:
        state = make()
        checkpointer.save(1, state, batches())
        for _ in range(5):
            state = overwrite(state)
        checkpointer.wait()
        assert_equal(checkpointer.restore_latest(jax.eval_shape(make), batches())[1], make())


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
def test_a_state_comes_back_onto_another_mesh(tmp_path, sizes):
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        state = jax.jit(functools.partial(make_state, 5))()
        with open_run(tmp_path / "run", DEFAULT) as checkpointer:
            checkpointer.save(5, state, batches())
    make = jax.jit(functools.partial(make_state, 5))
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        _, found = restore(tmp_path / "run")
        assert_equal(found, state)
        weight, expected = found.model.layers[0].weight[...], make().model.layers[0].weight[...]
        assert weight.sharding == expected.sharding
        assert weight.sharding.spec != PartitionSpec() or "data" in sizes
    assert_equal(restore(tmp_path / "run")[1], state)


def test_the_newest_and_the_best_are_kept(save):
    experiment = Experiment(checkpoint=CheckpointConfig(keep_last=2, keep_best=1))
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 5: 2.0}
    assert saved_steps(save(1, 2, 3, 4, 5, 6, experiment=experiment, losses=losses)) == {"2", "5", "6"}


def corrupt_by_truncation(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def corrupt_by_one_bit(folder: Path) -> None:
    """In each file that array data may be in."""
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


def corrupt_by_loss(folder: Path) -> None:
    (folder / "state" / "manifest.ocdbt").unlink()


def corrupt_by_emptying(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.parametrize("corrupt", [corrupt_by_truncation, corrupt_by_one_bit, corrupt_by_loss, corrupt_by_emptying])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(save, corrupt, caplog):
    workdir = save(1, 2)
    corrupt(workdir / "checkpoints" / "2")
    data = batches()
    step, state = restore(workdir, data=data)
    assert step == 1
    assert_equal(state, make_state(1))
    assert "checkpoints/2 is damaged" in caplog.text
    with open_run(workdir, DEFAULT) as checkpointer:
        checkpointer.save(2, make_state(2), data)
    assert restore(workdir)[0] == 2
    assert (workdir / "damaged" / "2").is_dir()


def test_one_wrong_bit_in_a_number_is_damage(tmp_path, caplog):
    """Orbax itself only checks what lies around the numbers."""
    # Random bits cannot be packed: the file holds them as they are, and unpacking it cannot see that one has changed.
    numbers = np.random.default_rng(0).integers(2**32, size=2**16, dtype=np.uint32)
    state = {"x": jnp.asarray(numbers)}
    with open_run(tmp_path, DEFAULT) as checkpointer:
        checkpointer.save(1, state, batches())
        checkpointer.save(2, state, batches())
    data = max((tmp_path / "checkpoints" / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[content.index(numbers[1000].tobytes())] ^= 1
    data.write_bytes(content)
    with open_run(tmp_path, DEFAULT) as checkpointer:
        assert checkpointer.restore_latest(jax.eval_shape(lambda: state), batches())[0] == 1
    assert "1 arrays are not as they were written, x among them" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(save):
    workdir = save(1, 2)
    corrupt_by_emptying(workdir / "checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        restore(workdir)
    assert saved_steps(workdir) == {"1", "2"}


def test_a_position_that_does_not_fit_the_data_is_no_damage(save):
    class OtherData:
        def get_state(self):
            return {}

        def set_state(self, state):
            raise UserError("other data")

    workdir = save(1, 2)
    with pytest.raises(UserError, match="other data"):
        restore(workdir, data=OtherData())
    assert saved_steps(workdir) == {"1", "2"}


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(save):
    workdir = save(1)
    program = """
import os, sys, threading, time
from pathlib import Path
import jax.numpy as jnp
from train.checkpoint import Checkpointer
from train.config import Experiment
class Data:
    def get_state(self): return {}
folder = Path(sys.argv[1]) / "checkpoints"
def kill_when_begun():
    while not any(not path.name.isdigit() for path in folder.iterdir()): pass
    os.kill(os.getpid(), 9)
threading.Thread(target=kill_when_begun).start()
checkpointer = Checkpointer(folder.parent, Experiment(), tokenizer={})
checkpointer.save(2, {"x": jnp.arange(2.0**22)}, Data())
checkpointer.wait()
"""
    killed = subprocess.run([sys.executable, "-c", program, str(workdir)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert killed.returncode == -9
    assert saved_steps(workdir) > {"1"}  # a part of the second is there
    assert restore(workdir)[0] == 1
    assert saved_steps(workdir) == {"1"}


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(save):
    workdir = save(1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    too_large = {"x": jax.random.normal(jax.random.key(0), (2**20,))}
    try:
        checkpointer = open_run(workdir, DEFAULT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))
        checkpointer.save(2, too_large, batches())
        checkpointer.close()
    except UserError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(workdir / "checkpoints") in message
    assert "The checkpoint of step 1 is intact" in message
    assert restore(workdir)[0] == 1


def test_a_model_is_loaded_with_nothing_but_its_folder(save):
    # Of the layers, what is written keeps those in the pattern.
    model = without_unused_layers(LanguageModelConfig())
    experiment = Experiment(train=TrainConfig(seed=7), model=model)
    workdir = save(3, 12, experiment=experiment)
    for folder, step in ((workdir, 12), (workdir / "checkpoints" / "3", 3)):
        trained = load_for_inference(folder)
        assert trained.experiment == experiment
        found_step, model = trained.restore(jax.eval_shape(lambda: Model(0, 8)))
        assert found_step == step
        assert_equal(model, Model(step, 8))


def test_a_model_is_loaded_from_the_moving_average_where_there_is_one(save):
    workdir = save(3, experiment=Experiment(train=TrainConfig(ema_decay=0.9)))
    _, model = load_for_inference(workdir).restore(jax.eval_shape(lambda: Model(0, 8)))
    assert_equal(model, Model(4, 8))


def test_a_model_is_loaded_from_the_checkpoint_before_a_damaged_one(save):
    workdir = save(1, 2)
    corrupt_by_one_bit(workdir / "checkpoints" / "2")
    step, model = load_for_inference(workdir).restore(jax.eval_shape(lambda: Model(0, 8)))
    assert step == 1
    assert_equal(model, Model(1, 8))
    assert saved_steps(workdir) == {"1", "2"}


def test_the_tokenizer_is_saved_with_the_model(tmp_path):
    with open_run(tmp_path / "run", Experiment(), tokenizer={"kind": "bytes"}) as checkpointer:
        checkpointer.save(1, make_state(1), batches())
    assert load_for_inference(tmp_path / "run").tokenizer == {"kind": "bytes"}


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="neither the workdir of a run with checkpoints nor one of its checkpoints"):
            load_for_inference(folder)


def test_a_model_of_another_shape_is_refused(save):
    with pytest.raises(UserError, match="no checkpoint in"):
        load_for_inference(save(1)).restore(jax.eval_shape(lambda: Model(0, 16)))


def test_a_workdir_of_another_config_is_refused_with_what_differs(save):
    workdir = save(1, experiment=Experiment(optimizer=OptimizerConfig(learning_rate=0.001)))
    other = Experiment(optimizer=OptimizerConfig(learning_rate=0.002))
    with pytest.raises(UserError, match="--overwrite") as caught:
        open_run(workdir, other)
    assert f"Optimizer.learning_rate: 0.001 in {workdir}, 0.002 now" in str(caught.value)
    assert saved_steps(workdir) == {"1"}


def test_settings_that_decide_nothing_may_change_on_resuming(save):
    workdir = save(1)
    other = Experiment(
        train=TrainConfig(log_every=1), checkpoint=CheckpointConfig(every_steps=7), mesh=MeshConfig(fsdp=8)
    )
    assert restore(workdir, other)[0] == 1
    assert json.loads((workdir / "config.json").read_text())["Train"]["log_every"] == 1


def test_overwriting_removes_the_run_and_nothing_else(save):
    workdir = save(1)
    (workdir / "notes.txt").write_text("mine")
    with open_run(workdir, Experiment(train=TrainConfig(seed=1)), overwrite=True) as checkpointer:
        assert checkpointer.restore_latest(jax.eval_shape(functools.partial(make_state, 0)), batches()) is None
    assert (workdir / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="touched"):
            open_run(tmp_path, Experiment(), overwrite=overwrite)
    assert (tmp_path / "checkpoints" / "thesis.tex").exists()


def test_only_runs_are_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite deletes runs of mamba-jax only"):
        open_run(tmp_path, DEFAULT, overwrite=True)
    open_run(tmp_path, DEFAULT).close()  # other files in the way of nothing do no harm


@pytest.mark.parametrize("content", ["", "{", "[]", '{"Train": 3}', '{"LanguageModel": {"layers": {"M": 3}}}'])
def test_a_workdir_with_a_damaged_config_is_refused(save, content):
    workdir = save(1)
    (workdir / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_run(workdir, DEFAULT)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=r"cannot write to the workdir .* Give another one with --workdir"):
            open_run(workdir, DEFAULT)
