"""Puts extenders into a model, and takes them out."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from mamba_jax.mixers.selective import Extender, SelectiveMixer
from mamba_jax.models.language_model import LanguageModel


def with_extenders(model: LanguageModel, extenders: Mapping[int, Extender]) -> LanguageModel:
    """A copy of a model, sharing its parameters, whose layers change their step sizes and decay rates before the scan.

    It is used like the model itself: called, stepped, jitted, given to ``generate``. Its states differ by a position.

    Args:
        model: without extenders, or with some, which are replaced.
        extenders: by place in the model's pattern; arrays have the pattern's repeats as their first dimension.

    Raises:
        ValueError: a layer to extend has no delta.
    """
    copy = without_extenders(model)
    for place, extender in extenders.items():
        mixer = copy.blocks[place].mixer
        if not isinstance(mixer, SelectiveMixer):
            raise ValueError(
                f"layer {place} of the pattern {model.config.pattern!r} has no delta to extend: "
                f"choose among the places {selective_places(model)}."
            )
        mixer.extender = extender
    return copy


def without_extenders(model: LanguageModel) -> LanguageModel:
    """A copy of a model, sharing its parameters, with step sizes and decay rates as trained."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for place in selective_places(copy):
        mixer = copy.blocks[place].mixer
        if mixer.extender is not None:
            del mixer.extender
    return copy


def selective_mixers(model: LanguageModel) -> dict[int, SelectiveMixer]:
    """Stacked mixers with a delta, by their place in the pattern."""
    mixers = enumerate(block.mixer for block in model.blocks)
    return {place: mixer for place, mixer in mixers if isinstance(mixer, SelectiveMixer)}


def selective_places(model: LanguageModel) -> list[int]:
    """Places of the pattern whose layers have a delta."""
    return list(selective_mixers(model))


def require_layers_that_can_freeze(model: LanguageModel) -> None:
    """Raises a ValueError if the scan of a layer gives every token a step size above 0, whatever an extender says."""
    for place, mixer in selective_mixers(model).items():
        if mixer.delta_floor > 0:
            raise ValueError(
                f"layer {place} of the pattern {model.config.pattern!r} steps its state by at least "
                f"{mixer.delta_floor} at each "
                "token (delta_limit_min), so none can be left out: use a model whose limit is 0."
            )
