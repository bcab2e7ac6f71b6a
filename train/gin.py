"""Reads gin files and ``--gin.NAME=VALUE`` options into an Experiment, and writes an Experiment as gin text.

The gin-config library parses, keeps scopes and macros, and follows references; what it binds are plain records, which
become dataclasses only here, so that every error can name the setting, the place it was given, and the way out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import threading
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from mamba_jax.mixers import MIXER_CONFIGS
from mamba_jax.models.language_model import LanguageModelConfig
from train.config import ConfigError, Experiment
from train.settings import (
    construct,
    did_you_mean,
    field_types,
    format_value,
    group_name,
    groups,
    mixers,
    near_settings,
    sections,
    without_unused_layers,
)

_MODULE = "mamba_jax"
"""Module that the groups are registered under, out of the way of other users of gin in the same process."""

_LOCK = threading.Lock()
"""Held while gin's global state is ours."""

_NO_BARE_TEXT = tuple("@%({['\"")
"""What a reference, a macro, a collection or a quoted text begins with."""


def load(gin_files: Sequence[str], bindings: Sequence[str]) -> Experiment:
    """Reads files in order, then single bindings; a later value of a setting replaces an earlier one.

    Args:
        gin_files: paths, relative to the working directory or to the installed ``configs``. An ``include`` inside one
            is also looked for beside the including file.
        bindings: ``"NAME=VALUE"``, each a gin binding, except that a text needs no quotes.

    Raises:
        ConfigError: a file or setting that does not exist, a value of the wrong type or outside what is accepted, or a
            binding that nothing uses.
    """
    with _LOCK:
        gin.clear_config()
        try:
            reader = _Reader()
            for name in gin_files:
                reader.read_file(name, included_from=())
            for binding in bindings:
                reader.read_option(binding)
            reader.check_macros()
            return _Builder(reader.places).experiment()
        except RecursionError:
            raise ConfigError("a macro refers to itself, by way of others or at once.") from None
        finally:
            gin.clear_config()


def to_gin(experiment: Experiment) -> str:
    """Every setting of an experiment as gin text; ``load`` reads it back to an equal experiment."""
    lines: list[str] = []
    for group, attribute in sections().items():
        config = getattr(experiment, attribute)
        if isinstance(config, LanguageModelConfig):
            lines += _model_lines(group, without_unused_layers(config))
        else:
            lines += [
                f"{group}.{field} = {format_value(getattr(config, field))}" for field in field_types(type(config))
            ]
        lines.append("")
    return "\n".join(lines)


def _model_lines(group: str, model: LanguageModelConfig) -> list[str]:
    """Settings of the model, with a scope for each layer so that two of the same class stay apart."""
    scopes = {
        letter: letter if letter.isascii() and letter.isalpha() else f"layer_{index}"
        for index, letter in enumerate(model.layers)
    }
    lines = []
    for field in field_types(type(model)):
        value = format_value(getattr(model, field))
        if field == "layers":
            references = (
                f"{letter!r}: @{scopes[letter]}/{group_name(type(model.layers[letter]))}()" for letter in scopes
            )
            value = "{" + ", ".join(references) + "}"
        lines.append(f"{group}.{field} = {value}")
    for letter, layer in model.layers.items():
        prefix = f"{scopes[letter]}/{group_name(type(layer))}"
        lines += [f"{prefix}.{field} = {format_value(getattr(layer, field))}" for field in field_types(type(layer))]
    return lines


def _is_text(name: str) -> bool:
    """Whether a setting is a text, such as a pattern of layers, even if what is given for it looks like a number."""
    group, _, field = name.rpartition("/")[2].partition(".")
    return group in groups() and field_types(groups()[group]).get(field) is str


@dataclasses.dataclass(frozen=True)
class _Given:
    """What gin had bound for one instance of a group when a reference to it was followed."""

    group: str
    scope: tuple[str, ...]
    values: dict[str, Any]


@functools.cache
def _register_groups() -> None:
    def record(group: str):
        def instance(**values):
            return _Given(group, tuple(gin.current_scope()), values)

        return instance

    for group in groups():
        gin.external_configurable(record(group), name=group, module=_MODULE)


