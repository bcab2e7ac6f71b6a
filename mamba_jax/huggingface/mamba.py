"""Mamba-1 as in Hugging Face `transformers` (`MambaForCausalLM`) and in state-spaces/mamba."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mamba_jax.mixers.mamba1 import Mamba1Config
from mamba_jax.models.language_model import LanguageModel, LanguageModelConfig

Weights = Mapping[str, np.ndarray]

PREFIX = "backbone.layers.{}."


def config_from(config: Mapping[str, Any]) -> LanguageModelConfig:
    """Settings of a model from its ``config.json``, in either family's form.

    Raises:
        ValueError: the file is of another model, or asks for what Mamba-1 here does not have.
    """
    if "d_model" in config:
        return _state_spaces_config(config)
    if config.get("model_type") != "mamba":
        raise ValueError(f"config.json is of a {config.get('model_type')!r} model, not of a 'mamba' one.")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act = {config['hidden_act']!r} cannot be converted: only 'silu'.")
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
    return LanguageModelConfig(
        vocab_size=config["vocab_size"],
        width=width,
        pattern="M",
        repeats=config["num_hidden_layers"],
        layers={"M": mixer},
        norm_epsilon=config["layer_norm_epsilon"],
        tie_embeddings=config.get("tie_word_embeddings", True),
        residual_in_float32=config["residual_in_fp32"],
    )


def config_to(config: LanguageModelConfig) -> dict[str, Any]:
    """The ``config.json`` that `transformers` reads."""
    mixer = _only_mixer(config)
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mixer.expand * config.width,
        "expand": mixer.expand,
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_width,
        "num_hidden_layers": config.num_layers,
        "time_step_rank": mixer.delta_rank or -(-config.width // 16),
        "time_step_min": mixer.delta_min,
        "time_step_max": mixer.delta_max,
        "time_step_floor": mixer.delta_floor,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.projection_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "residual_in_fp32": config.residual_in_float32,
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
    left = {_canonical(name): np.asarray(value) for name, value in weights.items()}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten_with_path(model)
    arrays = []
    for path, expected in leaves:
        parameter = _parameter(path)
        missing = [name for name in parameter.names(config) if name not in left]
        if missing:
            raise ValueError(f"the checkpoint lacks {missing[0]}.")
        layers = [parameter.ours(left.pop(name)) for name in parameter.names(config)]
        array = np.stack(layers) if parameter.is_stacked else layers[0]
        if array.shape != expected.shape:
            raise ValueError(f"{parameter.name} has shape {array.shape} (as ours), where {expected.shape} is expected.")
        arrays.append(jax.numpy.asarray(array, expected.dtype))
    if left:
        raise ValueError(
            f"the checkpoint has {len(left)} arrays that the model does not: {', '.join(sorted(left)[:5])}."
        )
    return jax.tree.unflatten(structure, arrays)


def weights_from(model: LanguageModel) -> dict[str, np.ndarray]:
    """The weights of a model under the names that `transformers` gives them; the opposite of ``model_from``."""
    config = model.config
    _only_mixer(config)
    weights = {}
    for path, array in jax.tree.flatten_with_path(model)[0]:
        parameter = _parameter(path)
        layers = np.asarray(array) if parameter.is_stacked else [np.asarray(array)]
        for name, layer in zip(parameter.names(config), layers, strict=True):
            weights[name] = parameter.theirs(layer)
    return weights


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter's published name, and how its published form becomes ours and back."""

    name: str
    ours: Callable[[np.ndarray], np.ndarray] = lambda theirs: theirs
    theirs: Callable[[np.ndarray], np.ndarray] = lambda ours: ours

    @property
    def is_stacked(self) -> bool:
        return self.name.startswith(PREFIX)

    def names(self, config: LanguageModelConfig) -> list[str]:
        return [self.name.format(i) for i in range(config.num_layers)] if self.is_stacked else [self.name]


def _transposed(name: str) -> _Parameter:
    return _Parameter(name, np.transpose, np.transpose)


_MIXER = PREFIX + "mixer."

# By the path of the parameter in our model. PyTorch has linear layers (out, in) and convolutions (channels, 1, width).
_PARAMETERS = {
    "embedding.weight": _Parameter("backbone.embeddings.weight"),
    "norm.weight": _Parameter("backbone.norm_f.weight"),
    "head.weight": _transposed("lm_head.weight"),
    "blocks.norm.weight": _Parameter(PREFIX + "norm.weight"),
    "blocks.mixer.in_proj.weight": _Parameter(
        _MIXER + "in_proj.weight",
        lambda theirs: theirs.T.reshape(theirs.shape[1], 2, -1),
        lambda ours: ours.reshape(ours.shape[0], -1).T,
    ),
    "blocks.mixer.in_proj.bias": _Parameter(
        _MIXER + "in_proj.bias", lambda theirs: theirs.reshape(2, -1), lambda ours: ours.reshape(-1)
    ),
    "blocks.mixer.conv_weight": _Parameter(
        _MIXER + "conv1d.weight", lambda theirs: theirs[:, 0].T, lambda ours: ours.T[:, None]
    ),
    "blocks.mixer.conv_bias": _Parameter(_MIXER + "conv1d.bias"),
    "blocks.mixer.x_proj.weight": _transposed(_MIXER + "x_proj.weight"),
    "blocks.mixer.dt_proj.weight": _transposed(_MIXER + "dt_proj.weight"),
    "blocks.mixer.dt_bias": _Parameter(_MIXER + "dt_proj.bias"),
    "blocks.mixer.A_log": _Parameter(_MIXER + "A_log"),
    "blocks.mixer.D": _Parameter(_MIXER + "D"),
    "blocks.mixer.out_proj.weight": _transposed(_MIXER + "out_proj.weight"),
    "blocks.mixer.out_proj.bias": _Parameter(_MIXER + "out_proj.bias"),
}


def _parameter(path: tuple[Any, ...]) -> _Parameter:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return _PARAMETERS[".".join(name for name in names if name != "value")]


def _canonical(name: str) -> str:
    """state-spaces/mamba says ``embedding`` where `transformers` says ``embeddings``."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def _only_mixer(config: LanguageModelConfig) -> Mamba1Config:
    mixers = {letter: config.layers[letter] for letter in config.pattern}
    if len(mixers) == 1 and isinstance(mixer := next(iter(mixers.values())), Mamba1Config):
        return mixer
    raise ValueError(f"a model of pattern {config.pattern!r} is not a Mamba-1: all its layers must be Mamba1.")


def _state_spaces_config(config: Mapping[str, Any]) -> LanguageModelConfig:
    multiple = config.get("pad_vocab_size_multiple", 8)
    settings = config.get("ssm_cfg", {})
    if settings.get("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"config.json is of a {settings['layer']} model, not of a Mamba1 one.")
    rank = settings.get("dt_rank", "auto")
    mixer = Mamba1Config(
        expand=settings.get("expand", 2),
        state_size=settings.get("d_state", 16),
        conv_width=settings.get("d_conv", 4),
        delta_rank=None if rank == "auto" else rank,
    )
    return LanguageModelConfig(
        vocab_size=-(-config["vocab_size"] // multiple) * multiple,
        width=config["d_model"],
        pattern="M",
        repeats=config["n_layer"],
        layers={"M": mixer},
        tie_embeddings=config.get("tie_embeddings", True),
        residual_in_float32=config.get("residual_in_fp32", True),
    )
