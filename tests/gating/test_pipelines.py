"""Pipelines as they are shipped, and docs/ci.md as it is written: parsed, and their commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfmcl.common.files import sha256_of
from dfmcl.gating.formats.registry import FILES
from dfmcl.gating.signing.evidence import read_report
from tests.exports import Export

ROOT = Path(__file__).parents[2]
CI = ROOT / "deploy" / "ci"
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
POLICY = """
criteria = ["robust_accuracy >= {threshold} at 95 %"]
[threat]
eps = "2/255"
[data]
name = "digits"
images = 32
[attacks]
suite = ["fgsm", "pgd-2"]
substitute = 0
[checks]
images = 32
"""


def parsed(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CI / name).read_text(encoding="utf-8")))


ACTION, GITLAB = parsed("action.yml"), parsed("gitlab.yml")[".dfmcl-gate"]
STEP, UPLOAD = ACTION["runs"]["steps"]


class Pipeline:
    """What a service does with a template: its variables, its shell, its script."""

    def __init__(self, where: Path, kind: str) -> None:
        self.where, self.kind = where, kind

    def run(self, path: str = ENVIRONMENT["PATH"], **inputs: str) -> subprocess.CompletedProcess[str]:
        if self.kind == "github":
            shell, script = ["bash", "--noprofile", "--norc", "-eo", "pipefail"], STEP["run"]
            given = {name: str(entry.get("default", "")) for name, entry in ACTION["inputs"].items()} | inputs
            variables = {
                name: given[re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) \}\}", value)[1]]  # type: ignore[index]
                for name, value in STEP["env"].items()
            }
            variables |= {"GITHUB_ACTIONS": "true"}
            variables |= {
                "GITHUB_OUTPUT": str(self.where / "output"),
                "GITHUB_STEP_SUMMARY": str(self.where / "step.md"),
            }
        else:
            shell, script = ["bash", "-eo", "pipefail"], "\n".join(GITLAB["script"])
            variables = {**GITLAB["variables"], **{f"DFMCL_{name.upper()}": value for name, value in inputs.items()}}
        environment = {**ENVIRONMENT, **variables, "PATH": path, "TMPDIR": str(self.where / "tmp")}
        (self.where / "tmp").mkdir(exist_ok=True)
        return subprocess.run(
            [*shell, "-c", script], cwd=self.where, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(params=["github", "gitlab"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path, request.param)


@pytest.fixture(scope="module")
def candidate(standard_run: Path, export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_once(standard_run, tmp_path_factory.mktemp("pipeline") / "candidate")


def test_a_real_gate_passes_and_blocks(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """GitHub's step on a real candidate: 0 with summary and notice; 1 with an error at the policy's line; evidence."""
    pipeline = Pipeline(tmp_path, "github")
    for threshold, code in ((0.05, 0), (0.99, 1)):
        (tmp_path / "gate.toml").write_text(POLICY.format(threshold=threshold))
        made = pipeline.run(subject=str(candidate), run=str(standard_run), policy="gate.toml")
        assert made.returncode == code, made.stdout + made.stderr
        assert {path.name for path in (tmp_path / "evidence").iterdir()} == {
            "report.json",
            "probes.npz",
            "policy.toml",
            *FILES,
        }
        assert read_report(tmp_path / "evidence" / "report.json")[0].exit_code == code
        assert f"::{'error' if code else 'notice'} file=gate.toml,line={1 + code}," in made.stdout
    assert (tmp_path / "output").read_text() == "exit-code=0\nexit-code=1\n"
    summary = (tmp_path / "step.md").read_text()
    assert summary.index("### PASSED") < summary.index("### BLOCKED")


def test_a_real_gate_in_the_other_template(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """GitLab's job on a real candidate: 0 with the files that it collects; without a policy 2, in words."""
    pipeline = Pipeline(tmp_path, "gitlab")
    (tmp_path / "gate.toml").write_text(POLICY.format(threshold=0.05))
    made = pipeline.run(subject=str(candidate), run=str(standard_run), policy="gate.toml")
    assert made.returncode == 0, made.stdout + made.stderr
    for path in (*GITLAB["artifacts"]["paths"], *GITLAB["artifacts"]["reports"].values()):
        assert (tmp_path / path).exists()
    made = pipeline.run(subject=str(candidate), run=str(standard_run), policy="none.toml")
    assert made.returncode == 2
    assert "bad input, the model was not judged" in made.stdout
    assert "none.toml" in made.stderr


@pytest.mark.parametrize(
    ("ends", "inconclusive", "code"),
    [(0, "fail", 0), (1, "pass", 1), (2, "pass", 2), (3, "fail", 3), (3, "pass", 0), (4, "pass", 4), (5, "pass", 5)],
)
def test_exit_codes_reach_the_pipeline(pipeline: Pipeline, ends: int, inconclusive: str, code: int) -> None:
    """With a gate that ends so: only 0, and 3 where it is wanted, let a pipeline go on; 137, a killed one, does not."""
    for given, expected in ((ends, code), (137, 137)):
        path = stand_in(pipeline.where, f"exit {given}")
        made = pipeline.run(path, subject="c", policy="p", inconclusive=inconclusive)
        assert made.returncode == expected
        assert ("was not judged" in made.stdout) == (given not in (0, 1, 3, 4))
        assert ("not to be promoted" in made.stdout) == (given == 3 and code == 0)