class _Delegate(gin_config.ParserDelegate):
    """Checks references as they are parsed. gin passes a SyntaxError on as it is, and adds text to all others."""

    def __init__(self):
        super().__init__()
        self.macros: set[str] = set()

    def configurable_reference(self, scoped_selector: str, evaluate: bool):
        group = scoped_selector.rsplit("/", 1)[-1]
        if group not in mixers():
            raise SyntaxError(f"@{scoped_selector} is none of {', '.join(f'@{name}' for name in mixers())}")
        if not evaluate:
            raise SyntaxError(f"@{scoped_selector} needs parentheses: @{scoped_selector}()")
        return super().configurable_reference(scoped_selector, evaluate)

    def macro(self, name: str):
        self.macros.add(name)
        return super().macro(name)


class _Reader:
    """Hands the statements of files and options to gin, and remembers where each came from."""

    def __init__(self):
        _register_groups()
        self.places: dict[tuple[str, str, str], str] = {}
        """(scope, group, field) -> the file and line, or the option, that bound it last."""
        self._macro_places: dict[str, str] = {}
        self._used_macros: dict[str, str] = {}

    def read_file(self, name: str, included_from: tuple[Path, ...]) -> None:
        path = _find(name, included_from)
        if path in included_from:
            raise ConfigError(f"{path} includes itself, by way of {' -> '.join(map(str, included_from))}.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the gin file {path}: {error}.") from None
        for statement, place in self._statements(text, str(path)):
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(statement.filename, (*included_from, path))
            else:
                self._bind(statement, place)

    def read_option(self, binding: str) -> None:
        name, equals, value = (part.strip() for part in binding.partition("="))
        option = f"--gin.{name}"
        if not name or not equals:
            raise ConfigError(f"{option} has no value: write --gin.NAME=VALUE.")
        # Shells eat quotes: what is no gin value is taken as a text, and its type is checked like any other.
        try:
            text = value if value[:1] in _NO_BARE_TEXT or not _is_text(name) else repr(value)
            statements = list(self._statements(f"{name} = {text}", option))
        except ConfigError:
            if value[:1] in _NO_BARE_TEXT:
                raise
            statements = list(self._statements(f"{name} = {value!r}", option))
        for statement, place in statements:
            self._bind(statement, place)

    def check_macros(self) -> None:
        """Refuses macros that are used but not set, and those (often settings without their group) never used."""
        for name, place in self._used_macros.items():
            if name not in self._macro_places:
                raise ConfigError(f"{place}: %{name} is not set anywhere.{did_you_mean(name, self._macro_places)}")
        for name, place in self._macro_places.items():
            if name not in self._used_macros:
                hint = near_settings("", name)
                raise ConfigError(f"{place}: {name} is no setting, and nothing uses it as the macro %{name}.{hint}")

    def _statements(self, text: str, source: str) -> Iterator[tuple[Any, str]]:
        delegate = _Delegate()
        parser, place = None, source
        try:
            parser = config_parser.ConfigParser(text, delegate)
            while (statement := parser.parse_statement()) is not None:
                place = source if source.startswith("--gin.") else f"{source}:{statement.location.line_num}"
                for macro in delegate.macros:
                    self._used_macros.setdefault(macro, place)
                delegate.macros.clear()
                yield statement, place
        except (SyntaxError, tokenize.TokenError) as error:
            raise ConfigError(_syntax_message(error, parser, text, source)) from None

    def _bind(self, statement: Any, place: str) -> None:
        match statement:
            case config_parser.BindingStatement(scope, macro, "", value):
                name = f"{scope}/{macro}" if scope else macro
                gin.bind_parameter((name, "gin.macro", "value"), value)
                self._macro_places[name] = place
            case config_parser.BindingStatement(scope, group, field, value):
                _check_setting(group, field, place)
                gin.bind_parameter((scope, f"{_MODULE}.{group}", field), value)
                self.places[scope, group, field] = place
            case config_parser.BlockDeclaration(_, group):
                if group not in groups():
                    raise ConfigError(f"{place}: there is no group of settings {group}.{did_you_mean(group, groups())}")
            case _:
                raise ConfigError(f"{place}: gin files hold settings and includes only, and no imports.")


