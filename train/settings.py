"""Every setting of a run by name: its type, default and meaning, its JSON form, and what differs between two runs.

The name of a group of settings is its class less "Config": ``TrainConfig.steps`` is the setting ``Train.steps``.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from mamba_jax.mixers import MIXER_CONFIGS, MixerConfig
from mamba_jax.models.language_model import LanguageModelConfig
from train.config import ConfigError, Experiment


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of ``mamba-jax configs``."""

    name: str
    """Group and field, as a gin file writes them."""
    type: str
    """Values it takes."""
    default: str
    """Its default, as a gin file would write it."""
    doc: str
    """What it means, one sentence."""


def group_name(config_class: type) -> str:
    """``Train`` for TrainConfig."""
    return config_class.__name__.removesuffix("Config")


@functools.cache
def sections() -> dict[str, str]:
    """Groups that are one part of an Experiment each, and the attribute that holds it."""
    hints = typing.get_type_hints(Experiment)
    return {group_name(hints[field.name]): field.name for field in dataclasses.fields(Experiment)}


@functools.cache
def groups() -> dict[str, type]:
    """Every group of settings by name: the sections of an Experiment, then the mixers."""
    hints = typing.get_type_hints(Experiment)
    return {group: hints[attribute] for group, attribute in sections().items()} | mixers()


@functools.cache
def mixers() -> dict[str, type]:
    """Groups that a letter of ``LanguageModel.layers`` can stand for."""
    return {group_name(config_class): config_class for config_class in MIXER_CONFIGS.values()}


def field_types(config_class: type) -> dict[str, Any]:
    """Annotation of each field, resolved."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def setting_names() -> list[str]:
    """All names that can be set."""
    return [f"{group}.{field}" for group, config_class in groups().items() for field in field_types(config_class)]


def describe() -> list[Setting]:
    """Every setting that a gin file or ``--gin.NAME=VALUE`` can bind."""
    settings = []
    for group, config_class in groups().items():
        defaults, docs = config_class(), field_docs(config_class)
        for field, hint in field_types(config_class).items():
            default = format_value(getattr(defaults, field))
            settings.append(Setting(f"{group}.{field}", type_name(hint), default, docs.get(field, "")))
    return settings


def field_docs(config_class: type) -> dict[str, str]:
    """The string literal below each field of a dataclass; Python itself throws them away."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, after in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = " ".join(text.split())
    return docs


def type_name(hint: Any) -> str:
    """How messages and tables write a type: the accepted words of a Literal, otherwise as in the source."""
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is collections.abc.Mapping:
        key, value = get_args(hint)
        return f"{{{type_name(key)}: {type_name(value)}}}"
    if hint is MixerConfig:
        return " | ".join(f"@{group}()" for group in mixers())
    if get_args(hint):
        arguments = ", ".join("..." if argument is ... else type_name(argument) for argument in get_args(hint))
        return f"{get_origin(hint).__name__}[{arguments}]"
    return hint.__name__


