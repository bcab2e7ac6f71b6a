"""A small Hugging Face tokenizer, as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with 300 ids, of which 0 is <|endoftext|>."""
    return _train_bpe(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", [END_OF_TEXT])


@pytest.fixture(scope="session")
def plain_bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without any special token."""
    return _train_bpe(tmp_path_factory.mktemp("plain_tokenizer") / "tokenizer.json", [])


def _train_bpe(path: Path, special_tokens: list[str]) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog, says the naïve café owner. " * 20
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(path))
    return path
