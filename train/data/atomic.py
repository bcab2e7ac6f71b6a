"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from train.errors import UserError


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside ``path`` to fill, and renames it to ``path`` when the body ends without an error.

    After an error nothing is left. After a kill the hidden folder is left, and the next run for the same path removes
    it: a lock, which the system drops with its process, tells it from one that is being filled. The body syncs the
    files it writes.

    Raises:
        UserError: ``path`` exists, another process is filling it, or the disk refuses (full, read-only, …).
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"--out {path} exists; remove it first, or choose another name.")
    target = path.resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, path):
            _empty(partial)
            try:
                yield partial
                _sync_folder(partial)
                os.rename(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _sync_folder(target.parent)
    except OSError as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise UserError(f"--out {path} cannot be written: {reason}. Nothing is left of it.") from error


@contextlib.contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise BlockingIOError  # it was renamed between our open and our lock
        yield
    except BlockingIOError:
        raise UserError(f"--out {path}: another process is making it; wait for it, or choose another name.") from None
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink() if not entry.is_dir() else shutil.rmtree(entry)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