def convert(name: str, value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it: an int becomes the float that is meant, a list a tuple.

    Raises:
        ConfigError: the value is of another type; names the setting and, for a word, the nearest accepted ones.
    """
    try:
        return _convert(value, hint)
    except (TypeError, ValueError):
        nearest = did_you_mean(value, literal_words(hint)) if isinstance(value, str) else ""
        given = "" if value is None else f" (a {type(value).__name__})"
        raise ConfigError(
            f"{name} = {format_value(value)}{given} cannot be used: it takes {type_name(hint)}.{nearest}"
        ) from None


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, arguments)
    if origin is Literal:
        matches = [choice for choice in arguments if type(choice) is type(value) and choice == value]
    elif origin is tuple and isinstance(value, list | tuple):
        every = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        matches = [tuple(_convert(item, item_hint) for item, item_hint in zip(value, every, strict=True))]
    elif origin is collections.abc.Mapping and isinstance(value, Mapping):
        matches = [{_convert(key, arguments[0]): _convert(item, arguments[1]) for key, item in value.items()}]
    elif hint is float and type(value) is int:
        matches = [float(value)]
    elif hint is MixerConfig:
        matches = [value] if type(value) in mixers().values() else []
    else:  # exact, because True is an int to isinstance
        matches = [value] if type(value) is hint else []
    if not matches:
        raise TypeError
    return matches[0]


def _first_that_fits(value: Any, hints: tuple[Any, ...]) -> Any:
    exact_first = sorted(hints, key=lambda hint: type(value) is not hint)
    for hint in exact_first:
        try:
            return _convert(value, hint)
        except (TypeError, ValueError):
            continue
    raise TypeError


def literal_words(hint: Any) -> list[str]:
    """Words that a Literal anywhere in this type accepts."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    return [word for argument in get_args(hint) if argument is not ... for word in literal_words(argument)]


def did_you_mean(given: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A question that names the nearest known names, to follow an error's sentence; empty where none comes near."""
    near = difflib.get_close_matches(given, list(known), n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(prefix + name for name in near)}?" if near else ""


def near_settings(group: str, field: str) -> str:
    """``did_you_mean`` for a setting that does not exist: a slip in the field, the wrong group, or both."""
    if group in groups() and (hint := did_you_mean(field, field_types(groups()[group]), prefix=f"{group}.")):
        return hint
    if same_field := [name for name in setting_names() if name.partition(".")[2] == field]:
        return f" Did you mean {' or '.join(same_field)}?"
    return did_you_mean(f"{group}.{field}" if group else field, setting_names())


def format_value(value: Any) -> str:
    """A value as a gin file writes it; mixers by name, their own settings left out."""
    if dataclasses.is_dataclass(value):
        return f"@{group_name(type(value))}()"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # gin has no word for infinity, but numbers overflow to it
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(format_value, value)) + (",)" if len(value) == 1 else ")")
    return repr(value)


def without_unused_layers(model: LanguageModelConfig) -> LanguageModelConfig:
    """The same model without the letters its pattern does not use: they decide nothing and would only be noise."""
    return dataclasses.replace(model, layers={letter: model.layers[letter] for letter in dict.fromkeys(model.pattern)})


def to_json(experiment: Experiment) -> dict[str, Any]:
    """Nested dicts that ``json.dumps`` takes: ``{"Train": {"steps": 9}}``, a mixer as ``{"Mamba1": {"expand": 2}}``."""
    groups_of_experiment: dict[str, Any] = {}
    for attribute in sections().values():
        groups_of_experiment |= _to_plain(_section(experiment, attribute))
    return groups_of_experiment


def from_json(plain: Mapping[str, Any]) -> Experiment:
    """Inverse of ``to_json``. Settings that an older version did not write take their defaults.

    Raises:
        ConfigError: settings that this version does not know, or values it does not accept.
    """
    known = sections()
    unknown = sorted(set(plain) - set(known))
    if unknown:
        raise ConfigError(_unknown_settings(unknown))
    hints = field_types(Experiment)
    return Experiment(
        **{known[group]: _from_plain({group: fields}, hints[known[group]]) for group, fields in plain.items()}
    )


def differences(old: Experiment, new: Experiment, *, old_place: str, ignore: Iterable[str] = ()) -> list[str]:
    """Settings that are not equal, a line each: ``Train.seed: 0 in runs/x, 1 now``.

    Args:
        old: one experiment.
        new: the other, called "now".
        old_place: where the old one comes from.
        ignore: names of settings, or of whole groups, that may differ.
    """
    old_values, new_values = dict(_flatten(old)), dict(_flatten(new))
    ignored = set(ignore)
    return [
        f"{name}: {old_values.get(name, 'not set')} in {old_place}, {new_values.get(name, 'not set')} now"
        for name in dict.fromkeys([*old_values, *new_values])
        if old_values.get(name) != new_values.get(name) and not ignored & {name, name.split(".")[0]}
    ]


def _section(experiment: Experiment, attribute: str) -> Any:
    section = getattr(experiment, attribute)
    return without_unused_layers(section) if isinstance(section, LanguageModelConfig) else section


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            group_name(type(value)): {field: _to_plain(getattr(value, field)) for field in field_types(type(value))}
        }
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(plain: Any, hint: Any) -> Any:
    """Puts the dataclasses back into what ``_to_plain`` made, as far as the annotation says where they were."""
    if get_origin(hint) is collections.abc.Mapping:
        return {key: _from_plain(item, get_args(hint)[1]) for key, item in plain.items()}
    if not (dataclasses.is_dataclass(hint) or hint is MixerConfig):
        return plain
    ((group, fields),) = plain.items()
    if group not in groups():
        raise ConfigError(_unknown_settings([group]))
    config_class = groups()[group]
    hints = field_types(config_class)
    unknown = [f"{group}.{field}" for field in fields if field not in hints]
    if unknown:
        raise ConfigError(_unknown_settings(unknown))
    return construct(config_class, {field: _from_plain(item, hints[field]) for field, item in fields.items()})


def construct(config_class: type, values: Mapping[str, Any]) -> Any:
    """Makes a config from values of about the right types.

    Raises:
        ConfigError: a value that the class does not accept; names the setting.
    """
    group, hints = group_name(config_class), field_types(config_class)
    converted = {field: convert(f"{group}.{field}", value, hints[field]) for field, value in values.items()}
    try:
        return config_class(**converted)
    except ConfigError:
        raise
    except ValueError as error:  # packages below this one cannot know ConfigError
        raise ConfigError(str(error)) from None


def _unknown_settings(names: list[str]) -> str:
    return (
        f"the saved config has settings that this version does not know ({', '.join(names)}): "
        "it comes from a newer version of mamba-jax; install that version to use it."
    )


def _flatten(experiment: Experiment) -> Iterator[tuple[str, str]]:
    for group, attribute in sections().items():
        yield from _flatten_config(group, _section(experiment, attribute))


def _flatten_config(prefix: str, config: Any) -> Iterator[tuple[str, str]]:
    for field in field_types(type(config)):
        value = getattr(config, field)
        if not isinstance(value, Mapping):
            yield f"{prefix}.{field}", format_value(value)
            continue
        for key, item in value.items():
            yield f"{prefix}.{field}[{key!r}]", format_value(item)
            yield from _flatten_config(f"{prefix}.{field}[{key!r}]", item)
