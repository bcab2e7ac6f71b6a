"""Mamba-2 as in Hugging Face `transformers` (`Mamba2ForCausalLM`) and in state-spaces/mamba."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_jax.huggingface import configs
from mamba_jax.huggingface import weights as published
from mamba_jax.huggingface.weights import LAYER, Parameter, Weights, convolution, flat, linear
from mamba_jax.mixers.mamba2 import Mamba2Config
from mamba_jax.models.language_model import LanguageModel, LanguageModelConfig

_MIXER = LAYER + "mixer."


def config_from(config: Mapping[str, Any]) -> LanguageModelConfig:
    """Settings of a model from its ``config.json``, in either family's form.

    The size of the chunks is not among them: it changes no result, and the scan knows better what suits the hardware.

    Raises:
        ValueError: the file is of another model, or asks for what Mamba-2 here does not have.
    """
    if configs.is_state_spaces(config):
        return configs.from_state_spaces(config, "2", _state_spaces_mixer(config))
    configs.check_transformers(config, "mamba2")
    heads, head_dim, channels = config["num_heads"], config["head_dim"], config["expand"] * config["hidden_size"]
    if heads * head_dim != channels:
        raise ValueError(f"num_heads = {heads} cannot be converted: with head_dim {head_dim} it is not {channels}.")
    least, most = map(_number, config["time_step_limit"])
    mixer = Mamba2Config(
        expand=config["expand"],
        head_dim=head_dim,
        state_size=config["state_size"],
        groups=config["n_groups"],
        conv_width=config["conv_kernel"],
        delta_min=config["time_step_min"],
        delta_max=config["time_step_max"],
        delta_floor=config["time_step_floor"],
        delta_limit_min=least,
        delta_limit_max=None if math.isinf(most) else most,
        norm_epsilon=config["layer_norm_epsilon"],
        conv_bias=config["use_conv_bias"],
        projection_bias=config["use_bias"],
    )
    return configs.from_transformers(config, "2", mixer)


def config_to(config: LanguageModelConfig) -> dict[str, Any]:
    """The ``config.json`` that `transformers` reads.

    Raises:
        ValueError: the model is not a Mamba-2, or one that `transformers` cannot compute.
    """
    mixer = _only_mixer(config)
    if mixer.norm_epsilon != config.norm_epsilon:
        raise ValueError(
            f"Mamba2.norm_epsilon = {mixer.norm_epsilon} cannot be written: `transformers` has one for all norms "
            f"(LanguageModel.norm_epsilon = {config.norm_epsilon})."
        )
    return configs.to_transformers(config) | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "expand": mixer.expand,
        "num_heads": mixer.num_heads(config.width),
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_size,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv_width,
        "time_step_min": mixer.delta_min,
        "time_step_max": mixer.delta_max,
        "time_step_floor": mixer.delta_floor,
        "time_step_limit": [_tagged(limit) for limit in mixer.delta_limit],
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
    return published.model_from(config, weights, _parameters(_only_mixer(config)))


def weights_from(model: LanguageModel) -> dict[str, np.ndarray]:
    """The weights of a model under the names that `transformers` gives them; the opposite of ``model_from``."""
    return published.weights_from(model, _parameters(_only_mixer(model.config)))


def _only_mixer(config: LanguageModelConfig) -> Mamba2Config:
    return published.only_mixer(config, Mamba2Config, "Mamba-2")


def _state_spaces_mixer(config: Mapping[str, Any]) -> Mamba2Config:
    settings = configs.state_spaces_settings(config, "Mamba2")
    return Mamba2Config(
        expand=settings.get("expand", 2),
        head_dim=settings.get("headdim", 64),
        state_size=settings.get("d_state", 128),
        groups=settings.get("ngroups", 1),
        conv_width=settings.get("d_conv", 4),
    )


def _number(value: Any) -> float:
    """JSON has no infinity: `transformers` writes it as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _tagged(value: float) -> Any:
    return {"__float__": "Infinity"} if math.isinf(value) else value


def _parameters(mixer: Mamba2Config) -> dict[str, Parameter]:
    """By the path of the parameter in our model. Published are z, x, B, C and delta as one array."""

    def by_group(parameter: Parameter) -> Parameter:
        """Published are B of all groups, then C of all; ours are B and C of each group."""

        def swap(rows: np.ndarray, first: int, second: int) -> np.ndarray:
            blocks = rows.reshape(first, second, mixer.state_size, *rows.shape[1:])
            return blocks.swapaxes(0, 1).reshape(rows.shape)

        return dataclasses.replace(
            parameter,
            ours=lambda theirs, shape: parameter.ours(swap(theirs, 2, mixer.groups), shape),
            theirs=lambda ours: swap(parameter.theirs(ours), mixer.groups, 2),
        )

    return published.COMMON | {
        "blocks.mixer.zx_proj.weight": linear(_MIXER + "in_proj.weight"),
        "blocks.mixer.BC_proj.weight": by_group(linear(_MIXER + "in_proj.weight")),
        "blocks.mixer.dt_proj.weight": linear(_MIXER + "in_proj.weight"),
        "blocks.mixer.zx_proj.bias": flat(_MIXER + "in_proj.bias"),
        "blocks.mixer.BC_proj.bias": by_group(flat(_MIXER + "in_proj.bias")),
        "blocks.mixer.dt_proj.bias": flat(_MIXER + "in_proj.bias"),
        "blocks.mixer.conv_x.weight": convolution(_MIXER + "conv1d.weight"),
        "blocks.mixer.conv_BC.weight": by_group(convolution(_MIXER + "conv1d.weight")),
        "blocks.mixer.conv_x.bias": flat(_MIXER + "conv1d.bias"),
        "blocks.mixer.conv_BC.bias": by_group(flat(_MIXER + "conv1d.bias")),
        "blocks.mixer.dt_bias": Parameter(_MIXER + "dt_bias"),
        "blocks.mixer.A_log": Parameter(_MIXER + "A_log"),
        "blocks.mixer.D": Parameter(_MIXER + "D"),
        "blocks.mixer.norm.weight": flat(_MIXER + "norm.weight"),
        "blocks.mixer.out_proj.weight": linear(_MIXER + "out_proj.weight"),
        "blocks.mixer.out_proj.bias": Parameter(_MIXER + "out_proj.bias"),
    }
