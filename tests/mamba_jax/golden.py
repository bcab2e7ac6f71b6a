"""Reads the golden values in tests/golden."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from mamba_jax.huggingface import mamba, mamba2
from mamba_jax.models.language_model import LanguageModel

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    """What `transformers` computed for a small random model; see tests/golden/record.py."""

    config: dict
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    input_ids: np.ndarray
    logits: np.ndarray
    loss: float
    continuation: np.ndarray


def load(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    return Golden(
        config=json.loads(str(arrays["config"])),
        weights=under("weights/"),
        gradients=under("gradients/"),
        input_ids=arrays["input_ids"],
        logits=arrays["logits"],
        loss=float(arrays["loss"]),
        continuation=arrays["continuation"],
    )


def load_model(name: str) -> tuple[Golden, LanguageModel]:
    """The golden values, and our model of the same config and weights, in float32."""
    expected = load(name)
    family = {"mamba": mamba, "mamba2": mamba2}[expected.config["model_type"]]
    config = dataclasses.replace(family.config_from(expected.config), compute_dtype="float32")
    return expected, family.model_from(config, expected.weights)
