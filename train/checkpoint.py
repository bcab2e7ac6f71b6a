"""Checkpoints: everything a run needs to go on as if it had never stopped, and a model to be used elsewhere.

A checkpoint is one folder, ``checkpoints/STEP``, that appears whole or not at all. Inside, Orbax keeps four items: the
state (arrays by name, in shards), the position in the data, the config with the tokenizer, and checksums of the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from mamba_jax.models.language_model import LanguageModel
from train.config import CheckpointConfig, Experiment
from train.errors import UserError
from train.settings import from_json, to_json
from train.workdir import CHECKPOINTS, DAMAGED, claim

_log = logging.getLogger(__name__)

_METRIC = "eval_loss"
"""The lower, the better a checkpoint."""

_NOT_DAMAGE = (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
"""What may go wrong while reading a checkpoint that has nothing wrong with it."""


@runtime_checkable
class DataIterator(Protocol):
    """The part of ``grain.DatasetIterator`` that checkpoints need; the state is made of what JSON has."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves a run's state in the background and finds the newest good one again.

    Use it as a context manager: leaving it waits for the last save. Every process of a run makes one, and calls each
    method at the same step.
    """

    def __init__(self, workdir: Path, experiment: Experiment, *, tokenizer: Mapping[str, Any], overwrite: bool = False):
        """Claims the workdir for this run.

        Args:
            workdir: folder of the run, made where there is none.
            experiment: config of the run, saved with each checkpoint.
            tokenizer: description of the tokenizer, saved with the config so that a model can be used without its data.
            overwrite: delete the run that the folder holds.

        Raises:
            UserError: the folder cannot be written, or holds something else; see ``workdir.claim``.
        """
        workdir = Path(os.path.abspath(workdir))
        if jax.process_index() == 0:
            claim(workdir, experiment, overwrite=overwrite)
        _wait_for_all_processes("claimed")
        self._workdir = workdir
        self._folder = workdir / CHECKPOINTS
        self._config = {"experiment": to_json(experiment), "tokenizer": tokenizer}
        self._manager = ocp.CheckpointManager(self._folder, options=_options(experiment.checkpoint))

    def save(
        self, step: int, state: Any, data_iterator: DataIterator, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copies the state and writes it in the background; its arrays may be donated right after.

        Args:
            step: number of the last step the state has seen.
            state: pytree of arrays.
            data_iterator: its position is saved.
            metrics: results of an evaluation at this step; the best by ``eval_loss`` are kept.

        Raises:
            UserError: this or the last checkpoint could not be written.
        """
        named = _named_leaves(state)
        checksums = dict(zip(named, jax.device_get(_checksums(list(named.values()))).tolist(), strict=True))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(named),
            data=ocp.args.JsonSave(data_iterator.get_state()),
            config=ocp.args.JsonSave(self._config),
            checksums=ocp.args.JsonSave(checksums),
        )
        best_by = None if metrics is None else {_METRIC: metrics[_METRIC]}
        try:
            self._manager.save(step, args=items, metrics=best_by, force=True)
        except Exception as error:
            raise self._save_error(error) from error

    def restore_latest[Tree](self, abstract_state: Tree, data_iterator: DataIterator) -> tuple[int, Tree] | None:
        """Reads the newest checkpoint that is whole, and moves damaged newer ones out of the way.

        Args:
            abstract_state: state in ``jax.ShapeDtypeStruct``, as ``jax.eval_shape`` gives it. Arrays come onto the
                current mesh as its shardings say, whatever mesh they were saved from.
            data_iterator: put to the saved position.

        Returns:
            The step and the state, or None where no checkpoint was saved yet.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        steps = _saved_steps(self._folder)
        if not steps:
            return None
        step, state = _newest_whole(self._folder, steps, lambda step: _read_state(self._manager, step, abstract_state))
        data_iterator.set_state(_read_json(self._manager, step, "data"))
        self._set_aside([newer for newer in steps if newer > step])
        _log.info("resuming from the checkpoint of step %d in %s", step, self._folder)
        return step, state

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            UserError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._save_error(error) from error

    def close(self) -> None:
        """Waits for the last save and frees what the checkpointer holds; errors are those of ``wait``."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as save_error:
            if error is None:
                raise
            _log.error("%s", save_error)  # what ended the run comes first

    def _set_aside(self, damaged: list[int]) -> None:
        """Moves checkpoints to where they are out of the way of new ones, and can still be looked at."""
        if not damaged:
            return
        if jax.process_index() == 0:
            folder = self._workdir / DAMAGED
            folder.mkdir(exist_ok=True)
            for step in damaged:
                attempt = sum(path.name.split(".")[0] == str(step) for path in folder.iterdir())
                (self._folder / str(step)).rename(folder / (f"{step}.{attempt}" if attempt else str(step)))
        _wait_for_all_processes("set_aside")
        self._manager.reload()

    def _save_error(self, error: Exception) -> UserError:
        steps = _saved_steps(self._folder)
        intact = (
            f"The checkpoint of step {steps[0]} is intact: make room there, and the same command goes on from it."
            if steps
            else "No checkpoint was saved before."
        )
        return UserError(f"a checkpoint could not be written to {self._folder}: {_first_line(error)}. {intact}")


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """Checkpoints of one run, to evaluate or to generate from."""

    experiment: Experiment
    """The config of the run."""
    tokenizer: Mapping[str, Any]
    """Description of the tokenizer."""
    folder: Path
    """Folder of the checkpoints."""
    steps: tuple[int, ...]
    """Checkpoints to take the first whole one of."""

    def restore[Tree](self, abstract_model: Tree) -> tuple[int, Tree]:
        """Reads the parameters: their moving average where the run kept one, as in the run's own evaluations.

        Args:
            abstract_model: the model in ``jax.ShapeDtypeStruct``, as ``jax.eval_shape`` gives it; arrays come onto the
                current mesh.

        Returns:
            The step of the checkpoint and the model.

        Raises:
            UserError: all checkpoints are damaged.
        """
        part = "model" if self.experiment.train.ema_decay is None else "ema"
        with _open(self.folder) as manager:
            step, state = _newest_whole(
                self.folder, self.steps, lambda step: _read_state(manager, step, {part: abstract_model})
            )
        return step, state[part]

    def restore_model(self) -> tuple[int, LanguageModel]:
        """The model that the run trained, after the step of the checkpoint; as ``restore``."""
        return self.restore(jax.eval_shape(lambda: self.experiment.model.build(nnx.Rngs(0))))


