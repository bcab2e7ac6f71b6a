"""Checks of settings, whose errors name a setting as gin files do, its value, and what would be accepted.

A setting is a field of a frozen dataclass; ``Mamba2Config.groups`` is called ``Mamba2.groups``.
"""

from __future__ import annotations

from typing import Any


def require(condition: bool, config: Any, name: str, accepted: str) -> None:
    """Raises a ValueError that says what the setting accepts, unless the condition holds."""
    if not condition:
        owner, value = type(config).__name__.removesuffix("Config"), getattr(config, name)
        raise ValueError(f"{owner}.{name} = {value!r} cannot be used: {accepted}.")


def at_least_one(config: Any, *names: str) -> None:
    """Refuses settings below 1."""
    for name in names:
        require(getattr(config, name) >= 1, config, name, "at least 1")


def above_zero(config: Any, *names: str) -> None:
    """Refuses settings that are not above 0."""
    for name in names:
        require(getattr(config, name) > 0, config, name, "above 0")


def ordered(config: Any, least: str, most: str) -> None:
    """Refuses a range that does not begin above 0, or ends below its beginning."""
    bound = getattr(config, most)
    require(0 < getattr(config, least) <= bound, config, least, f"above 0, at most {most} ({bound})")


def num_heads(config: Any, width: int) -> int:
    """Heads in a model of this width, given ``expand``, ``head_dim`` and ``groups``.

    Raises:
        ValueError: the channels cannot be divided into such heads, or the heads into such groups.
    """
    channels = config.expand * width
    heads = channels // config.head_dim
    divides = f"it must divide {channels} channels (expand x width)"
    require(heads * config.head_dim == channels, config, "head_dim", divides)
    divides = f"it must divide {heads} heads (expand x width / head_dim)"
    require(heads % config.groups == 0, config, "groups", divides)
    return heads
