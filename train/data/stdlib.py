"""The built-in corpus: the source of the running Python's own standard library, read where it is installed."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

from train.data.tokenizer import ByteTokenizer
from train.data.tokens import Corpus, tokens_in_memory
from train.errors import UserError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HELD_OUT_SHARE = 1 / 20


def stdlib_corpus(folder: Path | None = None) -> Corpus:
    """Reads the corpus, one document a ``.py`` file, as bytes.

    A file is held out by a hash of its path within the library, so it is on the same side in every version of Python
    that has it. Tests and installed packages are left out, and so is the odd file that is not UTF-8.

    Args:
        folder: the library's folder; None takes the running Python's.

    Raises:
        UserError: the library's source is not there.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    texts = _read_texts(folder)
    held_out = {name for name in texts if _hash_share(name) < _HELD_OUT_SHARE}
    if not held_out or len(held_out) == len(texts):
        raise UserError(
            f"Data.source = 'stdlib': {folder} holds {len(texts)} source files of Python {sys.version.split()[0]}, too "
            "few to learn from; install the full standard library, or make a corpus with 'mamba-jax prepare'."
        )
    tokenizer = ByteTokenizer()
    return Corpus(
        train=tokens_in_memory([texts[name] for name in texts if name not in held_out], tokenizer),
        held_out=tokens_in_memory([texts[name] for name in texts if name in held_out], tokenizer),
        tokenizer=tokenizer,
    )


def _read_texts(folder: Path) -> dict[str, str]:
    """Texts by path relative to the folder, sorted by path."""
    texts = {}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _LEFT_OUT.isdisjoint(relative.parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                texts[relative.as_posix()] = text
    return texts


def _hash_share(name: str) -> float:
    """A number in [0, 1) that the name alone decides."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
