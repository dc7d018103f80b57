"""Policies and verdicts: every mistake is named, and better figures never lead to a worse verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating.policy import Criterion, load_policy
from gating.verdict import EXIT_CODES, decide, judge
from robustness.errors import BadInput
from robustness.statistics import Share

GOOD = """
criteria = ["robust_accuracy >= 0.25 at 95 %"]
[threat]
eps = "8/255"
[data]
name = "digits"
[attacks]
suite = ["fgsm"]
"""

MISTAKES = {
    "threshold above 1": (
        GOOD.replace("0.25", "1.25"),
        r"criteria: .*threshold is 1\.25; a share lies between",
    ),
    "threshold in per cent above 100": (GOOD.replace("0.25", "125 %"), r"threshold is 1\.25"),
    "certainty": (GOOD.replace("95 %", "100 %"), r"confidence is 100 %"),
    "confidence as a share": (GOOD.replace("95 %", "0.95 %"), r"confidence is 0\.95 %"),
    "unknown metric": (GOOD.replace("robust_accuracy", "robustness"), r"no criterion; write METRIC"),
    "no robust criterion": (
        GOOD.replace("robust_accuracy", "clean_accuracy"),
        r"no criterion is about robust",
    ),
    "no criterion": (GOOD.replace('"robust_accuracy >= 0.25 at 95 %"', ""), r"criteria: "),
    "unknown key": (GOOD + "\nimages = 3\n[x]", r"unknown key"),
    "radius in 255ths": (GOOD.replace("8/255", "8"), r"threat\.eps: .*8/255, not 8"),
    "radius below a byte": (GOOD.replace("8/255", "0.9/255"), r"threat\.eps: .*1/255 is the smallest"),
    "radius that is not a number": (GOOD.replace("8/255", "nan"), r"threat\.eps: .*is no radius"),
    "no radius": (GOOD.replace('eps = "8/255"', ""), r"threat\.eps: Field required"),
    "unknown data": (GOOD.replace("digits", "mnist"), r"data\.name"),
    "not TOML": ("criteria = [", r"not TOML"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(tmp_path: Path, mistake: str) -> None:
    """The message names the file and the key, in one line."""
    text, message = MISTAKES[mistake]
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_policy_is_bad_input(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(BadInput, match=r"gate\.toml: No such file"):
        load_policy(tmp_path / "gate.toml")


def test_digest_ignores_comments_and_follows_values(tmp_path: Path) -> None:
    """Two files that say the same have one digest; another threshold has another."""
    paths = [tmp_path / f"{i}.toml" for i in range(3)]
    for path, text in zip(paths, (GOOD, "# why\n" + GOOD, GOOD.replace("0.25", "0.26")), strict=True):
        path.write_text(text)
    a, b, c = (load_policy(path).digest for path in paths)
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        ("robust_accuracy >= 0.45 at 95 %", 0.45),
        ("robust_accuracy>=45% at 95%", 0.45),
        ("robust_accuracy >= 1 at 99 %", 1),
    ],
)
def test_criterion_reads_as_written(text: str, threshold: float) -> None:
    """Shares and per cent, with and without blanks."""
    assert Criterion.parse(text).threshold == pytest.approx(threshold)


counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
thresholds = st.floats(0, 1)
RANK = {"failed": 0, "inconclusive": 1, "passed": 2}


@given(counts, thresholds, st.floats(0.5, 0.999))
def test_gate_is_monotone(count: tuple[int, int], threshold: float, confidence: float) -> None:
    """One more surviving image, or a lower threshold, never makes a verdict worse."""
    k, n = count
    criterion = Criterion("robust_accuracy", threshold, confidence)
    verdict = decide([judge(criterion, Share(k, n))], [])
    better = decide([judge(criterion, Share(min(k + 1, n), n))], [])
    easier = decide([judge(Criterion("robust_accuracy", threshold / 2, confidence), Share(k, n))], [])
    assert RANK[verdict] <= RANK[better]
    assert RANK[verdict] <= RANK[easier]


@given(counts, thresholds)
def test_a_point_estimate_never_decides(count: tuple[int, int], threshold: float) -> None:
    """Passed means that the lower bound reaches the threshold, failed that the upper one does not."""
    judgement = judge(Criterion("robust_accuracy", threshold, 0.95), Share(*count))
    verdict = decide([judgement], [])
    assert (verdict == "passed") == (judgement.lower >= threshold)
    assert (verdict == "failed") == (judgement.upper < threshold)


def test_precedence() -> None:
    """Failed before suspect before inconclusive before passed, and the exit codes are the documented ones."""
    met, missed, still_open = (
        judge(Criterion("robust_accuracy", threshold, 0.95), Share(50, 100)) for threshold in (0.1, 0.9, 0.5)
    )
    finding = [{"check": "x", "why": "y", "do": "z"}]
    assert decide([met, missed, still_open], finding) == "failed"
    assert decide([met, still_open], finding) == "suspect"
    assert decide([met, still_open], []) == "inconclusive"
    assert decide([met], []) == "passed"
    assert EXIT_CODES == {"passed": 0, "failed": 1, "inconclusive": 3, "suspect": 4}
