"""Rooms meet through files: what may import what, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("common", "robustness", "training", "gating", "release", "serving", "monitoring")
TOP = ("dfmcl", *ROOMS, "benchmarks", "tests", "quickstart")
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "robustness": {"common"},
    "training": {"common", "robustness"},
    "gating": {"common", "robustness"},
    "release": {"common", "gating.signing"},
    "serving": {"common", "release.candidate", "release.layout", "release.stores", "gating.signing"},
    "monitoring": {"common", "robustness", "gating.signing", "release.stores", "serving.clients"},
}
EXCEPTIONS = {
    "release/export.py": {"robustness"},  # a checkpoint becomes a file that answers alike
    "release/graphs.py": {"robustness.onnx_random"},  # where graphs hide inside a graph
    "release/parity.py": {"robustness.provider"},  # the same model on each provider
    # A server follows promotions: it tries what was promoted, and writes down what it had to give back.
    "serving/triton/supervisor.py": {"release.ledger", "release.promotion", "release.verification"},
    "serving/triton/known_answers.py": {"release.verification"},  # the type of what was promoted
    "serving/triton/mirror.py": {"release.ledger", "release.verification"},  # a copy is judged as its source is
}
OWN = ("__init__", "config", "metrics")  # of a room
CLIENTS = Path("serving/clients")  # a family that nothing chooses from, so it has no registry
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
        ("common/x.py", "from dfmcl.robustness import losses"),
        ("release/promotion.py", "from dfmcl.robustness.runs import load_run"),
        ("release/x.py", "from dfmcl.gating.policy import load_policy"),
        ("serving/x.py", "from dfmcl.release import promotion"),
        ("serving/x.py", "from dfmcl.cli import main"),
        ("serving/clients/x.py", "from dfmcl.robustness.data import Data"),
        ("monitoring/x.py", "from dfmcl.release import export"),
        ("monitoring/x.py", "from dfmcl.gating import gate"),
        ("gating/x.py", "from tests.linear import Linear"),
    ],
)
def test_a_forbidden_arrow_is_noticed(path: str, source: str) -> None:
    """The check above can fail."""
    assert forbidden(path, source)


def test_files_and_functions_are_short() -> None:
    """350 lines a file, unless its first words give the reason, and 80 a function, but for a dashboard's list."""
    ours = [*FILES, *(path for folder in ("dfmcl/cli", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]
    files = {path: path.read_text() for path in (*ours, ROOT / "quickstart.py")}
    long = {
        path.name for path, text in files.items() if text.count("\n") > 350 and "\n\nLong, because " not in text[:300]
    }
    assert long == set()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for text in files.values() for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert len(functions) > 1000
    assert {node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80} == set()


def test_a_class_name_means_one_thing() -> None:
    """No public class has another's name, but for the same table of two configurations."""
    nodes = [node for path in FILES for node in ast.parse(path.read_text()).body]
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef) and node.name[0] != "_")
    assert len(names) > 200
    assert {name for name, times in names.items() if times > 1} == {"DataSection", "ListenSection"}


def repeated(paths: Iterable[str]) -> set[str]:
    """Names of modules in several rooms, but for a room's own and for members of a family, which its folder names."""
    found = [Path(path) for path in paths]
    families = {CLIENTS, *(path.parent for path in found if path.name == "registry.py")}
    names = Counter(path.stem for path in found if path.parent not in families and path.stem not in OWN)
    return {name for name, times in names.items() if times > 1}


def test_a_module_name_means_one_thing() -> None:
    """No module has another's name, but for what a room is told and what its server tells Prometheus."""
    paths = [str(path.relative_to(ROOT)) for path in FILES]
    assert repeated(paths) == set()
    assert repeated([*paths, "release/verdict.py", "monitoring/config.py", "gating/subjects/policy.py"]) == {"verdict"}


POLICY = ("assumed", "policy", "verdict", "derivation")
SIGNING = ("attestation", "faults", "keys", "probes_file", "report", "statement", "trust")
FORMATS = ("registry", "github")
LIGHT = {
    ", ".join(f"dfmcl.common.{path.stem}" for path in sorted((ROOT / "common").glob("[a-z]*.py"))): {
        *("torch", "onnxruntime", "dfmcl.robustness"),
    },
    ", ".join(f"dfmcl.gating.{name}" for name in POLICY): {"torch", "onnxruntime"},
    ", ".join(f"dfmcl.gating.signing.{name}" for name in SIGNING): {"torch", "onnxruntime"},
    ", ".join(f"dfmcl.gating.formats.{name}" for name in FORMATS): {"torch", "onnxruntime"},
    "dfmcl.gating.signing.attestation": {"torch", "numpy", "scipy", "pydantic"},
    "dfmcl.release.layout, dfmcl.release.promotion, dfmcl.release.status": {"torch", "onnxruntime"},
    "dfmcl.serving.clients.triton": {
        *("torch", "onnx", "onnxruntime", "pydantic", "typer"),
        *("dfmcl.robustness", "dfmcl.gating", "dfmcl.release"),
    },
    "dfmcl.serving.gateway.service": {"torch", "onnxruntime", "torchvision", "dfmcl.robustness", "dfmcl.gating"},
    "dfmcl.robustness.folder, dfmcl.robustness.archive": {"torch", "torchvision"},
    "dfmcl.cli": {"torch", "numpy", "pydantic", "tritonclient", "rich.progress"},
}


@pytest.mark.parametrize("modules", LIGHT)
def test_light_modules_stay_light(modules: str) -> None:
    """What decides, verifies or asks the server loads no training library, directly or through others."""
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not LIGHT[modules] & set(loaded.stdout.split())
