"""Published sizes, by name."""

from __future__ import annotations

import dataclasses

from mamba_jax.mixers import Mamba1Config, Mamba2Config
from mamba_jax.models.language_model import LanguageModelConfig

_PILE_VOCAB_SIZE = 50280
"""GPT-NeoX-20B's 50,277 tokens, rounded up to a multiple of 8 as in the published checkpoints."""


_PILE_VOCAB_SIZE_MAMBA2 = 50288
"""The same tokens, rounded up to a multiple of 16."""


def _mamba(width: int, num_layers: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=_PILE_VOCAB_SIZE, width=width, pattern="M", repeats=num_layers, layers={"M": Mamba1Config()}
    )


def _mamba2(width: int, num_layers: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=_PILE_VOCAB_SIZE_MAMBA2, width=width, pattern="2", repeats=num_layers, layers={"2": Mamba2Config()}
    )


PRESETS: dict[str, LanguageModelConfig] = {
    "mamba_130m": _mamba(768, 24),
    "mamba_370m": _mamba(1024, 48),
    "mamba_790m": _mamba(1536, 48),
    "mamba_1_4b": _mamba(2048, 48),
    "mamba_2_8b": _mamba(2560, 64),
    "mamba2_130m": _mamba2(768, 24),
    "mamba2_370m": _mamba2(1024, 48),
    "mamba2_780m": _mamba2(1536, 48),
    "mamba2_1_3b": _mamba2(2048, 48),
    "mamba2_2_7b": _mamba2(2560, 64),
}
"""Mamba-1 as released with Gu & Dao 2023 (arXiv:2312.00752, table 12), Mamba-2 as released with Dao & Gu 2024
(arXiv:2405.21060)."""


def preset(name: str, **changes: object) -> LanguageModelConfig:
    """Configuration of a published model, with fields changed by keyword.

    Raises:
        ValueError: no preset has this name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}.")
    return dataclasses.replace(PRESETS[name], **changes)
