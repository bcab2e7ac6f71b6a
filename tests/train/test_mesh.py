from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mamba_jax.sharding import AXES
from train import mesh as mesh_module
from train.config import MeshConfig
from train.errors import UserError
from train.mesh import initialize_distributed, make_mesh, shard_batch


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    platform: str = "gpu"


def devices_of(processes: int, each: int) -> list[FakeDevice]:
    return [FakeDevice(i, i // each) for i in range(processes * each)]


def test_a_mesh_has_every_axis_in_order_and_all_are_explicit():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_a_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(
        UserError, match=r"Mesh\.data = 4 x Mesh\.tensor = 4\) needs 16 devices, but JAX sees 8 \(cpu\)"
    ):
        make_mesh(MeshConfig(data=4, tensor=4))


def test_one_process_may_leave_devices_unused_and_says_so(caplog):
    mesh = make_mesh(MeshConfig(fsdp=2))
    assert mesh.devices.size == 2
    assert "6 of 8 devices are left unused" in caplog.text
    assert "4 times" in caplog.text


def test_a_mesh_of_all_devices_says_nothing(caplog):
    make_mesh(MeshConfig(fsdp=8))
    assert not caplog.records


@pytest.mark.usefixtures("no_shape_checks")  # fake devices are not of JAX's type
def test_several_processes_must_use_all_devices():
    with pytest.raises(UserError, match="Runs of several processes must use all of them"):
        make_mesh(MeshConfig(data=4), devices_of(processes=2, each=4))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_rows_of_a_batch_are_never_divided_over_processes(axis):
    with pytest.raises(UserError, match="does not divide the 4 devices of each process"):
        make_mesh(MeshConfig(**{axis: 8}), devices_of(processes=2, each=4))


def test_a_batch_is_divided_by_rows_and_length():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    tokens = np.random.default_rng(0).integers(0, 256, (8, 6), np.int32)
    batch = shard_batch(mesh, {"tokens": tokens, "loss_weights": tokens.astype(np.float32)})
    assert batch["tokens"].sharding.spec == PartitionSpec(("replica", "data", "fsdp"), "sequence")
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], tokens)
    assert batch["loss_weights"].dtype == np.float32


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),  # a shell inside an allocation
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_processes_connect_only_when_several_were_started_as_one_job(environment, expected):
    assert mesh_module._is_in_cluster_job(environment) is expected


def test_nothing_is_initialized_outside_a_cluster_job(monkeypatch):
    monkeypatch.setattr(mesh_module.os, "environ", {})
    initialize_distributed()
    assert not jax.distributed.is_initialized()


def test_two_processes_make_one_batch_of_their_rows():
    """Started as Slurm would start them, each with two CPU devices and half of the rows."""
    program = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from train.config import MeshConfig
from train.mesh import initialize_distributed, make_mesh, shard_batch
initialize_distributed()
assert jax.process_count() == 2
tokens = np.arange(32, dtype=np.int32).reshape(8, 4)
mine = tokens[jax.process_index() * 4 :][:4]
batch = shard_batch(make_mesh(MeshConfig(data=2, sequence=2)), {"tokens": mine})["tokens"]
assert batch.shape == (8, 4)
for shard in batch.addressable_shards:
    np.testing.assert_array_equal(shard.data, tokens[shard.index])
"""
    job = {
        "JAX_PLATFORMS": "cpu",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
    }
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | job | rank, stderr=subprocess.PIPE, text=True
        )
        for rank in ranks
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
