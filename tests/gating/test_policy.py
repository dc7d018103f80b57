"""Policies: they read as written, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.gating.criterion import Criterion
from dfmcl.gating.policy import AttackSection, load_policy
from dfmcl.gating.record import places_of
from dfmcl.gating.verdict import claims_about
from dfmcl.robustness.attacks.suites import BY_KIND

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
    "radius below a byte": (GOOD.replace("8/255", "0.9/255"), r"threat\.eps: .*arrive as bytes.*1/255 is the smallest"),
    "radius that is not a number": (GOOD.replace("8/255", "nan"), r"threat\.eps: .*is no radius"),
    "no radius": (GOOD.replace('eps = "8/255"', ""), r"threat\.eps: Field required"),
    "unknown data": (GOOD.replace("digits", "mnist"), r"data\.name"),
    "not TOML": ("criteria = [", r"not TOML"),
    "clean accuracy at a radius": (
        GOOD.replace("criteria = [", 'criteria = ["clean_accuracy(2/255) >= 0.5 at 95 %", '),
        r"clean_accuracy has no radius; leave \(2/255\) out",
    ),
    "criterion at no radius": (GOOD.replace("robust_accuracy", "robust_accuracy(8)"), r"8/255, not 8"),
    "regression with a threshold": (
        GOOD.replace("criteria = [", 'criteria = ["no_regression >= 0.5 at 95 %", '),
        r"no criterion; write METRIC",
    ),
    "only no_regression": (GOOD.replace("robust_accuracy >= 0.25", "no_regression"), r"no criterion is about robust"),
    "a corruption that is none": (
        GOOD.replace("criteria = [", 'criteria = ["corruption_accuracy(patch:2x2) >= 0.2 at 95 %", '),
        r"corruption_accuracy\(patch:2x2\) >= 0\.2 at 95 %': patch 2x2 is no corruption; write \(fog\)",
    ),
    "an unknown corruption": (
        GOOD.replace("criteria = [", 'criteria = ["corruption_accuracy(each of rain) >= 0.2 at 95 %", '),
        r"threat 'rain' is unknown",
    ),
    "only corruptions": (GOOD.replace("robust_accuracy", "corruption_accuracy"), r"no criterion is about robust"),
    "unknown statistics": ('statistics = "peeking"\n' + GOOD, r"statistics"),
    "the same criterion twice": (
        GOOD.replace("criteria = [", 'criteria = ["robust_accuracy>=25% at 95%", '),
        r"criterion 'robust_accuracy >= 0\.25 at 95 %' stands there twice; leave one out",
    ),
    "the policy's own radius again": (
        GOOD.replace("criteria = [", 'criteria = ["robust_accuracy(8/255) >= 0.25 at 95 %", '),
        r"stands there twice",
    ),
    "data in a bucket": (
        GOOD.replace('"digits"', '"npz"\npath = "s3://b/x.npz"'),
        r"data\.path: s3: is no folder here",
    ),
    "empty block": (GOOD + "block = 0", r"attacks\.block"),
    "a threshold that every model reaches": (GOOD.replace("0.25", "0"), r"robust_accuracy >= 0 asks for nothing"),
    "the same by class, in per cent": (
        GOOD.replace("robust_accuracy >= 0.25", "class_robust_accuracy >= 0.0 %"),
        r"robust_accuracy >= 0 asks for nothing",
    ),
    "a confidence with two points": (GOOD.replace("95 %", "9.5.0 %"), r"'robust.* at 9\.5\.0 %' is no criterion"),
    "digits of another script": (GOOD.replace("95 %", "٩٥ %"), r"criteria: 'robust.*' is another script's digit"),
    "a share in another script": (GOOD.replace("0.25", "0.٢٥"), r"criteria: 'robust.*' is another script's digit"),
    "a radius in another script": (GOOD.replace("8/255", "٨/255"), r"threat\.eps: .*is no radius"),
    "no attacks": (GOOD.replace('["fgsm"]', "[]"), r"attacks\.suite: name at least one attack"),
    "an attack twice": (GOOD.replace('["fgsm"]', '["fgsm", "fgsm"]'), r"attacks\.suite: .*each once"),
    "an unknown suite": (GOOD.replace('["fgsm"]', '"slow"'), r"attacks\.suite: there is no suite of that name"),
    "a seed of 26 digits": (f"seed = {10**26}" + GOOD, r"seed: .*less than or equal to 9223372036854775807"),
    "an attestation for longer than there are dates": (f"valid_days = {10**11}" + GOOD, r"valid_days: .*36500"),
    "a number of 5000 digits": (f"seed = {'9' * 5000}" + GOOD, r"not TOML that anybody writes: .*digits"),
    "a date of no calendar": ("seed = 2026-02-31" + GOOD, r"not TOML"),
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
        ("class_robust_accuracy(2/255) >= 20 % at 99.9 %", 0.2),
        ("class_clean_accuracy >= 0.5 at 95 %", 0.5),
        ("no_regression at 95 %", 0),
        ("no_regression(patch:5x5|fog@3) at 95 %", 0),
        ("corruption_accuracy >= 60 % at 95 %", 0.6),
        ("corruption_accuracy(each) >= 0.4 at 95 %", 0.4),
        ("corruption_accuracy(fog|snow@3) >= 0.4 at 95 %", 0.4),
        ("corruption_accuracy(each  of fog|snow@3) >= 0.4 at 95 %", 0.4),
    ],
)
def test_criterion_reads_as_written(text: str, threshold: float) -> None:
    """Shares and per cent, with and without blanks; and what is written reads the same again."""
    criterion = Criterion.parse(text)
    assert criterion.threshold == pytest.approx(threshold)
    assert Criterion.parse(str(criterion)) == criterion


def test_a_corruption_accuracy_names_its_corruptions(tmp_path: Path) -> None:
    """All 75 where none is named, each attacked once whoever names it; and each kind is a claim of its own."""
    path = tmp_path / "gate.toml"
    criteria = '"corruption_accuracy >= 0.5 at 95 %", "corruption_accuracy(each of fog@2|snow) >= 0.5 at 95 %"'
    path.write_text(GOOD.replace("criteria = [", f"criteria = [{criteria}, "))
    policy = load_policy(path)
    assert len(policy.threats(grid=True)) == 1 + 75
    whole, each, _ = policy.parsed_criteria
    assert len(whole.corruptions) == 75
    found = claims_about([whole, each], ["a"], None, 100)
    assert [(claim.kind, claim.answers) for claim in found] == [("", 75), ("fog", 1), ("snow", 5)]
    snow = [policy.threats(grid=True)[place].label for place in places_of(found[2], policy, True)]
    assert snow == [f"snow@{level}" for level in range(1, 6)]


def test_radii_come_in_ascending_order_and_once(tmp_path: Path) -> None:
    """What falls in a small ball has fallen in a larger one, so the smallest is attacked first, each as bytes once."""
    path = tmp_path / "gate.toml"
    more = ", ".join(f'"robust_accuracy({eps}) >= 0.2 at 95 %"' for eps in ("12/255", "2/255", "8.4/255", "8/255"))
    path.write_text(GOOD.replace("criteria = [", f"criteria = [{more}, "))
    policy = load_policy(path)
    assert [threat.label for threat in policy.threats(grid=True)] == ["2/255", "8/255", "12/255"]
    assert [threat.label for threat in policy.threats(grid=False)] == ["2/255", "8/255", "8.4/255", "12/255"]
    assert policy.threat_of(policy.parsed_criteria[0]).label == "12/255"


def test_each_kind_of_threat_has_its_attacks_in_a_policy() -> None:
    """A kind that no suite searches in has a field of its name, so that a policy can name other attacks."""
    section = AttackSection(suite="fast")
    assert {kind: section.by_kind(kind) for kind in BY_KIND} == {kind: list(BY_KIND[kind]) for kind in BY_KIND}
    assert section.by_kind("linf") is None
