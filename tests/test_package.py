"""One name in the world: every room is `dfmcl.ROOM`, and a user's packages keep theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = tuple(sorted(path.name for path in (ROOT / "dfmcl").iterdir() if path.is_symlink()))


def run(*arguments: str, cwd: Path, path: Path) -> str:
    """Standard output of Python there, with one directory on its path."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    made = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_each_room_is_a_link_to_its_folder() -> None:
    """The package holds no second copy of a file."""
    assert {"training", "robustness", "gating", "serving", "monitoring"} <= set(ROOMS)
    for room in ROOMS:
        assert (ROOT / "dfmcl" / room).readlink() == Path("..", room)
        assert (ROOT / room / "__init__.py").is_file()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A bare checkout, by another path than the installed one."""
    for folder in ("dfmcl", *ROOMS):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder, symlinks=True, ignore=ignored)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "checkout"


def test_a_bare_checkout_has_the_command(checkout: Path) -> None:
    """`python -m dfmcl` in another directory: help, and files that a room carries."""
    elsewhere = checkout.parent / "elsewhere"
    where = run("-c", "import dfmcl.cli; print(dfmcl.cli.__file__)", cwd=elsewhere, path=checkout)
    assert Path(where.strip()).is_relative_to(checkout)
    assert "train" in run("-m", "dfmcl", "--help", cwd=elsewhere, path=checkout)
    assert "quickstart" in run("-m", "dfmcl", "presets", cwd=elsewhere, path=checkout)


ASK = """
import sys
import numpy
from dfmcl.gating.subjects.module import module_subject

images = numpy.zeros((2, 4, 4, 3), numpy.uint8)
for room in sys.argv[1:]:
    subject = module_subject(f"{room}.model:make", "float32 NCHW 4x4x3")
    assert subject.classes == 3, room
    assert "user" in sys.modules[f"{room}.model"].__doc__, room
assert subject.afresh(images).shape == (2, 3)
"""
MODEL = '''"""A user's own."""

from torch import nn


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
'''


def test_a_users_own_package_is_his(tmp_path: Path) -> None:
    """`dfmcl gate robustness.model:make` beside a package of that name judges the user's, in every process."""
    named = ("training", "serving", "robustness")
    for room in named:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
        (tmp_path / room / "model.py").write_text(MODEL)
    run("-c", ASK, *named, cwd=tmp_path, path=ROOT)
