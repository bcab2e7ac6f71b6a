"""Reading beyond the training length: ``extend`` a model by one of three methods, with what ``calibrate`` measures."""

from mamba_jax.long_context.calibration import Calibration, calibrate, sample_sequences
from mamba_jax.long_context.decimamba import DeciMambaConfig
from mamba_jax.long_context.extension import ExtensionConfig, extend
from mamba_jax.long_context.longmamba import LongMambaConfig
from mamba_jax.long_context.scaling import ScalingConfig

__all__ = [
    "Calibration",
    "DeciMambaConfig",
    "ExtensionConfig",
    "LongMambaConfig",
    "ScalingConfig",
    "calibrate",
    "extend",
    "sample_sequences",
]