def load_for_inference(checkpoint: Path) -> TrainedModel:
    """Opens a trained model.

    Args:
        checkpoint: a run's workdir, whose newest whole checkpoint is taken, or the folder of one checkpoint in it.

    Raises:
        UserError: there is no checkpoint there, or none that is whole.
    """
    checkpoint = Path(os.path.abspath(checkpoint))
    folder, steps = checkpoint / CHECKPOINTS, _saved_steps(checkpoint / CHECKPOINTS)
    if not steps and checkpoint.name.isdigit() and (checkpoint / "state").is_dir():
        folder, steps = checkpoint.parent, [int(checkpoint.name)]
    if not steps:
        raise UserError(f"{checkpoint} is neither the workdir of a run with checkpoints nor one of its checkpoints.")
    with _open(folder) as manager:
        _, config = _newest_whole(folder, steps, lambda step: _read_json(manager, step, "config"))
    return TrainedModel(from_json(config["experiment"]), config["tokenizer"], folder, tuple(steps))


def _options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    def score(metrics: Mapping[str, float]) -> float:
        return metrics[_METRIC] if math.isfinite(metrics[_METRIC]) else math.inf

    newest = checkpoint_managers.LatestN(n=config.keep_last)
    best = checkpoint_managers.BestN(
        get_metric_fn=score, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False
    )
    return ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies=[newest, best]),
        best_fn=score,  # without it metrics are not kept
        best_mode="min",
        cleanup_tmp_directories=True,
    )


def _open(folder: Path) -> ocp.CheckpointManager:
    """A manager that only reads."""
    return ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    )


def _saved_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, newest first; unfinished ones have longer names."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def _newest_whole[Result](folder: Path, steps: Sequence[int], read: Callable[[int], Result]) -> tuple[int, Result]:
    """The first step that can be read, and what was read.

    Raises:
        UserError: none can be.
    """
    for step in steps:
        try:
            return step, read(step)
        except _NOT_DAMAGE:
            raise
        except Exception as error:  # Orbax raises all sorts of errors for files that are not as it wrote them
            reason = _first_line(error)
            _log.warning("the checkpoint %s is damaged (%s); trying the one before it", folder / str(step), reason)
    raise UserError(f"no checkpoint in {folder} can be read; the reasons stand above. --overwrite starts the run anew.")


def _read_json(manager: ocp.CheckpointManager, step: int, item: str) -> Any:
    return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]


def _read_state[Tree](manager: ocp.CheckpointManager, step: int, abstract_state: Tree) -> Tree:
    """Reads the arrays that ``abstract_state`` names, and no others, onto the current mesh."""
    _quieten_abandoned_reads()
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on_current_mesh(leaf.sharding))
        for name, leaf in _named_leaves(abstract_state).items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    arrays = manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=True)),
    )["state"]
    saved = _read_json(manager, step, "checksums")
    found = jax.device_get(_checksums([arrays[name] for name in targets]))
    changed = [name for name, checksum in zip(targets, found, strict=True) if saved[name] != checksum]
    if changed:
        raise ValueError(f"{len(changed)} arrays are not as they were written, {changed[0]} among them")
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in targets])


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by a name that does not depend on how Flax wraps them: ``model.blocks.0.mixer.A_log``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


@jax.jit
def _checksums(arrays: list[jax.Array]) -> jax.Array:
    """Sum of each array's words, modulo 2**32: it does not depend on how an array is sharded."""
    return jnp.stack([jnp.sum(_words(array).astype(jnp.uint32), dtype=jnp.uint32) for array in arrays])


def _words(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == bool:
        return array
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag])
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}"))


@functools.cache
def _quieten_abandoned_reads() -> None:
    """Drops the tracebacks of reads that Orbax leaves to themselves once another array could not be read."""
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others
    logging.getLogger("asyncio").addFilter(lambda record: "async_deserialize" not in record.getMessage())


def _on_current_mesh(sharding: Sharding | None) -> Sharding:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec())


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"mamba_jax.checkpoint.{name}")


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.partition(" [")[0]  # TensorStore appends its whole specification in brackets
