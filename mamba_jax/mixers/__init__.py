"""Mixers: one file a variant, each a frozen config and an ``nnx.Module`` that follow ``mixers.base``."""

from mamba_jax.mixers.base import Mixer, MixerConfig
from mamba_jax.mixers.mamba1 import Mamba1, Mamba1Config
from mamba_jax.mixers.mamba2 import Mamba2, Mamba2Config
from mamba_jax.mixers.mamba3 import Mamba3, Mamba3Config

MIXER_CONFIGS: dict[str, type] = {"M": Mamba1Config, "2": Mamba2Config, "3": Mamba3Config}
"""The letters that a layer pattern can use without further ado, and what they stand for."""

__all__ = [
    "MIXER_CONFIGS",
    "Mamba1",
    "Mamba1Config",
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "Mixer",
    "MixerConfig",
]
