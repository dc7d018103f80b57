"""A network of a user's own as the one that is trained: `module:callable`, by commands, and what is refused of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.robustness.models import Classifier, ModelSpec, build_network
from dfmcl.robustness.runs import load_run

CODE = '''
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1))
        self.deep = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.top = nn.Linear(32, 10)

    def forward(self, x):
        return self.top(self.deep(self.body(2 * x - 1)).mean((2, 3)))

def make():
    return Small()
'''  # fmt: skip
TINY = [
    "model.arch=mine:make", "masking.layer=deep", "data.train_images=400", "optimization.epochs=3",
    "heldout.images=20", "heldout.attack_steps=1",
]  # fmt: skip


def dfmcl(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and words of a command that a user gives in this folder."""
    command = [str(Path(sys.executable).with_name("dfmcl")), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: mine.py, and a run of its network, as `dfmcl train` makes it there."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.py").write_text(CODE)
    told = [word for option in TINY for word in ("--set", option)]
    code, said = dfmcl(folder, "train", "quickstart", "--out", "run", *told)
    assert code == 0, said
    return folder


def test_it_is_measured_and_exported(home: Path) -> None:
    """The code runs where its user names it again; the candidate answers as the run does, and needs it no more."""
    code, said = dfmcl(home, "evaluate", "run", "--images", "20", "--attack", "fgsm", "--arch", "mine:make")
    assert code == 0, said
    code, said = dfmcl(home, "export", "run", "--out", "candidate", "--arch", "mine:make")
    assert (code, "100.0 % equal labels" in said) == (0, True), said


def test_no_manifest_runs_code_by_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names what its maker pleased; nothing is imported until the reader says the same name."""
    monkeypatch.chdir(home)
    with pytest.raises(BadInput, match=r"made by code.*--arch mine:make"):
        load_run(home / "run")
    assert "mine" not in sys.modules
    with pytest.raises(BadInput, match="its network is mine:make, not os:getcwd"):
        load_run(home / "run", code="os:getcwd")
    with pytest.raises(BadInput, match="made by code"):
        Classifier(ModelSpec("mine:make", 64, 10, (16, 16, 3), (0.0,) * 3, (1.0,) * 3))
    assert "mine" not in sys.modules
    code, said = dfmcl(home, "export", "run", "--out", "other")
    assert (code, "--arch mine:make" in said) == (2, True), said


def test_code_that_answers_otherwise_is_no_longer_the_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another activation takes the same weights, and is another network; the same one in other words is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE.replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(BadInput, match="mine:make answers otherwise than when the run was trained"):
        load_run(home / "run", code="mine:make")
    monkeypatch.delitem(sys.modules, "mine")
    (tmp_path / "mine.py").write_text("# mine\n" + CODE.replace("2 * x - 1", "x + x - 1"))
    importlib.invalidate_caches()
    assert load_run(home / "run", code="mine:make").input_shape == (16, 16, 3)
    monkeypatch.delitem(sys.modules, "mine")


WRONG = {
    "raise ValueError('no')": "cannot be made: ValueError: no",
    "raise SystemExit(0)": "cannot be made: SystemExit: 0",
    "return 3": "returned a int",
    "return Fixed(lambda x: x.mean((2, 3)))": "gave float32 \\(2, 3\\); expected float32 \\(2, 10\\)",
    "return Fixed(lambda x: x.mean().expand(2, 10).double())": "gave float64",
    "return Fixed(lambda x: [x])": "gives a list",
    "return Fixed(lambda x: x.detach().mean((1, 2, 3))[:, None].expand(2, 10) * self_scale)": "no gradient reaches",
    "return Fixed(lambda x: x.reshape(7, -1))": "cannot take float32 NCHW \\(2, 3, 16, 16\\) in training mode",
    "return Fixed(lambda x: x.flatten(1)[:, :10] if module.training else None)": "gives a NoneType",
}  # fmt: skip


@pytest.mark.parametrize("body", WRONG)
def test_what_cannot_be_trained_is_told_before_it_is(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault of the code is one line, and exit code 2, before the first step."""
    (tmp_path / "theirs.py").write_text(
        "import torch\nfrom torch import nn\n"
        "self_scale = nn.Parameter(torch.ones(10))\n"
        "class Fixed(nn.Module):\n    def __init__(self, function):\n        super().__init__()\n"
        "        self.function = function\n        self.weight = self_scale\n"
        "    def forward(self, x):\n        global module\n        module = self\n        return self.function(x)\n"
        f"def make():\n    {body}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    with pytest.raises(BadInput, match=WRONG[body]):
        build_network(ModelSpec("theirs:make", 64, 10, (16, 16, 3), (0.0,) * 3, (1.0,) * 3), "theirs:make")
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
