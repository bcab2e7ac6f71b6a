"""What a benchmark measures."""

from __future__ import annotations

from benchmarks import peers
from benchmarks.suites import FULL, cases


def test_beside_the_kernels_xla_is_measured_at_every_other_length_from_the_first_to_the_last():
    lengths = {"mosaic_gpu": [], "xla": []}
    for case in cases(FULL, ["ssd"], ["length"], on_gpu=True):
        if case.operator.name == "ssd" and case.direction == "backward":
            lengths[case.implementation].append(case.shape["length"])
    assert lengths == {
        "mosaic_gpu": [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072],
        "xla": [512, 2048, 8192, 32768, 131072],
    }


def test_a_cuda_package_is_measured_where_it_is_installed(monkeypatch):
    def implementations(on_gpu):
        return {case.implementation for case in cases(FULL, ["ssd"], ["shapes"], on_gpu=on_gpu)}

    assert implementations(on_gpu=True) == {"mosaic_gpu", "xla"}
    monkeypatch.setattr(peers, "package", {"ssd": "mamba_ssm"}.get)
    assert implementations(on_gpu=True) == {"mosaic_gpu", "xla", "mamba_ssm"}
    assert implementations(on_gpu=False) == {"xla"}
