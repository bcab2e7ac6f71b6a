"""Published sizes, by name."""

from __future__ import annotations

import dataclasses

from mamba_jax.models.language_model import LanguageModelConfig

_PILE_VOCAB_SIZE = 50280
"""GPT-NeoX-20B's 50,277 tokens, rounded up to a multiple of 8 as in the published checkpoints."""


def _mamba(width: int, num_layers: int) -> LanguageModelConfig:
    return LanguageModelConfig(vocab_size=_PILE_VOCAB_SIZE, width=width, pattern="M", repeats=num_layers)


PRESETS: dict[str, LanguageModelConfig] = {
    "mamba_130m": _mamba(768, 24),
    "mamba_370m": _mamba(1024, 48),
    "mamba_790m": _mamba(1536, 48),
    "mamba_1_4b": _mamba(2048, 48),
    "mamba_2_8b": _mamba(2560, 64),
}
"""Mamba-1 as released with Gu & Dao 2023 (arXiv:2312.00752, table 12)."""


def preset(name: str, **changes: object) -> LanguageModelConfig:
    """Configuration of a published model, with fields changed by keyword.

    Raises:
        ValueError: no preset has this name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}.")
    return dataclasses.replace(PRESETS[name], **changes)
