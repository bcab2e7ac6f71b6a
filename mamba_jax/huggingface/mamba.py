"""Mamba-1 as in Hugging Face `transformers` (`MambaForCausalLM`) and in state-spaces/mamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_jax.huggingface import configs
from mamba_jax.huggingface import weights as published
from mamba_jax.huggingface.weights import LAYER, Parameter, Weights, convolution, flat, linear
from mamba_jax.mixers.mamba1 import Mamba1Config
from mamba_jax.models.language_model import LanguageModel, LanguageModelConfig

_MIXER = LAYER + "mixer."

# By the path of the parameter in our model.
_PARAMETERS = published.COMMON | {
    "blocks.mixer.in_proj.weight": linear(_MIXER + "in_proj.weight"),
    "blocks.mixer.in_proj.bias": flat(_MIXER + "in_proj.bias"),
    "blocks.mixer.conv_weight": convolution(_MIXER + "conv1d.weight"),
    "blocks.mixer.conv_bias": Parameter(_MIXER + "conv1d.bias"),
    "blocks.mixer.x_proj.weight": linear(_MIXER + "x_proj.weight"),
    "blocks.mixer.dt_proj.weight": linear(_MIXER + "dt_proj.weight"),
    "blocks.mixer.dt_bias": Parameter(_MIXER + "dt_proj.bias"),
    "blocks.mixer.A_log": Parameter(_MIXER + "A_log"),
    "blocks.mixer.D": Parameter(_MIXER + "D"),
    "blocks.mixer.out_proj.weight": linear(_MIXER + "out_proj.weight"),
    "blocks.mixer.out_proj.bias": Parameter(_MIXER + "out_proj.bias"),
}


def config_from(config: Mapping[str, Any]) -> LanguageModelConfig:
    """Settings of a model from its ``config.json``, in either family's form.

    Raises:
        ValueError: the file is of another model, or asks for what Mamba-1 here does not have.
    """
    if configs.is_state_spaces(config):
        return configs.from_state_spaces(config, "M", _state_spaces_mixer(config))
    configs.check_transformers(config, "mamba")
    width, expand = config["hidden_size"], config["expand"]
    if config.get("intermediate_size", expand * width) != expand * width:
        raise ValueError(f"intermediate_size = {config['intermediate_size']} is not expand x hidden_size.")
    mixer = Mamba1Config(
        expand=expand,
        state_size=config["state_size"],
        conv_width=config["conv_kernel"],
        delta_rank=config["time_step_rank"],
        delta_min=config["time_step_min"],
        delta_max=config["time_step_max"],
        delta_floor=config["time_step_floor"],
        conv_bias=config["use_conv_bias"],
        projection_bias=config["use_bias"],
    )
    return configs.from_transformers(config, "M", mixer)


def config_to(config: LanguageModelConfig) -> dict[str, Any]:
    """The ``config.json`` that `transformers` reads."""
    mixer = _only_mixer(config)
    return configs.to_transformers(config) | {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "intermediate_size": mixer.expand * config.width,
        "expand": mixer.expand,
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_width,
        "time_step_rank": mixer.delta_rank or -(-config.width // 16),
        "time_step_min": mixer.delta_min,
        "time_step_max": mixer.delta_max,
        "time_step_floor": mixer.delta_floor,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.projection_bias,
    }


def model_from(config: LanguageModelConfig, weights: Weights) -> LanguageModel:
    """A model with the weights of a checkpoint.

    Args:
        config: its settings, as from ``config_from``.
        weights: its arrays under their published names.

    Raises:
        ValueError: an array is missing, left over, or of another shape; the message names it.
    """
    _only_mixer(config)
    return published.model_from(config, weights, _PARAMETERS)


def weights_from(model: LanguageModel) -> dict[str, np.ndarray]:
    """The weights of a model under the names that `transformers` gives them; the opposite of ``model_from``."""
    _only_mixer(model.config)
    return published.weights_from(model, _PARAMETERS)


def _only_mixer(config: LanguageModelConfig) -> Mamba1Config:
    return published.only_mixer(config, Mamba1Config, "Mamba-1")


def _state_spaces_mixer(config: Mapping[str, Any]) -> Mamba1Config:
    settings = configs.state_spaces_settings(config, "Mamba1")
    rank = settings.get("dt_rank", "auto")
    return Mamba1Config(
        expand=settings.get("expand", 2),
        state_size=settings.get("d_state", 16),
        conv_width=settings.get("d_conv", 4),
        delta_rank=None if rank == "auto" else rank,
    )
