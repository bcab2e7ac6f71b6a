"""A new folder appears complete or not at all, and only one process makes it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from train.data.atomic import new_folder
from train.errors import UserError


def test_the_folder_appears_when_the_body_has_ended(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()
    assert (out / "file").read_text() == "content"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException):
    def fail(folder: Path) -> None:
        (folder / "file").write_text("content")
        raise error

    with pytest.raises(type(error)), new_folder(tmp_path / "out") as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    partial = tmp_path / ".out.partial"
    (partial / "deeper").mkdir(parents=True)
    (partial / "old").write_text("old")
    with new_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_two_at_once_are_refused_and_the_first_is_not_disturbed(tmp_path: Path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UserError, match="another process is making it"), new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_what_exists_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=r"exists; remove it first"), new_folder(path):
            pass
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"


def test_the_empty_current_folder_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path(".")) as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "here" / "file").read_text() == "new"


def test_a_full_disk_is_said_in_words_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"out cannot be written: the disk is full"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said_in_words(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    message = "cannot be written: Not a directory"
    with pytest.raises(UserError, match=message), new_folder(tmp_path / "file" / "out"):
        pass
