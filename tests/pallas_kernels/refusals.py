"""What kernels of matrix products in bfloat16 refuse, as tests that an operator's test class inherits."""

from __future__ import annotations

import types
from typing import Any

import jax
import pytest


class RefusalContract:
    """Inherit, say what follows, and the refusals of an operator's kernels are held to the same words."""

    kernels: Any
    """The module of the implementation."""
    options: dict[str, Any]
    """Of a call that they run on a Hopper GPU."""

    def inputs(self) -> Any:
        """Returns the inputs of such a call."""
        raise NotImplementedError

    def reason(self, *, inputs=None, **options):
        return self.kernels.unsupported_reason(inputs or self.inputs(), **self.options | options)

    @pytest.mark.parametrize(("name", "dtype"), [("x", "float32"), ("B", "float32"), ("C", "float16")])
    def test_other_dtypes_are_left_to_xla(self, name, dtype):
        inputs = self.inputs()
        inputs = inputs._replace(**{name: getattr(inputs, name).astype(dtype)})
        expected = f"x, B and C must be bfloat16, {name} is {dtype}; implementation='xla' computes in float32"
        assert self.reason(inputs=inputs) == expected

    def test_other_chunk_sizes_are_left_to_xla(self):
        assert self.reason(chunk_size=32) == "chunk_size must be None or 64, got 32; implementation='xla' takes any"

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    def test_a_cpu_is_named_as_what_is_missing(self):
        assert self.reason() == "it needs an NVIDIA GPU, the default device is a cpu"

    def test_gpus_without_matrix_instructions_of_warpgroups_are_named(self, monkeypatch):
        device = types.SimpleNamespace(platform="gpu", compute_capability="10.0", device_kind="NVIDIA B200")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        assert self.reason() == "it needs compute capability 9.0 (Hopper), NVIDIA B200 has 10.0"

    def test_a_hopper_gpu_is_all_they_need(self, monkeypatch):
        device = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        assert self.reason() is None
