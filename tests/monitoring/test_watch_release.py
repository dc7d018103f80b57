"""The gate's figures as the watch reads them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gating.gate import gate
from gating.policy import load_policy
from gating.subject import open_subject
from monitoring.release import read_release
from robustness.errors import BadInput
from robustness.files import sha256_of
from robustness.statistics import Share

MakeReport = Callable[..., Path]
NO_COUNTS = {"k": 3, "n": 2}


def test_the_figures_are_those_of_the_report(make_report: MakeReport) -> None:
    """Verdict, strictest thresholds at the release's radius, counts, ball, run and time are read as written."""
    release = read_release(make_report("ab" * 32))
    assert (release.state, release.checkpoint_sha256) == ("passed", "ab" * 32)
    assert (release.robust_threshold, release.clean_threshold) == (0.45, 0.9)
    assert (release.clean, release.robust) == (Share(97, 100), Share(55, 100))
    assert (release.norm, release.epsilon) == ("linf", "38/255")
    assert release.evaluated == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()


def test_a_report_of_the_real_gate_is_understood(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    """What the gate writes today is what the watch reads: no figure is lost between the rooms."""
    (run, candidate), policy = exported, tmp_path / "gate.toml"
    policy.write_text(
        """
        criteria = ["robust_accuracy >= 0.4 at 95 %"]
        statistics = "fixed"
        [threat]
        eps = "8.4/255"
        [data]
        name = "digits"
        images = 20
        [attacks]
        suite = ["fgsm"]
        """
    )
    report = gate(open_subject(str(candidate), run=run), load_policy(policy), tmp_path / "evidence")
    release = read_release(tmp_path / "evidence")
    assert release.state == report["verdict"] == "failed"  # its weights are random
    assert release.checkpoint_sha256 == sha256_of(run / "checkpoint.safetensors")
    assert (release.epsilon, release.robust_threshold, release.clean_threshold) == ("8/255", 0.4, None)
    assert (release.robust.n, release.robust.k) == (20, report["evaluation"]["robust"]["k"])


def test_a_policy_without_a_clean_criterion_has_no_clean_threshold(make_report: MakeReport) -> None:
    """What the policy does not ask for is not exported as 0."""
    report = make_report(criteria=[{"metric": "robust_accuracy", "threshold": 0.4, "eps": None, "class": None}])
    assert read_release(report).clean_threshold is None


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "format": ({"format": "dfmcl.report/9"}, "format is 'dfmcl.report/9'; expected 'dfmcl.report/2'"),
        "no figures": ({"evaluation": {}}, "not a gate report (lacks 'threat'); run dfmcl gate again"),
        "time": ({"created": "today"}, "not a gate report (Invalid isoformat string: 'today'); run dfmcl gate again"),
        "verdict": (
            {"verdict": "splendid"},
            "not a gate report (its verdict or counts are impossible); run dfmcl gate again",
        ),
        "counts": (
            {"evaluation": {"threat": {"norm": "linf", "label": "1/255"}, "clean": NO_COUNTS, "robust": NO_COUNTS}},
            "not a gate report (its verdict or counts are impossible); run dfmcl gate again",
        ),
        "criteria": (
            {"criteria": [{"threshold": 1}]},
            "not a gate report (lacks 'metric'); run dfmcl gate again",
        ),
    }.values(),
)
def test_malformed_evidence_is_bad_input(make_report: MakeReport, changes: dict[str, object], message: str) -> None:
    """Evidence that cannot be read is one line with file and reason, exit 2."""
    evidence = make_report(**changes)
    with pytest.raises(BadInput) as caught:
        read_release(evidence)
    assert str(caught.value) == f"{evidence / 'report.json'}: {message}"


def test_missing_evidence_is_bad_input(tmp_path: Path) -> None:
    """A directory without a report is named."""
    with pytest.raises(BadInput, match=r"report\.json: no such file"):
        read_release(tmp_path)
