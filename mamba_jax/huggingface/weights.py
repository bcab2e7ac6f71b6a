"""Weights of a checkpoint to a model and back, as a family's table of names tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba_jax.models.language_model import LanguageModel, LanguageModelConfig

Weights = Mapping[str, np.ndarray]

LAYER = "backbone.layers.{}."
"""How the names of a layer's parameters begin."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter's published name, and how its published form becomes ours and back.

    Where several of ours have the same published name, that array holds them one after the other, in its first
    dimension and in the order of the table.
    """

    name: str
    ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = np.reshape
    """From the published form and the shape of ours."""
    theirs: Callable[[np.ndarray], np.ndarray] = lambda ours: ours

    @property
    def is_stacked(self) -> bool:
        return self.name.startswith(LAYER)

    def names(self, config: LanguageModelConfig) -> list[str]:
        return [self.name.format(i) for i in range(config.num_layers)] if self.is_stacked else [self.name]

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Published shape of one layer's parameter, from ours."""
        return self.theirs(np.empty(shape)).shape


def linear(name: str) -> Parameter:
    """PyTorch has the weights of linear layers (out, in), and out flat."""
    return Parameter(
        name, lambda theirs, shape: theirs.T.reshape(shape), lambda ours: ours.reshape(ours.shape[0], -1).T
    )


def flat(name: str) -> Parameter:
    """Published with all dimensions in one."""
    return Parameter(name, theirs=np.ravel)


def convolution(name: str) -> Parameter:
    """PyTorch has the weights of convolutions (channels, 1, width)."""
    return Parameter(name, lambda theirs, shape: theirs[:, 0].T, lambda ours: ours.T[:, None])


COMMON = {
    "embedding.weight": Parameter("backbone.embeddings.weight"),
    "norm.weight": Parameter("backbone.norm_f.weight"),
    "head.weight": linear("lm_head.weight"),
    "blocks.norm.weight": Parameter(LAYER + "norm.weight"),
}
"""What models of every family have outside the mixers, by the path in our model."""


def only_mixer[Config](config: LanguageModelConfig, kind: type[Config], family: str) -> Config:
    """Settings of the mixers of a model that has those of one letter only.

    Raises:
        ValueError: the model has others, or not of this kind.
    """
    mixers = {letter: config.layers[letter] for letter in config.pattern}
    if len(mixers) == 1 and isinstance(mixer := next(iter(mixers.values())), kind):
        return mixer
    raise ValueError(
        f"a model of pattern {config.pattern!r} is not a {family}: "
        f"all its layers must be {kind.__name__.removesuffix('Config')}."
    )


def model_from(config: LanguageModelConfig, weights: Weights, table: Mapping[str, Parameter]) -> LanguageModel:
    """A model with the weights of a checkpoint.

    Args:
        config: its settings.
        weights: its arrays under their published names.
        table: the family's parameters by the path in our model.

    Raises:
        ValueError: an array is missing, left over, or of another shape; the message names it.
    """
    left = {_canonical(name): np.asarray(value) for name, value in weights.items()}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    leaves, structure = jax.tree.flatten_with_path(jax.eval_shape(lambda: config.build(nnx.Rngs(0))))
    expected = {_path(path): leaf for path, leaf in leaves}
    arrays = {}
    for paths in _by_published_name(expected, table):
        parts = [table[path] for path in paths]
        shapes = [expected[path].shape[parts[0].is_stacked :] for path in paths]
        layers = [_split(name, left.pop(name, None), parts, shapes) for name in parts[0].names(config)]
        for path, part in zip(paths, zip(*layers, strict=True), strict=True):
            array = np.stack(part) if parts[0].is_stacked else part[0]
            arrays[path] = jnp.asarray(array, expected[path].dtype)
    if left:
        raise ValueError(
            f"the checkpoint has {len(left)} arrays that the model does not: {', '.join(sorted(left)[:5])}."
        )
    return jax.tree.unflatten(structure, [arrays[path] for path in expected])


def weights_from(model: LanguageModel, table: Mapping[str, Parameter]) -> dict[str, np.ndarray]:
    """The weights of a model under their published names; the opposite of ``model_from``."""
    arrays = {_path(path): np.asarray(array) for path, array in jax.tree.flatten_with_path(model)[0]}
    weights = {}
    for paths in _by_published_name(arrays, table):
        parameter = table[paths[0]]
        for i, name in enumerate(parameter.names(model.config)):
            parts = [table[path].theirs(arrays[path][i] if parameter.is_stacked else arrays[path]) for path in paths]
            weights[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return weights


def _split(
    name: str, array: np.ndarray | None, parts: list[Parameter], shapes: list[tuple[int, ...]]
) -> list[np.ndarray]:
    """Takes a published array apart into arrays of our shapes."""
    if array is None:
        raise ValueError(f"the checkpoint lacks {name}.")
    theirs = [part.their_shape(shape) for part, shape in zip(parts, shapes, strict=True)]
    sizes = [shape[0] for shape in theirs]
    whole = (sum(sizes), *theirs[0][1:])
    if array.shape != whole:
        raise ValueError(f"{name} has shape {array.shape}, where {whole} is expected.")
    pieces = np.split(array, np.cumsum(sizes)[:-1])
    return [part.ours(piece, shape) for part, piece, shape in zip(parts, pieces, shapes, strict=True)]


def _by_published_name(present: Mapping[str, Any], table: Mapping[str, Parameter]) -> list[list[str]]:
    """Paths of the model's parameters, those together that are published as one array, in the order of the table."""
    unknown = sorted(present.keys() - table.keys())
    if unknown:
        raise KeyError(f"no published name is known for {unknown[0]}")
    groups: dict[str, list[str]] = {}
    for path, parameter in table.items():
        if path in present:
            groups.setdefault(parameter.name, []).append(path)
    return list(groups.values())


def _path(path: tuple[Any, ...]) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return ".".join(name for name in names if name != "value")


def _canonical(name: str) -> str:
    """state-spaces/mamba says ``embedding`` where `transformers` says ``embeddings``."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")