def _check_setting(group: str, field: str, place: str) -> None:
    if group not in groups() or field not in field_types(groups()[group]):
        hint = near_settings(group, field)
        raise ConfigError(f"{place}: there is no setting {group}.{field}.{hint} 'mamba-jax configs' lists them all.")


def _syntax_message(error: Exception, parser: Any, text: str, source: str) -> str:
    lines = text.splitlines() or [""]
    line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else len(lines))
    reason = str(error.args[0]).splitlines()[0]
    if reason.startswith("malformed node"):
        reason = "a text needs quotes"
    place = source if source.startswith("--gin.") else f"{source}:{line}"
    return f"{place}: cannot read '{lines[min(line, len(lines)) - 1].strip()}': {reason.rstrip('.?')}."


def _find(name: str, included_from: tuple[Path, ...]) -> Path:
    """Looks beside the including file, in the working directory, then in the installed configs."""
    beside = [included_from[-1].parent] if included_from else []
    installed = Path(str(importlib.resources.files("configs")))
    folders = [*beside, Path(), installed.parent, installed]
    candidates = [folder / name for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve() if included_from else candidate
    place = f"{included_from[-1]}: " if included_from else ""
    near = did_you_mean(name, map(str, _gin_files(installed)))
    raise ConfigError(f"{place}there is no gin file {name}.{near}")


def _gin_files(folder: Path) -> list[Path]:
    return [Path("configs") / path.relative_to(folder) for path in sorted(folder.rglob("*.gin"))]


class _Builder:
    """Makes the dataclasses of what gin has bound, and notes which bindings took part."""

    def __init__(self, places: Mapping[tuple[str, str, str], str]):
        self._places = places
        self._used: set[tuple[tuple[str, ...], str]] = set()

    def experiment(self) -> Experiment:
        parts = {}
        for group, attribute in sections().items():
            given = _instance(group)
            if groups()[group] is LanguageModelConfig:
                given = _with_used_layers(given)
            parts[attribute] = self._build(given)
        self._check_used()
        try:
            return Experiment(**parts)
        except ConfigError as error:
            raise self._located(error, scope=()) from None

    def _build(self, given: _Given) -> Any:
        self._used.add((given.scope, given.group))
        try:
            return construct(
                groups()[given.group], {field: self._built(value) for field, value in given.values.items()}
            )
        except ConfigError as error:
            raise self._located(error, given.scope) from None

    def _built(self, value: Any) -> Any:
        if isinstance(value, _Given):
            return self._build(value)
        if isinstance(value, dict):
            return {key: self._built(item) for key, item in value.items()}
        return value

    def _located(self, error: ConfigError, scope: tuple[str, ...]) -> ConfigError:
        """Puts the file and line, or the option, before a message that starts with the name of a setting."""
        group, _, field = str(error).partition(" ")[0].partition(".")
        for depth in range(len(scope), -1, -1):
            place = self._places.get(("/".join(scope[:depth]), group, field))
            if place and not str(error).startswith(place):
                return ConfigError(f"{place}: {error}")
        return error

    def _check_used(self) -> None:
        for (scope, group, field), place in self._places.items():
            path = tuple(scope.split("/")) if scope else ()
            if any(group == used_group and used[: len(path)] == path for used, used_group in self._used):
                continue
            name = f"{scope}/{group}" if scope else group
            why = (
                f"{group} has no scopes, write {group}.{field}"
                if group in sections()
                else f"no letter of LanguageModel.pattern stands for @{name}()"
            )
            raise ConfigError(f"{place}: {name}.{field} is set but nothing uses it: {why}.")


def _instance(group: str) -> _Given:
    return gin.get_configurable(f"{_MODULE}.{group}")()


def _with_used_layers(model: _Given) -> _Given:
    """The layers that the pattern refers to, those of the built-in vocabulary where none are given."""
    pattern = model.values.get("pattern", LanguageModelConfig.pattern)
    layers = model.values.get("layers")
    if layers is None:
        layers = {letter: _instance(group_name(mixer)) for letter, mixer in MIXER_CONFIGS.items()}
    if isinstance(layers, dict) and isinstance(pattern, str) and set(pattern) <= set(layers):
        layers = {letter: layers[letter] for letter in dict.fromkeys(pattern)}
    return dataclasses.replace(model, values=model.values | {"layers": layers})
