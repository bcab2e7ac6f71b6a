"""One way into all methods of reading beyond the training length."""

from __future__ import annotations

from mamba_jax.long_context.attach import without_extenders
from mamba_jax.long_context.calibration import Calibration
from mamba_jax.long_context.decimamba import DeciMambaConfig, DecimatedLanguageModel, apply_decimamba
from mamba_jax.long_context.longmamba import LongMambaConfig, apply_longmamba
from mamba_jax.long_context.scaling import ScalingConfig, apply_scaling
from mamba_jax.models.language_model import LanguageModel

ExtensionConfig = LongMambaConfig | DeciMambaConfig | ScalingConfig
"""What to do, and how: the settings of a method."""


def extend(
    model: LanguageModel, config: ExtensionConfig | None, calibration: Calibration | None = None
) -> LanguageModel:
    """A copy of a model, sharing its parameters, that reads longer sequences than it was trained on.

    It is used like the model itself: called, stepped, jitted, given to ``generate``.

    Args:
        model: as trained, or extended by LongMamba or scaling, which is taken out first.
        config: the method and its settings; None reads as trained.
        calibration: of this model; LongMamba needs it, the others do not look at it.

    Raises:
        ValueError: LongMamba is given no calibration, the model is decimated, or the method cannot be used on it (see
            ``apply_longmamba``, ``apply_decimamba`` and ``apply_scaling``).
    """
    if isinstance(model, DecimatedLanguageModel):
        raise ValueError("the model is decimated already: extend the model that it was made of.")
    model = without_extenders(model)
    match config:
        case None:
            return model
        case DeciMambaConfig():
            return apply_decimamba(model, config)
        case ScalingConfig():
            return apply_scaling(model, config)
        case LongMambaConfig() if calibration is not None:
            return apply_longmamba(model, calibration, config)
    raise ValueError("LongMamba needs a calibration of the model: make one with long_context.calibrate.")
