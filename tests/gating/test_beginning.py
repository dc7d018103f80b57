"""`dfmcl init`: its files are read by the commands that they are for, and it repairs nothing by writing over."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from dfmcl.cli.command import app
from dfmcl.gating.assumed import Assumed
from dfmcl.gating.beginning import PIPELINES
from dfmcl.gating.policy import load_policy
from dfmcl.gating.signing.keys import keygen
from dfmcl.gating.signing.trust import load_trust
from dfmcl.robustness.contract import InputContract
from tests.gating.test_subject import Tiny, to_onnx

ASKED = ("--data", "own.npz", "--eps", "4/255", "--at-least", "0.3")


def init(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["init", *arguments])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a model and images, to which the model gives their own labels."""
    model = Tiny()
    to_onnx(tmp_path / "my model.onnx", model, torch.zeros(2, 3, 16, 16))
    images = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8)
    with torch.no_grad():
        answers = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).argmax(1).numpy()
    np.savez(tmp_path / "own.npz", x_test=images, y_test=answers, classes=np.array(list("abcde")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("service", "file"), PIPELINES.items())
def test_what_is_written_is_what_the_commands_read(place: Path, service: str, file: str) -> None:
    """The policy is the assumed one, the trust file holds with a key, the pipeline's commands run as they stand."""
    done = init("my model.onnx", *ASKED, "--ci", service)
    assert done.exit_code == 0, done.output
    policy = load_policy(place / "gate.toml")
    contract = InputContract.parse("float32 NCHW 16x16x3")
    assert policy.digest == Assumed.of("own.npz", "4/255", None, "0.3").policy(contract, checked=None).digest
    assert policy.checks.images == 128
    keygen(place / "release")
    assert load_trust(place / "trust.toml").policies == frozenset({policy.digest})
    assert (place / "labels.txt").read_text() == "a\nb\nc\nd\ne\n"
    pipeline: Any = yaml.safe_load((place / file).read_text())
    if service == "github":
        step = next(one for one in pipeline["jobs"]["gate"]["steps"] if "dfmcl export" in one.get("run", ""))
        script = step["run"]
        assert step["env"] == {"DFMCL_KEY": "${{ secrets.DFMCL_KEY }}"}
    else:
        script = pipeline["robustness"]["script"][1]
    # A stand-in for the installed command notes its arguments; the shell between them is the pipeline's own.
    stand_in = place / "bin" / "dfmcl"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word" >> called; done\necho END >> called\n')
    stand_in.chmod(0o755)
    for key, signing in (("", []), ("a\nb c", ["--key", "release.key"])):
        (place / "called").unlink(missing_ok=True)
        environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin", "DFMCL_KEY": key}
        subprocess.run(["sh", "-ec", script], cwd=place, env=environment, check=True)
        export, gate, _ = (place / "called").read_text().split("END\n")
        assert shlex.join(gate.split("\n")[:-1]) == shlex.join(
            ["gate", "candidate", "--policy", "gate.toml", "--out", "evidence", *signing]
        )
    assert (place / "release.key").read_text() == "a\nb c\n"
    made = CliRunner().invoke(app, export.split("\n")[:-1])
    assert made.exit_code == 0, made.output
    assert (place / "candidate" / "manifest.json").is_file()


def test_nothing_is_written_over(place: Path) -> None:
    """Each file that stands in the way is named before the model is opened, and none other is written."""
    for name in ("gate.toml", "trust.toml", "labels.txt", ".gitlab-ci.yml"):
        (place / name).write_text("mine")
        done = init("no.onnx", *ASKED, "--ci", "gitlab")
        assert (done.exit_code, done.output.startswith(f"dfmcl: {name}: is there already")) == (2, True), done.output
        (place / name).unlink()
    assert sorted(path.name for path in place.iterdir()) == ["my model.onnx", "own.npz"]


def test_a_model_that_does_not_fit_gets_no_files(place: Path) -> None:
    """Another size, too few labels, an unknown service, no model: one line, exit code 2, nothing written."""
    shutil.copy(place / "my model.onnx", place / "model.onnx")
    (place / "few.txt").write_text("a\nb\n")
    for words, message in (
        (("model.onnx", *ASKED, "--input", "float32 NCHW 32x32x3"), "32"),
        (("model.onnx", *ASKED, "--labels", "few.txt"), "answers with 5 logits, there are 2 labels"),
        (("model.onnx", *ASKED, "--ci", "jenkins"), "--ci jenkins: choose github or gitlab"),
        (("model.onnx", *ASKED, "--out", "nowhere"), "--out nowhere: is no directory"),
        (("model.onnx", "--data", "own.npz", "--eps", "4", "--at-least", "0.3"), "--eps 4"),
        ((str(place), *ASKED), "manifest.json"),
        (("own:model", *ASKED), "own"),
    ):
        done = init(*words)
        assert (done.exit_code, "internal error" in done.output) == (2, False), (words, done.output)
        assert message in " ".join(done.output.split()), (words, done.output)
    assert sorted(path.name for path in place.iterdir()) == ["few.txt", "model.onnx", "my model.onnx", "own.npz"]


@pytest.mark.parametrize("kind", ["torchscript", "program", "weights"])
def test_files_of_pytorch_begin_too(place: Path, kind: str) -> None:
    """They are judged as they are, with all that says what they are: the gate's line opens the same model."""
    model, example = Tiny().eval(), torch.zeros(2, 3, 16, 16)
    file, more = {"torchscript": "m.pt", "program": "m.pt2", "weights": "m.pth"}[kind], list[str]()
    if kind == "torchscript":
        torch.jit.trace(model, example).save(file)
    elif kind == "program":
        free = {0: torch.export.Dim("n")}
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=(free,)), file)
    else:
        torch.save(model.state_dict(), file)
        more = ["--arch", "tests.gating.test_subject:Tiny"]
    done = init(file, *ASKED, "--input", "float32 NCHW 16x16x3", *more)
    assert done.exit_code == 0, done.output
    pipeline: Any = yaml.safe_load((place / ".github/workflows/robustness.yml").read_text())
    script = next(one["run"] for one in pipeline["jobs"]["gate"]["steps"] if "dfmcl gate" in one.get("run", ""))
    assert "export" not in script
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("dfmcl gate")))
    assert words[:3] == ["dfmcl", "gate", file]
    assert [words[words.index(option) + 1] for option in ("--labels", "--input")] == [
        "labels.txt",
        "float32 NCHW 16x16x3",
    ]
    assert ("--arch" in words) == (kind == "weights")
