"""probes.npz of several threats: within its budget, whole or refused, and in agreement with the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dfmcl.common.files import sha256_of
from dfmcl.gating.signing import probes_file
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested
from dfmcl.gating.signing.evidence import read_evidence
from dfmcl.gating.signing.probes_file import as_npz, further, kept_in, read_answers, read_probes
from dfmcl.gating.signing.report import Report
from dfmcl.monitoring.releases import read_replay
from tests.signing import corrupted, evaluated, policy_of, probes_of, true_report, write_report

Array = NDArray[Any]
SHAPE = (16, 16, 3)
CRITERIA = ("robust_accuracy >= 0.1 at 95 %", "corruption_accuracy(fog@1|snow@2) >= 0.1 at 95 %")


def two_threats() -> tuple[Report, dict[str, Array]]:
    """40 images: the first fell, each third one to fog, none to snow; of both corruptions the first 12 are kept."""
    arrays, right, place = probes_of(SHAPE, 10), np.ones(40, bool), np.arange(40)
    held = {"fog@1": place % 3 != 1, "snow@2": right}
    evaluations = [evaluated(right, arrays["adversarial_logits"].argmax(axis=1) == arrays["labels"])]
    for number, (spelling, flags) in enumerate(held.items(), start=1):
        evaluations.append(corrupted(right, flags, spelling))
        clean = arrays["clean_logits"]
        arrays[f"change{number}"] = np.full((12, *SHAPE), 7 * number, np.uint8)
        arrays[f"adversarial_logits{number}"] = np.where(flags[:, None], clean, np.roll(clean, 1, axis=1))[:12]
    policy = policy_of(CRITERIA)
    return true_report(arrays, {"model.onnx": "3" * 64}, policy=policy, evaluations=evaluations), arrays


def written(folder: Path, report: Report, arrays: dict[str, Array]) -> Path:
    (folder / "probes.npz").write_bytes(as_npz(arrays))
    return write_report(folder, replace(report, files={"probes.npz": sha256_of(folder / "probes.npz")}))


def test_each_kind_of_threat_has_its_part_of_the_budget() -> None:
    """Kinds share equally, and within a kind its threats; of each at least one image, and none beyond those kept."""
    corruptions = ["corruption"] * 75
    assert kept_in(222, (224, 224, 3), ["patch"]) == [111]
    assert kept_in(222, (224, 224, 3), ["patch", *corruptions]) == [55, *[1] * 75]
    assert kept_in(10_000, (32, 32, 3), ["l1", "patch", *corruptions]) == [1820, 1820, *[24] * 75]
    assert kept_in(5, (32, 32, 3), ["l1", "spatial"]) == [5, 5]
    assert kept_in(5, (32, 32, 3), []) == []


def test_what_is_kept_of_each_threat_comes_back_and_is_replayed(tmp_path: Path) -> None:
    """Bytes and logits, in the order of the report; a watch asks all of them, before the clean images."""
    report, arrays = two_threats()
    assert read_evidence(written(tmp_path, report, arrays))[0].to_json()["criteria"] == report.to_json()["criteria"]
    found = further(read_probes(tmp_path / "probes.npz"))
    assert [(images[0, 0, 0, 0], len(images), len(logits)) for images, logits in found] == [(7, 12, 12), (14, 12, 12)]
    replay = read_replay(tmp_path / "probes.npz")
    assert replay is not None
    assert len(replay.images) == len(replay.logits) == 40 + 12 + 12 + 40
    assert (replay.images[40:52] == 7).all()
    assert (replay.logits[40:52] == arrays["adversarial_logits1"]).all()
    answers = read_answers(tmp_path / "probes.npz", (40, *SHAPE, 10))
    further_ones = (f"{name}{n}" for name in ("change", "adversarial_logits") for n in ("", 1, 2))
    assert set(answers) == {"labels", "clean_logits", *further_ones}


def test_evidence_from_before_there_were_further_threats_is_read(tmp_path: Path) -> None:
    """Without any of them it says as much as it said then."""
    report, arrays = two_threats()
    old = {name: array for name, array in arrays.items() if not name[-1].isdigit()}
    assert read_evidence(written(tmp_path, report, old))[0].criteria == report.criteria
    assert further(read_probes(tmp_path / "probes.npz")) == []


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("adversarial_logits1", lambda found: np.roll(found, 2, axis=0), "adversarial_logits1 of image"),
        ("adversarial_logits2", lambda found: np.roll(found, 1, axis=1), "adversarial_logits2 of image 0"),
    ],
)
def test_answers_that_the_record_does_not_know_are_refused(tmp_path: Path, name: str, value: Any, why: str) -> None:
    """Logits of a threat that say another answer than its evaluation, whatever the digests say."""
    report, arrays = two_threats()
    with pytest.raises(NotAttested, match=why):
        read_evidence(written(tmp_path, report, arrays | {name: value(arrays[name])}))


def test_a_threat_less_is_refused(tmp_path: Path) -> None:
    """Some of the threats, and not the others."""
    report, arrays = two_threats()
    less = {name: array for name, array in arrays.items() if not name.endswith("2")}
    with pytest.raises(NotAttested, match="threats is 1, and 2 follows"):
        read_evidence(written(tmp_path, report, less))


@pytest.mark.parametrize(
    "change",
    [
        {"change1": np.zeros((12, 8, 8, 3), np.uint8)},
        {"change1": np.zeros((11, *SHAPE), np.uint8)},
        {"change1": np.zeros((12, *SHAPE), np.float32)},
        {"change1": np.zeros((41, *SHAPE), np.uint8), "adversarial_logits1": np.zeros((41, 10), np.float32)},
        {"adversarial_logits1": np.zeros((12, 9), np.float32)},
        {"adversarial_logits1": np.zeros(12, np.float32)},
        {"change3": np.zeros((12, *SHAPE), np.uint8)},
        {"change4": np.zeros((12, *SHAPE), np.uint8), "adversarial_logits4": np.zeros((12, 10), np.float32)},
    ],
)
def test_what_does_not_fit_is_no_archive(tmp_path: Path, change: dict[str, Array]) -> None:
    """Other sizes, types or numbers than a gate writes: bad input, and nothing of ours breaks."""
    (tmp_path / "probes.npz").write_bytes(as_npz(two_threats()[1] | change))
    for read in (read_probes, lambda path: read_answers(path, (40, *SHAPE, 10))):
        with pytest.raises(BadEvidence, match=r"do not fit together|its members are not"):
            read(tmp_path / "probes.npz")


def test_the_budget_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it holds half as many."""
    monkeypatch.setattr(probes_file, "OTHERS", 2**23)
    assert kept_in(222, (224, 224, 3), ["patch"]) == [55]