def test_inputs_reach_the_gate_as_they_are(pipeline: Pipeline) -> None:
    """Every input becomes the option of its name; nothing in a value is run by the shell; what is empty is left out."""
    path = stand_in(pipeline.where, 'printf "%s\\n" "$@" > arguments')
    pipeline.run(path, subject="-c; touch ran", policy="$(touch ran)")
    assert (pipeline.where / "arguments").read_text().splitlines() == [
        *("gate", "--policy", "$(touch ran)", "--out", "evidence", "--", "-c; touch ran")
    ]
    assert not (pipeline.where / "ran").exists()
    pipeline.run(path, subject="c", policy="p", surrogates="a b", **{name: f"the {name}" for name in SINGLE})
    found = (pipeline.where / "arguments").read_text().splitlines()
    for name in SINGLE:
        assert found[found.index(f"--{name}") + 1] == f"the {name}"
    assert [found[at + 1] for at, word in enumerate(found) if word == "--surrogate"] == ["a", "b"]


SINGLE = ("run", "baseline", "input", "labels", "output", "arch", "queries")


def test_the_key_is_a_file_of_its_own_that_goes(tmp_path: Path) -> None:
    """GitHub's secret: the gate finds it in a file that nobody else reads, not in its environment; it is gone after."""
    path = stand_in(tmp_path, '[ "$6" = --key ] && cp -p "$7" seen; env > environment; exit 1')
    made = Pipeline(tmp_path, "github").run(path, subject="c", policy="p", key="-----BEGIN\nsecret\n-----END")
    assert made.returncode == 1
    assert (tmp_path / "seen").read_text() == "-----BEGIN\nsecret\n-----END\n"
    assert (tmp_path / "seen").stat().st_mode & 0o777 == 0o600
    assert "secret" not in (tmp_path / "environment").read_text()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_templates_say_what_services_need() -> None:
    """Composite action, evidence kept whatever the verdict, JUnit and metrics from the files that the gate writes."""
    assert ACTION["runs"]["using"] == "composite"
    assert STEP["shell"] == "bash"
    assert "${{" not in STEP["run"]
    assert UPLOAD["if"] == "always()"
    assert all(str(entry["description"]).endswith(".") for entry in ACTION["inputs"].values())
    assert GITLAB["artifacts"]["when"] == "always"
    reports = GITLAB["artifacts"]["reports"]
    assert {Path(reports["junit"]).name, Path(reports["metrics"]).name} <= set(FILES)
    workflow = parsed("workflow.yml")
    for step in (workflow["jobs"]["gate"]["steps"][-1], *yaml.safe_load(fenced("yaml")[0])):
        assert step["uses"].partition("/")[2].startswith("dfmcl/deploy/ci@")
        assert set(step["with"]) <= set(ACTION["inputs"])
        assert {name for name, entry in ACTION["inputs"].items() if entry.get("required")} <= set(step["with"])
    job = yaml.safe_load(fenced("yaml")[1])["gate"]
    assert job["extends"] == ".dfmcl-gate"
    assert set(job["variables"]) <= set(GITLAB["variables"])


def test_options_of_the_templates_exist() -> None:
    """Every option that a template passes is one of `dfmcl gate`."""
    shown = subprocess.run(["dfmcl", "gate", "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for script in (STEP["run"], "\n".join(GITLAB["script"])):
        options = set(re.findall(r"--[a-z]+", script))
        assert len(options) >= 9
        assert {option for option in options if option not in shown.stdout} == set()


def test_commands_of_the_page_run(tmp_path: Path) -> None:
    """Every file and command of docs/ci.md, in order: exit code 0 unless its comment says otherwise."""
    for text in fenced("toml"):
        name = re.match(r"# (\S+)\n", text)
        assert name is not None
        tomllib.loads(text)
        (tmp_path / name[1]).write_text(text, encoding="utf-8")
    lines = [line for block in fenced("sh") for line in block.splitlines()]
    assert len(lines) >= 10
    for line in lines:
        expected = int(line.rpartition(" ")[2]) if "# exit code" in line else 0
        made = subprocess.run(
            ["bash", "-ec", line],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert made.returncode == expected, f"{line}\n{made.stdout[-2000:]}\n{made.stderr[-2000:]}"
    baseline = read_report(tmp_path / "evidence-plain" / "report.json")[0].baseline
    assert baseline is not None
    assert baseline.report_sha256 == sha256_of(tmp_path / "evidence" / "report.json")
    # How many images the two gates have in common before the second one ends is a matter of their orders.
    assert len(baseline.newly_broken) == baseline.only_baseline <= baseline.held <= baseline.images <= 450
    assert (tmp_path / "models" / "digits" / "1" / "model.onnx").exists()


def test_the_page_knows_the_codes_and_files() -> None:
    """Each exit code has its line, each file of the evidence is named, and paths in backticks are there."""
    assert re.findall(r"^\| (\d) \|", PAGE, flags=re.MULTILINE) == ["0", "1", "2", "3", "4", "5"]
    for name in (*FILES, "report.json", "probes.npz", "attestation.intoto.jsonl"):
        assert name in PAGE
    named = re.findall(r"`((?:deploy|gating|docs)/[a-z/._]+)`", PAGE)
    assert len(named) >= 3
    assert {name for name in named if not (ROOT / name).exists()} == set()


def fenced(language: str) -> list[str]:
    return [str(block) for block in re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)]


def stand_in(where: Path, does: str) -> str:
    """A PATH on which `dfmcl` does that."""
    folder = where / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "dfmcl").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "dfmcl").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
