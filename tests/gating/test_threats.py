"""Criteria about patches, rotations, corruptions, other norms and unions: judged image by image, and derived again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfmcl.common.errors import BadInput
from dfmcl.gating.case import suites_of
from dfmcl.gating.criterion import Criterion
from dfmcl.gating.gate import gate
from dfmcl.gating.policy import Policy, load_policy
from dfmcl.gating.signing.evidence import read_evidence
from dfmcl.gating.signing.faults import EvidenceError
from dfmcl.gating.signing.probes_file import further, read_probes
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.robustness.models import to_float
from dfmcl.robustness.records import from_bits
from dfmcl.robustness.threats.registry import FAMILIES
from tests.exports import Export

IMAGES = 30
UNION = "linf:1/255|rotation:10"
SPOILED = "corruption_accuracy(fog@1|contrast@5) >= 0.02 at 80 %"


def policy(*threats: str, more: Sequence[str] = (), **changes: Any) -> Policy:
    """Of the test's few images, one look: each threat must leave something, and the last one leaves too little."""
    criteria = [f"robust_accuracy({threat}) >= 0.02 at 80 %" for threat in threats]
    return Policy.model_validate(
        {
            "criteria": ["robust_accuracy >= 0.02 at 80 %", *criteria, *more],
            "threat": {"eps": "1/255"},
            "data": {"name": "digits", "images": IMAGES},
            "attacks": {"suite": ["fgsm"], "block": 15, "substitute": 0, "patch": ["patch-5x2"], "l1": ["apgd-ce-5"]},
            "checks": {"images": 32},
            "statistics": "fixed",
            **changes,
        }
    )


def test_a_gate_decides_on_every_threat(standard_run: Path, export_once: Export, tmp_path: Path) -> None:
    """Each is attacked by its own attacks, members only count, the union is the worst per image, and a report whose
    flags somebody edits contradicts itself."""
    subject = candidate_subject(export_once(standard_run, tmp_path / "candidate"), standard_run)
    wanted = policy("patch:2x2", "fog@1", "l1:1", UNION, "2/255", more=[SPOILED])
    out = tmp_path / "evidence"
    report = gate(subject, wanted, out)
    found = {str(one.threat.parsed): one for one in (report.evaluation, *report.radii)}
    assert list(found) == ["Linf 1/255", "Linf 2/255", "patch 2x2", "fog@1", "L1 1", "rotation 10", "contrast@5"]
    assert [[attack.name for attack in one.attacks] for one in found.values()] == [
        ["fgsm"], ["fgsm"], ["patch-5x2"], ["grid"], ["apgd-ce-5"], ["grid"], ["grid"],
    ]  # fmt: skip
    assert all(one.attacks[0].outside == 0 and one.clean == report.evaluation.clean for one in found.values())
    held = {name: np.array(from_bits(one.per_image.robust)) for name, one in found.items()}
    assert not (held["Linf 2/255"] & ~held["Linf 1/255"]).any()
    both = held["Linf 1/255"] & held["rotation 10"]
    rows = {row.criterion.partition(" >=")[0]: row for row in report.criteria}
    assert rows[f"robust_accuracy({UNION})"].k == both.sum() < IMAGES
    for threat, name in (("patch:2x2", "patch 2x2"), ("fog@1", "fog@1"), ("l1:1", "L1 1"), ("2/255", "Linf 2/255")):
        assert rows[f"robust_accuracy({threat})"].k == held[name].sum()
    kept = further(read_probes(out / "probes.npz"))
    assert [(len(images), len(logits)) for images, logits in kept] == [(IMAGES, IMAGES)] * 6
    labels = np.array(report.per_image.label)
    for one, (_, logits) in zip(report.radii, kept, strict=True):
        assert (logits.argmax(axis=1) == labels).tolist() == list(from_bits(one.per_image.robust)), one.threat
    answers = subject.decide(to_float(torch.from_numpy(kept[1][0])))
    assert np.allclose(answers.numpy(), kept[1][1], atol=1e-4)
    mean = rows[SPOILED.partition(" >=")[0]]
    assert (mean.k, mean.n) == (held["fog@1"].sum() + held["contrast@5"].sum(), 2 * IMAGES)
    again, _ = read_evidence(out)
    assert again.to_json() == report.to_json()
    assert load_policy(out / "policy.toml").digest == wanted.digest
    page, lines = (out / "report.html").read_text(), (out / "robustness.prom").read_text()
    assert "<h3>patch 2x2</h3>" in page
    assert "<h3>corruptions</h3>" in page
    assert "the worst of them for each image" in page
    assert "<h2>Corruptions</h2>" in page
    assert 'robustness_gate_corruption_accuracy_ratio{corruption="contrast"' in lines
    assert "patch 2x2" in (out / "report.md").read_text()
    assert 'norm="patch"' in lines
    assert 'epsilon="2x2"' in lines
    text = json.loads((out / "report.json").read_text())
    rotated = next(one for one in text["radii"] if one["threat"].get("spelling", "").startswith("rotation"))
    flags = rotated["per_image"]["robust"]
    rotated["per_image"]["robust"] = rotated["attacks"][0]["per_image"]["held"] = flags.replace("0", "1")
    (out / "report.json").write_text(json.dumps(text))
    with pytest.raises(EvidenceError):
        read_evidence(out)


