"""Time and memory of reading one long prompt in chunks, by position: flat memory and a straight line are expected."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.generation import continue_prefill
from mamba_jax.models.language_model import LanguageModel
from train.errors import UsageError
from train.tasks.cell import Cell, Result
from train.tasks.reading import Reading
from train.tasks.text import Text


def cells(text: Text, *, length: int, chunk: int) -> list[Cell]:
    """The one cell: a prompt of this length.

    Raises:
        UsageError: it is shorter than two chunks.
    """
    if length < 2 * chunk:
        raise UsageError(f"--lengths {length}: growth shows from two chunks of --chunk {chunk} on; give more tokens.")
    return [
        Cell(
            key={"length": length, "chunk": chunk},
            length=length,
            tokens=length,
            measure=functools.partial(_measure, text, length, chunk),
        )
    ]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory in use by all that lives on the device, or where it does not tell, by the process."""

    what: str
    bytes_now: Callable[[], int]


def memory_of(device: Any) -> Memory:
    """How to ask for memory: of the device where it counts its bytes (GPUs do), else of the process."""
    if (device.memory_stats() or {}).get("bytes_in_use") is not None:
        return Memory(f"{device.device_kind}, in use", lambda: device.memory_stats()["bytes_in_use"])
    page = os.sysconf("SC_PAGE_SIZE")
    return Memory("the process, resident", lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page)


def _measure(text: Text, length: int, chunk: int, model: LanguageModel, reading: Reading) -> Result:
    if reading.chunk is None:
        raise UsageError(
            "--task prefill_scaling reads in chunks: leave out methods that see prompts whole (decimamba)."
        )
    device = jax.devices()[0]
    memory = memory_of(device)
    tokens = text.read(0, length // chunk * chunk)[None]
    # All is compiled and allocated on a state that is thrown away; the second call's comes from the first.
    state = model.init_state(1)
    for _ in range(2):
        state = jax.block_until_ready(_read(model, tokens[:, :chunk], state))
    state = model.init_state(1)
    positions, seconds, in_use = [], [], []
    began = time.perf_counter()
    for first in range(0, tokens.shape[1], chunk):
        state = jax.block_until_ready(_read(model, tokens[:, first : first + chunk], state))
        positions.append(first + chunk)
        seconds.append(time.perf_counter() - began)
        in_use.append(memory.bytes_now())
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "memory_of": memory.what,
        "positions": positions,
        "seconds": seconds,
        "bytes": in_use,
        "peak_bytes": peak,
    }


def _read(model: LanguageModel, tokens: np.ndarray, state):
    ones = jnp.ones(tokens.shape, jnp.int32)
    _, state = continue_prefill(model, jnp.asarray(tokens), ones, state, jnp.zeros((1,), bool))
    return state


def straightness(positions: list[int], seconds: list[float]) -> float:
    """Share of the variance of time that a straight line over position explains (R²)."""
    return float(np.corrcoef(positions, seconds)[0, 1] ** 2)
