"""Ways to read beyond the training length, by the name they have on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mamba_jax.long_context import (
    Calibration,
    DeciMambaConfig,
    ExtensionConfig,
    LongMambaConfig,
    ScalingConfig,
    extend,
)
from mamba_jax.long_context.longmamba import chosen_channels, decay_threshold
from mamba_jax.models.language_model import LanguageModel
from train import calibrate
from train.errors import UsageError, UserError
from train.settings import did_you_mean
from train.tasks.text import Text


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What methods may need to know beside the model."""

    training_length: int
    calibration: Calibration | None
    """Needed by some methods; ``load_calibration`` makes sure of it."""
    decay_threshold: float | None = None
    """LongMamba's; None takes that of ``LongMambaConfig``."""
    table_step: int | None = None
    """LongMamba's, where g is that of the whole length."""
    channels_seed: int | None = None
    """LongMamba's ``seed``; None takes that of ``LongMambaConfig``."""
    decimamba_layers: Sequence[int] | None = None
    """DeciMamba's ``layers``; None takes the middle one, as the paper does for passkeys."""
    decimamba_length: int | None = None
    """DeciMamba's ``base_length``; None takes the training length."""
    decimamba_beta: float | None = None
    """DeciMamba's; None takes that of ``DeciMambaConfig``."""


@dataclasses.dataclass(frozen=True)
class Method:
    config: Callable[[Setting, LanguageModel, int], ExtensionConfig | None]
    """Takes the length of the sequence, answer included; None where the model reads that as it is."""
    options: frozenset[str] = frozenset()
    """Names of the options that decide what it does, beside the calibration; fields of ``Setting``."""
    layers: int | None = None
    """Layers that it extends; None for all."""
    needs_calibration: bool = False
    in_chunks: bool = True
    """Whether a prompt may be read a part at a time."""


def _longmamba(*, streaming: bool = False, **changes) -> Method:
    def config(setting: Setting, model: LanguageModel, length: int) -> LongMambaConfig | None:
        del model
        assert setting.calibration is not None
        seed = LongMambaConfig.seed if setting.channels_seed is None else setting.channels_seed
        config = LongMambaConfig(**{"decay_threshold": setting.decay_threshold, "seed": seed, **changes})
        if streaming:
            return config
        if length <= setting.calibration.training_length:
            return None  # nothing is left out of so short a sequence
        return dataclasses.replace(config, length=length, table_step=setting.table_step)

    applies = {
        "decay_threshold": "decay_threshold" not in changes,
        "table_step": not streaming,
        "channels_seed": changes.get("channels") == "random",
    }
    options = frozenset(name for name, does in applies.items() if does)
    return Method(config, options, layers=changes.get("layers"), needs_calibration=True)