def test_a_regression_in_another_threat_needs_a_baseline_that_met_it(
    standard_run: Path, export_once: Export, tmp_path: Path
) -> None:
    """The same model under the same corruption loses nothing, on images that its own order would not have reached, and
    errs as often as before; of a threat that the baseline did not meet nothing can be said: bad input."""
    subject = candidate_subject(export_once(standard_run, tmp_path / "candidate"), standard_run)
    before = tmp_path / "first" / "report.json"
    first = gate(subject, policy("contrast@5"), before.parent)
    asked = ["no_regression(contrast@5) at 80 %", "corruption_accuracy(contrast@5) >= 0 at 80 %"]
    report = gate(subject, policy(more=asked), tmp_path / "again", baseline=before)
    again, _ = read_evidence(tmp_path / "again")
    assert again.to_json() == report.to_json()
    row, baseline = report.criteria[-1], report.baseline
    assert (row.criterion, row.outcome, row.k, row.n) == (asked[0], "met", IMAGES, IMAGES)
    assert set(first.per_image.index) != set(report.per_image.index)
    assert baseline is not None
    assert baseline.per_image.index == first.per_image.index
    assert baseline.regressions is not None
    assert baseline.errors is not None
    (found,), (errors,) = baseline.regressions, baseline.errors
    (contrast,) = first.radii
    assert (found.held, found.only_baseline, found.only_candidate) == (contrast.robust.k, 0, 0)
    assert errors.before == errors.after == pytest.approx(1 - contrast.robust.value)
    assert baseline.mce == (1 if errors.before else None)
    with pytest.raises(BadInput, match="was not made under rotation 10 by the same attacks; gate that model"):
        gate(subject, policy(more=["no_regression(rotation:10) at 80 %"]), tmp_path / "none", baseline=before)


def test_a_policy_takes_every_family_and_names_what_is_unknown() -> None:
    """By its own examples; other words, radii that make no sense and threats that stand there twice are refused."""
    for family in FAMILIES:
        for example in family.examples:
            assert Criterion.parse(f"robust_accuracy({example}) >= 0.1 at 95 %").eps == example
            if example not in ("8/255", "linf:8/255"):
                assert policy(example).threats(grid=True)[1:], example
    for threat, why in (
        ("sticker:5x5", "threat 'sticker:5x5' is unknown; write one such as linf:8/255"),
        ("linf:8", "a radius is above 0"),
        ("linf:0.5/255", "0.5/255 is below"),
        ("patch:0x0", "patch"),
        ("fog@9", "fog@9"),
        ("linf:1/255", "stands there twice"),
        ("rotation:10|rotation:10", "a part comes twice"),
    ):
        with pytest.raises(ValueError, match="criteri") as refused:
            policy(threat)
        assert why in str(refused.value), (threat, str(refused.value))
    with pytest.raises(ValueError, match="a drawn part is of one threat"):
        policy("fog@1", attacks={"suite": "standard", "whole": "drawn"})


def test_without_gradients_other_attacks_must_do() -> None:
    """Patches have a search by answers; in L1 there is none, so such a criterion cannot be judged."""
    assert [one.name for one in suites_of(policy("patch:2x2", attacks={"suite": "fast"}), blind=True)["patch"]] == [
        "patch-rs-500"
    ]
    with pytest.raises(BadInput, match="gives no gradients, which all of apgd-ce-5 need; leave L1 1 out"):
        suites_of(policy("l1:1"), blind=True)
    with pytest.raises(BadInput, match=r"policy attacks\.patch: attack: 'pgd-5' does not search in patch 2x2"):
        suites_of(policy("patch:2x2", attacks={"suite": "fast", "patch": ["pgd-5"]}), blind=False)
