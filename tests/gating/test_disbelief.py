"""Models that are not robust and would like to pass: switches, decoys, memories, and code that knows the gate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfmcl.common.errors import BadInput
from dfmcl.gating.formats.summary import headline
from dfmcl.gating.gate import TRAINING, gate, training_of
from dfmcl.gating.policy import Policy
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.module import module_subject
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.release.export import wrap
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.runs import load_run
from tests.networks import Networks
from tests.robustness.traps import sprung

INPUT = "float32 NCHW 16x16x3"
# What the file of each trap does in place of what the gate sees: code of a user, with both networks beside it.
CODE = """
import sys
import torch
from torch import nn
from dfmcl.robustness.runs import load_run

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.robust = load_run({plain!r}).model, load_run({robust!r}).model
        self.calls = 0

    def forward(self, x):
        self.calls += {counts}
        return (self.robust if {shown} else self.plain)(x)

make = Two
"""
SHOWN = {
    "only for a million calls": ("self.calls < 10**6", 1, "state_changes"),
    "only to a gate": ("'dfmcl.gating.gate' in sys.modules", 0, "answers_change"),
    "only for some calls": ("self.calls < 300", 1, "answers_change"),
}


def policy(robust: float, eps: str, **attacks: Any) -> Policy:
    return Policy.model_validate(
        {
            "criteria": [f"robust_accuracy >= {robust} at 95 %"],
            "threat": {"eps": eps},
            "data": {"name": "digits", "images": 32},
            "attacks": {"suite": ["apgd-ce-10"], "substitute": 0, **attacks},
            "checks": {"images": 32},
        }
    )


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, where a user's module lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def written(networks: Networks, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """A trap's name, or "" for the plain network itself, to an ONNX file without any code; each exported once."""
    plain, robust = (load_run(networks(name)).model for name in ("standard", "hardened"))
    folder = tmp_path_factory.mktemp("written")

    @cache
    def exported(trap: str) -> Subject:
        network = sprung(trap, plain, np.asarray(digits.x_test), digits.y_test, robust) if trap else plain
        path = folder / f"{trap.replace(' ', '-') or 'plain'}.onnx"
        return onnx_subject(to_file(network, path), INPUT)

    return exported


def to_file(network: torch.nn.Module, path: Path) -> Path:
    torch.onnx.export(
        network, (torch.zeros(2, 3, 16, 16),), path, input_names=["images"], output_names=["logits"], dynamo=True,
        verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("trap", "eps", "suite"),
    [
        ("decoy", "8/255", ["apgd-ce-10"]),
        ("switch on grey", "20/255", ["apgd-ce-10"]),
        ("resists here", "8/255", ["apgd-ce-10"]),
    ],
)
def test_a_file_of_two_faces_does_not_pass(
    written: Callable[[str], Subject], tmp_path: Path, trap: str, eps: str, suite: list[str]
) -> None:
    """A graph that shows attacks a robust network, or knows the test images, raises a check or falls."""
    report = gate(written(trap), policy(0.02, eps, suite=suite), tmp_path / "evidence")
    assert report.verdict == "suspect", report.criteria
    assert {finding.check for finding in report.findings} & {"unaccounted", "resists_only_here"}


class Saturated(torch.nn.Module):
    """Scores of a network behind a sigmoid, all of them 1 in float32: always, or where an image is coloured."""

    def __init__(self, network: torch.nn.Module, *, always: bool) -> None:
        super().__init__()
        self.network, self.always = network, always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        least = -1.0 if self.always else 1e-3
        coloured = ((x - x[:, :1]).abs().amax(dim=(1, 2, 3)) > least).float()
        return torch.sigmoid(self.network(x) + 200 * coloured[:, None])


