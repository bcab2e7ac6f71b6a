"""What the ``config.json`` of every family says of the model around the mixers, in both forms that are in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mamba_jax.mixers import MixerConfig
from mamba_jax.models.language_model import LanguageModelConfig


def is_state_spaces(config: Mapping[str, Any]) -> bool:
    """Whether it is in the form of state-spaces/mamba, not in that of `transformers`."""
    return "d_model" in config


def check_transformers(config: Mapping[str, Any], model_type: str) -> None:
    """Raises a ValueError if the model is of another type, or asks for what no mixer here does."""
    if config.get("model_type") != model_type:
        raise ValueError(f"config.json is of a {config.get('model_type')!r} model, not of a {model_type!r} one.")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act = {config['hidden_act']!r} cannot be converted: only 'silu'.")


def from_transformers(config: Mapping[str, Any], letter: str, mixer: MixerConfig) -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        pattern=letter,
        repeats=config["num_hidden_layers"],
        layers={letter: mixer},
        norm_epsilon=config["layer_norm_epsilon"],
        tie_embeddings=config.get("tie_word_embeddings", True),
        residual_in_float32=config["residual_in_fp32"],
    )


def to_transformers(config: LanguageModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "residual_in_fp32": config.residual_in_float32,
    }


def state_spaces_settings(config: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """Returns the settings of the mixers.

    Raises:
        ValueError: they are of another kind, or there are other layers besides.
    """
    settings = config.get("ssm_cfg", {})
    if settings.get("layer", "Mamba1") != layer:
        raise ValueError(f"config.json is of a {settings.get('layer', 'Mamba1')} model, not of a {layer} one.")
    for name in ("attn_layer_idx", "d_intermediate"):
        if config.get(name):
            raise ValueError(f"{name} = {config[name]} cannot be converted: only models of {layer} layers alone.")
    return settings


def from_state_spaces(config: Mapping[str, Any], letter: str, mixer: MixerConfig) -> LanguageModelConfig:
    multiple = config.get("pad_vocab_size_multiple", 8)
    return LanguageModelConfig(
        vocab_size=-(-config["vocab_size"] // multiple) * multiple,
        width=config["d_model"],
        pattern=letter,
        repeats=config["n_layer"],
        layers={letter: mixer},
        tie_embeddings=config.get("tie_embeddings", True),
        residual_in_float32=config.get("residual_in_fp32", True),
    )
