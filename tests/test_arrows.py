"""Rooms meet through files: what may import what, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("robustness", "training", "gating", "serving", "monitoring")
TOP = ("dfmcl", *ROOMS, "benchmarks", "tests", "quickstart")
ALLOWED = {
    "robustness": set(),
    "training": {"robustness"},
    "gating": {"robustness"},
    "serving": {"robustness.reader"},  # one way to read what somebody else wrote
    "monitoring": {
        *("robustness", "gating.attestation", "gating.probes", "gating.trust"),
        *("serving.client", "serving.gateway_client", "serving.errors"),
    },
}
EXCEPTIONS = {
    "serving/export.py": {"robustness"},
    "serving/card.py": {"robustness.text"},  # one way to keep names from being markup, in reports and cards
    "serving/gateway_config.py": {"robustness.config", "robustness.errors"},
    "serving/images.py": {"robustness.pictures"},  # one definition of an image, in training and at the gateway
} | {
    f"serving/{name}.py": {"gating.attestation", "gating.probes"}
    for name in ("known_answers", "parity", "promotion", "repair", "status", "supervisor")
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(source: str) -> set[str]:
    """All modules a source imports, also inside functions; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(path: str, source: str) -> set[str]:
    """Imports of ours that no arrow allows; a room is `dfmcl.ROOM` and nothing else."""
    room = path.partition("/")[0]
    allowed = {f"dfmcl.{name}" for name in {room} | ALLOWED[room] | EXCEPTIONS.get(path, set())}
    ours = {name for name in imports(source) if name.partition(".")[0] in TOP}
    return {name for name in ours if not any(name == ok or name.startswith(f"{ok}.") for ok in allowed)}


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in FILES])
def test_no_forbidden_arrow(path: str) -> None:
    """A room imports only what its arrows allow."""
    assert not forbidden(path, (ROOT / path).read_text())


def test_a_room_has_one_name() -> None:
    """What may import every room imports it as `dfmcl.ROOM` too: under two names a module would be two modules."""
    others = [ROOT / "quickstart.py", *(ROOT / "deploy").rglob("*.py")]
    others += [path for folder in ("dfmcl/cli", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    found = {path: {name for name in imports(path.read_text()) if name.partition(".")[0] in ROOMS} for path in others}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("robustness/x.py", "import dfmcl.training"),
        ("robustness/x.py", "from robustness.runs import load_run"),
        ("training/x.py", "def f():\n    from dfmcl.gating.policy import Policy"),
        ("serving/promotion.py", "from dfmcl.robustness.runs import load_run"),
        ("serving/client.py", "import dfmcl.gating.attestation"),
        ("serving/x.py", "from dfmcl.cli import main"),
        ("monitoring/x.py", "from dfmcl.serving import export"),
        ("monitoring/x.py", "from dfmcl.gating import gate"),
        ("gating/x.py", "from tests.linear import Linear"),
    ],
)
def test_a_forbidden_arrow_is_noticed(path: str, source: str) -> None:
    """The check above can fail."""
    assert forbidden(path, source)


LIGHT = {
    "dfmcl.gating.policy, dfmcl.gating.verdict, dfmcl.gating.attestation, dfmcl.gating.report": {
        "torch",
        "onnxruntime",
    },
    "dfmcl.gating.formats, dfmcl.gating.github": {"torch", "onnxruntime"},
    "dfmcl.serving.client": {"torch", "onnx", "onnxruntime", "dfmcl.robustness", "dfmcl.gating", "pydantic", "typer"},
    "dfmcl.gating.attestation": {"torch", "numpy", "scipy", "pydantic"},
    "dfmcl.serving.gateway, dfmcl.serving.images": {"torch", "onnxruntime", "torchvision"},
    "dfmcl.robustness.pictures, dfmcl.robustness.folder, dfmcl.robustness.archive": {"torch", "torchvision"},
    "dfmcl.cli": {"torch", "numpy", "pydantic", "tritonclient", "rich.progress"},
}


@pytest.mark.parametrize("modules", LIGHT)
def test_light_modules_stay_light(modules: str) -> None:
    """What decides, verifies or asks the server loads no training library, directly or through others."""
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not LIGHT[modules] & set(loaded.stdout.split())
