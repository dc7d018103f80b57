"""The commands of docs/training.md, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.runs import load_run
from dfmcl.training.config import preset_names

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_commands_of_the_page_run(tmp_path: Path) -> None:
    """Every command in a `sh` block, in order; exit code 0 unless the comment says otherwise; runs load afterwards."""
    digits = load_dataset("digits")
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "mine.npz", **{name: getattr(digits, name) for name in names})
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    text = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line]
    assert len(lines) >= 6
    for line in lines:
        command, _, comment = line.partition("#")
        expected = int(comment.rpartition(" ")[2]) if "exit code" in comment else 0
        made = subprocess.run(
            command.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert made.returncode == expected, f"{line}\n{made.stderr[-2000:]}"
    for name in ("first", "mine", "mobile", "cut"):
        load_run(tmp_path / "runs" / name)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_on_the_page(name: str) -> None:
    """A reader who chooses finds each preset there, but for the quickstart's inner ones."""
    assert f"`{name}`" in TEXT or name.startswith("quickstart_") or name == "cifar10_narrow"
