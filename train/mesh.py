"""The mesh of devices a run uses, and how a batch comes onto it."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from mamba_jax.sharding import AXES, BATCH, SEQUENCE
from train.config import MeshConfig
from train.errors import UserError

_log = logging.getLogger(__name__)


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Makes a mesh with all five axes, each explicit, of the sizes in ``config``.

    Args:
        config: size of each axis; their product is the number of devices used.
        devices: devices to choose from, all that JAX sees by default. A single process may leave some unused, and
            says so; several may not, because each must have a part in every step.

    Raises:
        UserError: the mesh is larger than the devices, leaves some unused in a run of several processes, or divides
            the channels or the length of a sequence over processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    wanted = math.prod(sizes.values())
    product = " x ".join(f"Mesh.{axis} = {size}" for axis, size in sizes.items() if size > 1)
    processes = len({device.process_index for device in devices})
    if wanted > len(devices):
        raise UserError(
            f"the mesh ({product}) needs {wanted} devices, but JAX sees {len(devices)} ({devices[0].platform}): "
            "lower these sizes so that their product fits."
        )
    if wanted < len(devices):
        unused = (
            f"{len(devices) - wanted} of {len(devices)} devices are left unused: set Mesh.data or Mesh.fsdp to "
            f"{len(devices) // wanted} times what it is, so that the product of all Mesh sizes is {len(devices)}."
        )
        if processes > 1:
            raise UserError(f"{unused} Runs of several processes must use all of them.")
        _log.warning(unused)
    per_row, per_process = config.tensor * config.sequence, len(devices) // processes
    if processes > 1 and per_process % per_row:
        raise UserError(
            f"Mesh.tensor x Mesh.sequence = {per_row} does not divide the {per_process} devices of each process: these "
            "axes must lie within a process; use Mesh.fsdp to shard over processes."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Explicit,) * len(AXES), devices=devices[:wanted])


def shard_batch(
    mesh: Mesh, batch: Mapping[str, Shaped[np.ndarray, "rows length"]]
) -> dict[str, Shaped[Array, "batch length"]]:
    """Puts a batch onto the mesh: rows over replica, data and fsdp, length over sequence.

    Args:
        mesh: a mesh made by ``make_mesh``.
        batch: the rows that this process has read, its equal share of the global batch, in the order of processes.

    Returns:
        The arrays of the global batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH, SEQUENCE))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def initialize_distributed() -> None:
    """Connects the processes of a Slurm, Open MPI or Kubernetes job; does nothing elsewhere. Call it before any array.

    The job's own environment says who takes part and where the first process is.
    """
    if _is_in_cluster_job(os.environ) and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def _is_in_cluster_job(environment: Mapping[str, str]) -> bool:
    """Whether several processes were started as one job.

    A shell on a cluster has many of the same variables, and waiting there for other processes would never end; hence
    the count of this job step in Slurm, which the shell has not, and not the count of the allocation, which it has.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    ranks = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    in_indexed_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return tasks > 1 or ranks > 1 or (in_indexed_job and importlib.util.find_spec("kubernetes") is not None)