def _decimamba(setting: Setting, model: LanguageModel, length: int) -> DeciMambaConfig | None:
    if length <= setting.training_length:
        return None
    layers, base_length, beta = setting.decimamba_layers, setting.decimamba_length, setting.decimamba_beta
    return DeciMambaConfig(
        layers=(model.config.num_layers // 2,) if layers is None else tuple(layers),
        base_length=setting.training_length if base_length is None else base_length,
        beta=DeciMambaConfig.beta if beta is None else beta,
    )


def _scaled(setting: Setting, model: LanguageModel, length: int) -> ScalingConfig | None:
    del model
    return None if length <= setting.training_length else ScalingConfig(delta=setting.training_length / length)


METHODS = {
    "vanilla": Method(lambda setting, model, length: None),
    "longmamba": _longmamba(),
    "longmamba_streaming": _longmamba(streaming=True),
    "longmamba_rescaled": _longmamba(rescale=True),
    "longmamba_streaming_rescaled": _longmamba(streaming=True, rescale=True),
    "decimamba": Method(
        _decimamba,
        options=frozenset({"decimamba_layers", "decimamba_length", "decimamba_beta"}),
        in_chunks=False,
    ),
    "scaled": Method(_scaled),
    "local": _longmamba(channels="local"),
    "random": _longmamba(channels="random"),
    "layers_4": _longmamba(layers=4),
    "layers_8": _longmamba(layers=8),
    **{f"threshold_{th:.0e}": _longmamba(decay_threshold=th) for th in (1e-20, 1e-25, 1e-30, 1e-35, 1e-40)},
}


def options_of(names: Iterable[str]) -> frozenset[str]:
    """Options that decide what some of the methods do; names that no method has are passed over."""
    return frozenset().union(*(METHODS[name].options for name in names if name in METHODS))


def check_names(names: Sequence[str]) -> list[str]:
    """The names without repetitions. Raises UsageError for one that no method has."""
    if not names:
        raise UsageError("--methods names none: give some of " + ", ".join(METHODS) + ".")
    for name in names:
        if name not in METHODS:
            hint = did_you_mean(name, METHODS)
            raise UsageError(f"--methods {name}: no method has this name.{hint} There are {', '.join(METHODS)}.")
    return list(dict.fromkeys(names))


def load_calibration(
    path: Path | None, names: Sequence[str], model: LanguageModel, checkpoint: Path, *, read: str, text: Text | None
) -> Calibration | None:
    """The calibration, where there is one.

    Args:
        path: file, if any.
        names: methods that are to be used.
        model: what they are to be used on.
        checkpoint: where it is from.
        read: names what the evaluation reads by its content.
        text: that, where it is running text.

    Raises:
        UsageError: a method needs one, and none was given.
        UserError: the file cannot be read, is of another model, or was made on the text of the evaluation.
    """
    needing = [name for name in names if METHODS[name].needs_calibration]
    if path is None:
        if needing:
            raise UsageError(
                f"the methods {', '.join(needing)} need --calibration FILE. {calibrate.how_to_make(checkpoint)}"
            )
        return None
    calibration = calibrate.load(path, model, checkpoint)
    try:
        calibration.require_unseen(read, text.pieces() if text else ())
    except ValueError as error:
        raise UserError(f"--calibration {path}: {error} {calibrate.how_to_make(checkpoint)}") from None
    return calibration


def extended(name: str, model: LanguageModel, setting: Setting, length: int) -> LanguageModel:
    """The model that a method makes for a length. Raises UserError where it cannot be applied to this model."""
    try:
        config = METHODS[name].config(setting, model, length)
        return model if config is None else extend(model, config, setting.calibration)
    except ValueError as error:
        raise UserError(
            f"the method {name} cannot be used on this model: {error} Or do without it: name the others with "
            "--methods, in place of --ablations."
        ) from None


def too_few_layers(name: str, setting: Setting) -> str | None:
    """Why a method that extends some layers alone makes no sense for a model, or None where it does."""
    wanted, calibration = METHODS[name].layers, setting.calibration
    if wanted is None or calibration is None:
        return None
    there = sum(len(layers.log_decay) for layers in calibration.places.values())
    return f"{name} is left out: of layers with a delta the model has {there}" if there < wanted else None


def without_effect(name: str, model: LanguageModel, setting: Setting, length: int) -> str | None:
    """Why a method that extends a model changes nothing all the same, or None where it does change something."""
    config, calibration = METHODS[name].config(setting, model, length), setting.calibration
    if not isinstance(config, LongMambaConfig) or calibration is None:
        return None
    if any(channels.any() for channels in chosen_channels(calibration, config).values()):
        return None
    kind = "local" if config.channels == "local" else "global"
    thresholds = sorted({decay_threshold(layers, config) for layers in calibration.places.values()})
    return (
        f"{name} leaves everything as it is: no channel of {_extended_layers(config)} is {kind} with decay_threshold "
        f"{' and '.join(f'{threshold:g}' for threshold in thresholds)}"
    )


def _extended_layers(config: LongMambaConfig) -> str:
    return "this model" if config.layers is None else f"the {config.layers} layers that forget least"
