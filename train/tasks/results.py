"""Results of an evaluation on disk, a line for each cell as soon as it is finished, so that a rerun skips it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError

CELLS = "cells.jsonl"

Key = Mapping[str, Any]
"""Names a cell: its method, length, depth, ... in terms of JSON."""


class Results:
    """The cells of one evaluation. The first line says what is evaluated; a folder holds one evaluation only."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False):
        """Opens a folder, which is made where there is none.

        Args:
            folder: where the cells are, or will be.
            identity: all that decides the result of a cell beside its key, in terms of JSON.
            overwrite: forget what the folder has.

        Raises:
            UserError: the folder holds an evaluation of something else, or cannot be written.
        """
        self._path = folder / CELLS
        self._cells: dict[str, dict[str, Any]] = {}
        identity = json.loads(json.dumps(identity))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [] if overwrite or not self._path.exists() else _whole_lines(self._path)
            if lines and lines[0].get("identity") != identity:
                raise UserError(_other_evaluation(self._path, lines[0].get("identity"), identity))
            for line in lines[1:]:
                self._cells[_name(line["key"])] = line["result"]
            # Written anew, without the half line that an interruption may have left.
            _write_lines(self._path, [{"identity": identity}, *lines[1:]])
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}. Give another folder with --output.") from None

    def get(self, key: Key) -> dict[str, Any] | None:
        """The result of a cell, or None where it is not known yet."""
        return self._cells.get(_name(key))

    def add(self, key: Key, result: Mapping[str, Any]) -> None:
        """Keeps the result of a cell, on disk as well."""
        self._cells[_name(key)] = dict(result)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": dict(key), "result": dict(result)}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write to {self._path}: {error.strerror}. Make room there; the same command goes on from here."
            ) from None


def write_json(path: Path, value: Any) -> None:
    """Writes a file in one go."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def _name(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    part.replace(path)


def _other_evaluation(path: Path, old: Any, new: Mapping[str, Any]) -> str:
    old = old if isinstance(old, dict) else {}
    changes = [
        f"{name}: {old.get(name, 'not set')!r} there, {new.get(name, 'not set')!r} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    return (
        f"{path} has results of another evaluation:\n  " + "\n  ".join(changes) + "\nGive another --output, or "
        "--overwrite to forget them."
    )