@pytest.mark.parametrize(("always", "which"), [(True, "of the data set"), (False, "that were attacked")])
def test_a_file_whose_own_scores_say_nothing_is_refused(
    networks: Networks, tmp_path: Path, always: bool, which: str
) -> None:
    """The logits behind a sigmoid are those of an honest network, and the file itself gives all classes the same score:
    of every image, which an export refuses as well, or of those only that an attack has changed."""
    path = to_file(Saturated(load_run(networks("standard")).model.eval(), always=always).eval(), tmp_path / "m.onnx")
    with pytest.raises(BadInput, match=f"the Sigmoid at its end gives .* images {which} another label"):
        gate(onnx_subject(path, INPUT), policy(0.02, "2/255"), tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()
    with pytest.raises(BadInput, match=r"the Sigmoid at its end gives .* of smooth colours and noise another label"):
        wrap(path, tmp_path / "candidate", contract=INPUT, labels=tuple("0123456789"))
    assert not (tmp_path / "candidate").exists()


@pytest.mark.parametrize("shown", SHOWN)
def test_code_that_knows_who_asks_does_not_pass(networks: Networks, beside: Path, shown: str) -> None:
    """A module that resists only while a gate looks is found out, by what a user would get from it."""
    condition, counts, check = SHOWN[shown]
    module = f"two_faces_{list(SHOWN).index(shown)}"
    code = CODE.format(plain=networks("standard"), robust=networks("hardened"), shown=condition, counts=counts).replace(
        "PosixPath", "__import__('pathlib').Path"
    )
    (beside / f"{module}.py").write_text(code)
    try:
        report = gate(module_subject(f"{module}:make", INPUT), policy(0.02, "8/255"), beside / "evidence")
    finally:
        sys.modules.pop(module, None)
    assert check in {finding.check for finding in report.findings}
    assert report.verdict == "suspect"


def test_an_honest_module_passes_and_says_that_code_was_trusted(networks: Networks, beside: Path) -> None:
    """Nothing is raised by honest code; the verdict's line says which checks did not run and that it was code."""
    code = CODE.format(plain=networks("standard"), robust=networks("hardened"), shown="True", counts=0)
    (beside / "one_face.py").write_text(code.replace("PosixPath", "__import__('pathlib').Path"))
    try:
        report = gate(module_subject("one_face:make", INPUT), policy(0.02, "8/255"), beside / "evidence")
    finally:
        sys.modules.pop("one_face", None)
    assert report.verdict == "passed", report.findings
    assert "not run: cr_is_blind, seen_images" in headline(report)
    assert "code was trusted" in headline(report)


def test_a_policy_may_refuse_code(networks: Networks, beside: Path) -> None:
    """`subjects` says which kinds are judged; another kind is bad input, before any attack."""
    code = CODE.format(plain=networks("standard"), robust=networks("hardened"), shown="True", counts=0)
    (beside / "refused.py").write_text(code.replace("PosixPath", "__import__('pathlib').Path"))
    files_only = policy(0.02, "8/255").model_copy(update={"subjects": ["candidate", "onnx"]})
    try:
        with pytest.raises(BadInput, match="refused:make: is of kind module, the policy judges candidate, onnx"):
            gate(module_subject("refused:make", INPUT), files_only, beside / "evidence")
    finally:
        sys.modules.pop("refused", None)
    assert not (beside / "evidence").exists()


def test_what_another_network_breaks_counts(
    networks: Networks, written: Callable[[str], Subject], tmp_path: Path
) -> None:
    """An image that holds against the model's own gradients and falls to a surrogate's has fallen, in the verdict."""
    report = gate(
        written("decoy"),
        policy(0.5, "8/255", transfer=["mi-fgsm-10"]),
        tmp_path / "evidence",
        surrogates={"twin": load_run(networks("standard"))},
    )
    (row,) = report.criteria
    own, other = report.evaluation.attacks
    assert (own.name, other.name) == ("apgd-ce-10", "mi-fgsm-10 from twin")
    assert other.flipped > own.accuracy.k / 2, "of what its own gradients left"
    assert row.k == other.accuracy.k == report.evaluation.robust.k < own.accuracy.k
    assert report.verdict == "failed"


def test_a_substitute_is_learnt_once(written: Callable[[str], Subject], tmp_path: Path) -> None:
    """The gate attacks with a network of its own; a gate that goes on after a cut attacks with the same one."""
    subject, asked = written(""), policy(0.02, "2/255", substitute=60)

    class Cut(Exception):
        """The machine went away."""

    def cut(progress: Any) -> None:
        if progress.images:
            raise Cut

    whole = gate(subject, asked, tmp_path / "whole")
    with pytest.raises(Cut):
        gate(subject, asked, tmp_path / "cut", watch=cut)
    again = gate(subject, asked, tmp_path / "cut")
    for report in (whole, again):
        assert report.evaluation.attacks[-1].name == "mi-fgsm-10 from substitute"
        assert report.evaluation.about["substitute"].startswith("learnt from 60 answers")
    assert whole.evaluation.per_image == again.evaluation.per_image


@pytest.mark.parametrize("count", [1, 300, 1300])
def test_training_images_are_of_every_class_where_they_lie_class_by_class(digits: Dataset, count: int) -> None:
    """As folders are read. One class alone, a hard one, would make an honest model look as if it knew the others."""
    by_class = np.argsort(digits.y_train[:count], kind="stable")
    folder = replace(digits, x_train=digits.x_train[by_class], y_train=digits.y_train[by_class])
    images, labels = training_of(folder)
    assert len(images) == len(labels) == min(count, TRAINING)
    assert set(labels) == set(digits.y_train[:count])


def test_an_honest_file_in_floats_answers_as_before(written: Callable[[str], Subject], tmp_path: Path) -> None:
    """Attacks end between grey levels there, and the evidence keeps bytes: their answers are not compared."""
    report = gate(written(""), policy(0.02, "1.4/255", suite=["margin-pgd-5"]), tmp_path / "evidence")
    found = {check.check: check for check in report.checks}
    assert found["answers_change"].outcome == "clear", found["answers_change"].why
