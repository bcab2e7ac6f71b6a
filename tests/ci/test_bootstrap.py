""".ci/bootstrap, run on a project that installs in a second and needs no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).parents[2] / ".ci" / "bootstrap"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

BACKEND = """
import zipfile

METADATA = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: dev\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{wheel_directory}/tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_is_installed.py", "")
        wheel.writestr("tiny-1.dist-info/METADATA", METADATA)
        wheel.writestr("tiny-1.dist-info/WHEEL", WHEEL)
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    return "tiny-1-py3-none-any.whl"

build_wheel = build_sdist = build_editable
"""


def write_command(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


class Project:
    """A folder with a bootstrap of its own, on a machine whose only good Python is one of pyenv's versions."""

    def __init__(self, root: Path):
        self.root = root
        self.stamp = root / ".venv" / "bootstrap"
        (root / ".ci").mkdir(parents=True)
        shutil.copy(BOOTSTRAP, root / ".ci")
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "backend.py").write_text(BACKEND)
        shims = root / "pyenv" / "shims"
        shims.mkdir(parents=True)
        for name in ("python3.12", "python3.13", "python3.14"):
            write_command(shims / name, f"echo 'pyenv: {name}: command not found' >&2; exit 127")
        old = 'case "$*" in *ensurepip*) exit 1;; *) echo 3.11.7;; esac'
        for name in ("python3", "python", "python3.11"):
            write_command(shims / name, old)
        write_command(shims / "uv", "exit 1")
        version = root / "pyenv" / "versions" / "3.12.99" / "bin"
        version.mkdir(parents=True)
        (version / "python").symlink_to(sys._base_executable)  # pyright: ignore[reportAttributeAccessIssue]

    def bootstrap(self, *extras: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [".ci/bootstrap", *extras],
            cwd=self.root,
            env={
                "PATH": f"{self.root}/pyenv/shims:{os.defpath}",
                "HOME": str(self.root),
                "PYENV_ROOT": str(self.root / "pyenv"),
                "PIP_NO_INDEX": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def has_installed(self) -> bool:
        command = [".venv/bin/python", "-c", "import tiny_is_installed"]
        return subprocess.run(command, cwd=self.root, capture_output=True).returncode == 0


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "a project")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("installed"))
    result = project.bootstrap("dev")
    assert result.returncode == 0, result.stderr
    return project


def test_a_python_of_pyenv_is_found_behind_shims_that_refuse(installed):
    assert installed.has_installed()
    assert "dev" in installed.stamp.read_text().split()


def test_a_second_call_does_nothing_and_keeps_what_the_first_installed(installed):
    before = installed.stamp.stat().st_mtime_ns
    result = installed.bootstrap()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert installed.stamp.stat().st_mtime_ns == before


def test_a_changed_pyproject_is_installed_into_the_same_environment(installed):
    marker = installed.root / ".venv" / "still-here"
    marker.touch()
    (installed.root / "pyproject.toml").write_text(PYPROJECT + "# changed\n")
    assert "installing" in installed.bootstrap().stderr
    assert installed.bootstrap().stderr == ""
    assert "dev" in installed.stamp.read_text().split()
    assert marker.exists()


def test_an_unfinished_environment_is_made_anew(installed):
    leftover = installed.root / ".venv" / "half-made"
    leftover.touch()
    installed.stamp.write_text("unfinished\n")
    assert "making .venv" in installed.bootstrap("dev").stderr
    assert installed.has_installed()
    assert not leftover.exists()


def test_a_failed_installation_is_reported_and_leaves_the_environment_unfinished(project):
    (project.root / "backend.py").write_text("raise SystemExit('this backend is broken')")
    result = project.bootstrap()
    assert result.returncode != 0
    assert "pip could not install" in result.stderr
    assert project.stamp.read_text() == "unfinished\n"


@pytest.mark.parametrize(("python", "what_it_is"), [("python3.11", "3.11.7"), ("python9", "not a Python that runs")])
def test_a_python_named_by_mistake_is_refused_before_anything_is_made(project, python, what_it_is):
    result = project.bootstrap(PYTHON=python)
    assert result.returncode == 1
    assert f"PYTHON={python} is {what_it_is}; a Python 3.12 or later" in result.stderr
    assert not (project.root / ".venv").exists()


def test_without_any_python_the_error_says_what_to_install(project):
    shutil.rmtree(project.root / "pyenv" / "versions")
    result = project.bootstrap()
    assert result.returncode == 1
    assert "Install Python 3.12 or later" in result.stderr
    assert "PYTHON=/path/to/python3.12" in result.stderr
    assert not (project.root / ".venv").exists()
