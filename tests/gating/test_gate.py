"""The gate on real candidates: its verdicts, its evidence, and its refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.common.locks import LOCK
from dfmcl.common.progress import silent
from dfmcl.gating.case import prepare
from dfmcl.gating.formats.markdown import markdown
from dfmcl.gating.formats.summary import flags as flags_in
from dfmcl.gating.gate import gate
from dfmcl.gating.order import Matter, drawn_of, order_of
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import Policy, load_policy
from dfmcl.gating.resumption import SEAL_BYTES
from dfmcl.gating.sequence import Progress
from dfmcl.gating.signing import probes_file
from dfmcl.gating.signing.attestation import BadEvidence
from dfmcl.gating.signing.evidence import read_evidence
from dfmcl.gating.signing.keys import keygen, read_signer
from dfmcl.gating.signing.probes_file import as_npz, read_answers, read_probes
from dfmcl.gating.signing.report import Report
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.release.export import export
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import SUITES
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import exactly, to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.statistics import lower_bound, upper_bound
from dfmcl.robustness.threats.l2 import L2
from tests.exports import Export
from tests.present import present
from tests.signing import make_key, policy_of, probes_of, true_report

ROOT = Path(__file__).parents[2]


def policy(robust: float, eps: str = "2/255", images: int = 120, *criteria: str, **changes: Any) -> Policy:
    return Policy.model_validate(
        {
            "criteria": [f"robust_accuracy >= {robust} at 95 %", "clean_accuracy >= 0.5 at 95 %", *criteria],
            "threat": {"eps": eps},
            "data": {"name": "digits", "images": images},
            "attacks": {"suite": ["fgsm", "pgd-5"], "block": 30, "substitute": 0},
            "checks": {"images": 32},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def candidate(standard_run: Path, export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_once(standard_run, tmp_path_factory.mktemp("gate") / "candidate")


@pytest.fixture(scope="module")
def subject(candidate: Path, standard_run: Path) -> Subject:
    return candidate_subject(candidate, standard_run)


@pytest.fixture(scope="module")
def passed(candidate: Path, subject: Subject) -> Path:
    out = candidate.parent / "passed"
    assert gate(subject, policy(0.03), out).verdict == "passed"
    return out


def report_of(evidence: Path) -> Report:
    """The report, which follows from its own record as everybody derives it again."""
    return read_evidence(evidence)[0]


@pytest.mark.parametrize(
    ("robust", "eps", "verdict", "code"),
    [(0.03, "2/255", "passed", 0), (0.5, "60/255", "failed", 1), (0.6, "1/255", "inconclusive", 3)],
)
def test_verdicts(subject: Subject, tmp_path: Path, robust: float, eps: str, verdict: str, code: int) -> None:
    """A modest claim passes, an impossible one fails, a claim that 5 images cannot settle is inconclusive."""
    images = 5 if verdict == "inconclusive" else 120
    report = gate(subject, policy(robust, eps, images), tmp_path / "evidence")
    assert (report.verdict, report.exit_code) == (verdict, code), report.criteria


def test_report_follows_its_schema(passed: Path) -> None:
    """report.json validates against the packaged JSON Schema, and a changed one does not."""
    schema = json.loads((resources.files("dfmcl.gating") / "report.schema.json").read_text())
    report = report_of(passed).to_json()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report, "verdict": "fine"}, schema)


def test_page_says_what_the_report_says(passed: Path) -> None:
    """report.md is the report as a page, the verdict first."""
    page = (passed / "report.md").read_text()
    assert page == markdown(report_of(passed))
    assert page.startswith("### PASSED")


def test_probes_replay_on_the_artefact(candidate: Path, passed: Path) -> None:
    """The adversarial bytes lie in the ball and give the recorded logits when sent through ONNX Runtime again."""
    report = report_of(passed)
    with np.load(passed / "probes.npz") as probes:
        session = onnxruntime.InferenceSession(candidate / "model.onnx", providers=["CPUExecutionProvider"])
        adversarial = probes["images"] + probes["change"]
        for images, logits in ((probes["images"], "clean_logits"), (adversarial, "adversarial_logits")):
            (again,) = session.run(["logits"], {"images": images})
            assert np.allclose(again, probes[logits], atol=1e-4)
        assert np.abs(adversarial.astype(int) - probes["images"].astype(int)).max() == 2
        held = (probes["clean_logits"].argmax(1) == probes["labels"]) & (
            probes["adversarial_logits"].argmax(1) == probes["labels"]
        )
    assert "".join("01"[int(flag)] for flag in held) == report.evaluation.per_image.robust
    assert held.sum() == report.evaluation.robust.k < report.evaluation.clean.k


def test_gate_is_repeatable(subject: Subject, passed: Path, tmp_path: Path) -> None:
    """The same bytes under the same policy give the same per-image record."""
    again = gate(subject, policy(0.03), tmp_path / "evidence")
    assert again.evaluation.per_image == report_of(passed).evaluation.per_image


def test_tampered_candidate_is_not_judged(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """One flipped byte: bad input, no evidence."""
    tampered = tmp_path / "candidate"
    shutil.copytree(candidate, tampered)
    model = bytearray((tampered / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (tampered / "model.onnx").write_bytes(model)
    with pytest.raises(BadEvidence, match=r"model\.onnx: SHA-256 is"):
        candidate_subject(tampered, standard_run)


def test_gradients_must_come_from_the_exported_run(candidate: Path, other_run: Path) -> None:
    """Another run's gradients aim at another model: refused."""
    with pytest.raises(BadInput, match="name the run that the candidate was exported from"):
        candidate_subject(candidate, other_run)


def test_wrong_gradients_make_the_evidence_suspect(subject: Subject, other_run: Path, tmp_path: Path) -> None:
    """Were another network's gradients used all the same, disagreement on adversarial images is noticed: exit 4."""
    report = gate(replace(subject, model=load_run(other_run).model), policy(0.03), tmp_path / "evidence")
    assert (report.verdict, report.exit_code) == ("suspect", 4)
    assert "artefact_disagrees" in [finding.check for finding in report.findings]


def test_data_that_does_not_fit_is_bad_input(subject: Subject, tmp_path: Path) -> None:
    """More images than the test part has, or images of another shape: one line that names the key."""
    with pytest.raises(BadInput, match=r"data\.images is 5000"):
        gate(subject, policy(0.03, images=5000), tmp_path / "evidence")


def test_existing_directory_of_somebody_else_is_left_alone(
    candidate: Path, subject: Subject, standard_run: Path, tmp_path: Path
) -> None:
    """Evidence replaces evidence, an export an export, and neither a run, a release or anybody's files."""
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"holds keep\.txt, which this command did not write"):
        gate(subject, policy(0.03), tmp_path, track=unattacked)
    assert (tmp_path / "keep.txt").read_text() == "mine"
    with pytest.raises(BadInput, match="did not write"):
        export(standard_run, standard_run)
    assert (standard_run / "checkpoint.safetensors").exists()
    release = tmp_path / "1"
    shutil.copytree(candidate, release)
    (release / "report.json").write_text("{}")
    for overwrite in (
        lambda: export(standard_run, release),
        lambda: gate(subject, policy(0.03), release),
    ):
        with pytest.raises(BadInput, match="did not write"):
            overwrite()


def test_evidence_replaces_evidence(subject: Subject, passed: Path, tmp_path: Path) -> None:
    """The same directory can be judged into again; nothing staged stays beside it."""
    shutil.copytree(passed, tmp_path / "evidence")
    (tmp_path / "evidence" / "report.md").write_text("old")
    gate(subject, policy(0.03), tmp_path / "evidence")
    assert (tmp_path / "evidence" / "report.md").read_text().startswith("### PASSED")
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


def test_an_l2_gate_blocks_what_falls_in_float(subject: Subject, standard_run: Path, tmp_path: Path) -> None:
    """Going to bytes does not undo an L2 attack: what breaks the plain model in float breaks it as bytes."""
    wanted = policy(0.5, images=40, statistics="fixed").model_dump()
    wanted["threat"] = {"norm": "l2", "eps": "2.0"}
    for suite in (["cw-l2-20"], ["margin-pgd-20"]):
        wanted["attacks"] = {"suite": suite, "substitute": 0}
        report = gate(subject, Policy.model_validate(wanted), tmp_path / "evidence")
        trained, data = load_run(standard_run), load_dataset("digits")
        attacks = [Attack.parse(name) for name in suite]
        chosen = list(report.per_image.index)
        outcome = evaluate(trained.model, data.x_test[chosen], data.y_test[chosen], L2(2.0), attacks)
        assert outcome.evaluation.robust.value <= 0.05
        # An attack goes on until the bytes fall (tests/robustness/test_trial.py); 2 of 40 images may differ.
        assert report.evaluation.robust.k <= outcome.evaluation.robust.k + 2
        assert report.verdict == "failed"


T = TypeVar("T")


class Cut(Exception):
    """The plug is pulled."""


def cut_after(blocks: int) -> Any:
    """A track that ends the gate after so many blocks, in the middle of an attack."""
    begun: list[str] = []

    def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        begun.append(label)
        if sum(label.startswith("fgsm") for label in begun) > blocks:
            raise Cut
        yield from items

    return track


def unattacked(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """A track that no attack may reach: what ends a gate there was found out before the work."""
    assert " at L" not in label
    yield from items


def without_time(report: Report) -> Report:
    """A report without what no two runs share."""

    def timeless(one: Any) -> Any:
        return replace(one, seconds=0, attacks=tuple(replace(attack, seconds=0) for attack in one.attacks))

    radii, transfer = (tuple(map(timeless, part)) for part in (report.radii, report.transfer))
    main = timeless(report.evaluation)
    return replace(
        report, evaluation=main, radii=radii, transfer=transfer, created="", seconds=0, files={}, processes=1
    )


def test_it_stops_as_soon_as_the_bounds_decide(passed: Path) -> None:
    """The block of 30 in which the last claim is decided is the last one, of the 120 images that may be looked at."""
    report = report_of(passed)
    decided = max(present(row.decided_after) for row in report.criteria)
    assert report.statistics.attacked == 30 * -(-decided // 30) <= 120 == report.statistics.cap
    assert report.progress[-1].images == report.statistics.attacked


def test_nobody_chooses_the_order(subject: Subject, passed: Path, tmp_path: Path) -> None:
    """Another policy, even another confidence, is met by other images."""
    other = gate(subject, policy(0.03, "2/255", 120, "clean_accuracy >= 0.2 at 90 %"), tmp_path / "evidence")
    assert other.per_image.index[:20] != report_of(passed).per_image.index[:20]


def test_a_cut_gate_goes_on_where_it_was(subject: Subject, tmp_path: Path) -> None:
    """Blocks that were done are not attacked again, and the evidence is that of a gate that nobody cut."""
    wanted = policy(0.03, images=90, statistics="fixed")
    whole = gate(subject, wanted, tmp_path / "whole")
    out = tmp_path / "evidence"
    with pytest.raises(Cut):
        gate(subject, wanted, out, track=cut_after(1))
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence.partial", "whole"]
    seen: list[str] = []

    def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        seen.append(label)
        yield from items

    report = gate(subject, wanted, out, track=track)
    assert without_time(report) == without_time(whole)
    attacked = sum(label.startswith("fgsm at Linf 2/255") for label in seen)
    assert attacked == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence", "whole"]


def test_the_state_of_another_gate_is_refused(subject: Subject, tmp_path: Path) -> None:
    """Another policy, another model: what was begun is not theirs, and stays."""
    out, mine = tmp_path / "evidence", policy(0.03, images=90, statistics="fixed")
    with pytest.raises(Cut):
        gate(subject, mine, out, track=cut_after(1))
    begun = sorted(path.name for path in (tmp_path / "evidence.partial").iterdir())
    with pytest.raises(BadInput, match=r"evidence\.partial: belongs to a gate with another policy"):
        gate(subject, policy(0.2), out)
    with pytest.raises(BadInput, match="belongs to a gate with another subject"):
        gate(replace(subject, digest="0" * 64), mine, out)
    assert sorted(path.name for path in (tmp_path / "evidence.partial").iterdir()) == begun


def test_what_is_no_state_is_left_alone(subject: Subject, tmp_path: Path) -> None:
    """A user's directory of that name is named, and stays; one that a killed gate had only begun is taken."""
    out, notes = tmp_path / "evidence", tmp_path / "evidence.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(BadInput, match=r"evidence\.partial: is no state of a gate; remove it"):
        gate(subject, policy(0.03), out)
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]
    notes.rename(notes.with_name(".state.json.123.part"))
    (notes.parent / LOCK).touch()
    assert gate(subject, policy(0.03), out).verdict == "passed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence"]


def test_attacks_draw_from_the_key_as_well_as_from_the_policy(subject: Subject, tmp_path: Path) -> None:
    """A reader of the policy knows the random starts of a gate without a key, and of no other."""
    wanted, keys = policy(0.1, "60/255", 30), [read_signer(make_key(tmp_path, name)) for name in ("one", "two")]
    rounds = [[], keys[:1], keys[:1], keys[1:]]
    bare, one, again, other = (prepare(subject, wanted, {}, None, signers, silent).seed for signers in rounds)
    assert one == again
    assert len({bare, one, other}) == 3
    report = gate(subject, wanted, tmp_path / "evidence", signers=keys)
    assert report.evaluation.seed == derived_seed(one, "block", 0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard suite with two short attacks in place of the four of AutoAttack."""
    monkeypatch.setitem(SUITES, "standard", ("margin-pgd-3", "square-40", *SUITES["fast"]))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("statistics", ["sequential", "fixed"])
def test_a_drawn_part_meets_the_whole_suite(subject: Subject, tmp_path: Path, statistics: str) -> None:
    """All images meet the fast suite, the drawn ones that hold meet the rest, and the bounds are wider for it."""
    attacks = {"suite": "standard", "whole": 0.3, "block": 30, "substitute": 0}
    wanted = policy(0.05, "1/255", 60, statistics=statistics, attacks=attacks)
    report = gate(subject, wanted, tmp_path / "evidence")
    assert report_of(tmp_path / "evidence") == report
    jsonschema.validate(report.to_json(), Report.schema())
    by_name = {attack.name: attack for attack in report.evaluation.attacks}
    assert list(by_name) == [*SUITES["fast"], "margin-pgd-3", "square-40"]
    count = report.statistics.attacked
    drawn = drawn_of(Matter(subject.digest, report.data.sha256, wanted.digest, report.data.images), None, 0.3)
    mine = drawn[list(report.per_image.index)]
    left = flags_in(by_name[SUITES["fast"][-1]].per_image.held)
    assert flags_in(by_name["margin-pgd-3"].per_image.tried).tolist() == (mine & left).tolist()
    whole = present(report.statistics.whole)
    assert (whole.drawn, whole.tried) == (int(mine.sum()), int((mine & left).sum()))
    assert 3 < whole.drawn < count
    (row, _) = report.criteria
    everybody = gate(
        subject,
        policy(0.05, "1/255", 60, statistics=statistics, attacks={**attacks, "suite": "fast", "whole": 1}),
        tmp_path / "fast",
    )
    assert present(row.lower) < present(everybody.criteria[0].lower)
    assert (
        "drawn beforehand, were to meet the whole standard suite" in (tmp_path / "evidence" / "report.md").read_text()
    )


@pytest.mark.usefixtures("short")
def test_a_drawn_part_cannot_be_chosen(subject: Subject, tmp_path: Path) -> None:
    """A report that leaves a drawn image out, or shows one that was not drawn, contradicts its own digests."""
    attacks = {"suite": "standard", "whole": 0.3, "block": 30, "substitute": 0}
    gate(subject, policy(0.05, "1/255", 60, statistics="fixed", attacks=attacks), tmp_path / "evidence")
    path = tmp_path / "evidence" / "report.json"
    whole = path.read_text()
    for change, said in (("less", "images tried"), ("more", "images tried"), ("lost", "images held without a try")):
        report = json.loads(whole)
        entry = report["evaluation"]["attacks"][-1]
        bits = entry["per_image"]
        tried, held = bits["tried"], bits["held"]
        place = next(i for i in range(60) if tried[i] == ("1" if change == "less" else "0") and held[i] == "1")
        if change == "lost":
            bits["held"] = f"{held[:place]}0{held[place + 1 :]}"
        else:  # with the counts that follow, so that nothing else is wrong
            bits["tried"] = f"{tried[:place]}{'0' if change == 'less' else '1'}{tried[place + 1 :]}"
            entry["tried"] = bits["tried"].count("1")
        path.write_text(json.dumps(report))
        with pytest.raises(DfmclError, match=f"{said}.* follows from its own record"):
            report_of(tmp_path / "evidence")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": {"suite": "fast", "whole": "drawn"}}, 'is the drawn part of suite = "standard"'),
        ({"attacks": {"suite": "standard", "whole": 0}}, "whole"),
        ({"attacks": {"suite": "standard", "whole": 1.5}}, "whole"),
        ({"attacks": {"suite": "standard", "whole": "some"}}, "whole"),
    ],
)
def test_a_drawn_part_of_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(0.1, "4/255", 90, **changes)
    standard = {"attacks": {"suite": "standard", "whole": "drawn"}}
    with pytest.raises(ValueError, match="compares image by image"):
        policy(0.1, "4/255", 90, "no_regression at 95 %", **standard)
    with pytest.raises(ValueError, match="of one threat"):
        policy(0.1, "4/255", 90, "robust_accuracy(2/255) >= 0.1 at 95 %", **standard)
    assert policy(0.1, "4/255", 90, **standard).attacks.chance == 0.2


@pytest.mark.parametrize("damage", ["torn", "exchanged", "sealed by a stranger"])
def test_a_block_that_this_gate_did_not_seal_is_attacked_again(subject: Subject, tmp_path: Path, damage: str) -> None:
    """A stranger who brings a file into the state's directory, with a cache or a commit, decides nothing."""
    wanted, signers = policy(0.03, images=90, statistics="fixed"), [read_signer(make_key(tmp_path, "one"))]
    whole = gate(subject, wanted, tmp_path / "whole", signers=signers)
    out, state = tmp_path / "evidence", tmp_path / "evidence.partial"
    with pytest.raises(Cut):
        gate(subject, wanted, out, track=cut_after(2), signers=signers)
    with pytest.raises(BadInput, match=r"evidence\.partial: belongs to a gate with another order"):
        gate(subject, wanted, out, signers=[read_signer(make_key(tmp_path, "another"))])
    first, second = sorted(state.glob("*.npz"))
    if damage == "torn":
        first.write_bytes(first.read_bytes()[:100])
    elif damage == "exchanged":
        first.write_bytes(second.read_bytes())
    else:
        first.write_bytes(first.read_bytes()[:-SEAL_BYTES] + bytes(SEAL_BYTES))
    seen: list[str] = []

    def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        seen.append(label)
        yield from items

    report = gate(subject, wanted, out, track=track, signers=signers)
    assert report.per_image == whole.per_image
    assert report.evaluation.robust == whole.evaluation.robust
    attacked = sum(label.startswith("fgsm at Linf 2/255") for label in seen)
    assert attacked == 2


@pytest.mark.parametrize(("robust", "code"), [(0.02, 0), (0.9, 1)])
def test_two_processes_reach_the_verdict_of_one(
    candidate: Path, standard_run: Path, subject: Subject, tmp_path: Path, robust: float, code: int
) -> None:
    """The Kubernetes job's own command, with two processes, writes the evidence of one, and ends with its code."""
    text = f"""
criteria = ["robust_accuracy >= {robust} at 95 %", "robust_accuracy(1/255) >= 0.05 at 95 %"]
[threat]
eps = "2/255"
[data]
name = "digits"
images = 120
[attacks]
suite = ["fgsm", "pgd-5"]
block = 30
substitute = 0
[checks]
images = 32
"""
    path = tmp_path / "gate.toml"
    path.write_text(text)
    (tmp_path / "candidate").symlink_to(candidate)
    (tmp_path / "run").symlink_to(standard_run)
    keygen(tmp_path / "gate")
    alone = gate(subject, load_policy(path), tmp_path / "alone", signers=[read_signer(tmp_path / "gate.key")])
    assert alone.exit_code == code
    job = yaml.safe_load((ROOT / "deploy" / "gate" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = {"PROCESSES": "2", "DATA": str(tmp_path), "POLICY": str(path), "KEY": str(tmp_path / "gate.key")}
    assert set(told) == {entry["name"] for entry in container["env"]}
    environment = {
        **os.environ,
        **told,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*container["command"], *container["args"]], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    both = report_of(tmp_path / "evidence")
    assert both.processes == 2
    assert both.criteria == alone.criteria
    assert both.per_image == alone.per_image
    assert both.evaluation.per_image == alone.evaluation.per_image
    assert done.stdout.count("evidence: ") == 1
    assert code in job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] or code == 0


def test_radii_and_classes_are_claims_of_their_own(subject: Subject, tmp_path: Path) -> None:
    """A claim at a smaller radius is met by what holds there; a floor that one class misses blocks the model."""
    more = ["robust_accuracy(1/255) >= 0.02 at 95 %"]
    report = gate(subject, policy(0.001, "2/255", 60, *more), tmp_path / "radii")
    assert [evaluation.threat.label for evaluation in report.radii] == ["1/255"]
    assert report.radii[0].robust.k > report.evaluation.robust.k
    assert report.criteria[2].eps == "1/255"
    assert report.criteria[2].outcome == "met"
    floor = policy(0.001, "2/255", 0, "class_robust_accuracy >= 0.9 at 95 %")
    blocked = gate(subject, floor, tmp_path / "classes")
    rows = [row for row in blocked.criteria if row.metric == "class_robust_accuracy"]
    assert [row.class_name for row in rows] == list("0123456789")
    assert blocked.verdict == "failed"
    assert "missed" in {row.outcome for row in rows}


def test_one_look_attacks_all_it_announced(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed statistics look once, at exactly the images that the policy names, by exact bounds.

    Of large images the evidence keeps the pixels of the first ones; the verdict follows without them.
    """
    monkeypatch.setattr(probes_file, "PIXELS", 40 * 16 * 16 * 3)
    shown: list[Progress] = []
    report = gate(subject, policy(0.03, images=90, statistics="fixed"), tmp_path / "evidence", watch=shown.append)
    assert {progress.expected for progress in shown} == {90}
    row = report.criteria[0]
    assert report.statistics.attacked == row.n == 90
    assert row.lower == lower_bound(row.k, 90, 0.95)
    assert row.upper == upper_bound(row.k, 90, 0.975)
    assert report_of(tmp_path / "evidence").verdict == report.verdict
    path = tmp_path / "evidence" / "probes.npz"
    assert len(read_answers(path, (90, 16, 16, 3, 10))["adversarial_logits"]) == 90
    found, first = read_probes(path), load_dataset("digits").x_test[list(report.per_image.index[:40])]
    np.testing.assert_array_equal(found["images"], first)
    assert {len(array) for array in found.values()} == {40}
    for images, logits in (("images", "clean_logits"), ("adversarial", "adversarial_logits")):
        again = subject.decide(to_float(torch.from_numpy(found[images]))).numpy()
        assert np.allclose(again, found[logits], atol=1e-4)


def test_pixels_cannot_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many images of a size those of so many are kept, neither fewer nor more; at least one image's."""
    assert [probes_file.kept(1000, shape) for shape in ((32, 32, 3), (224, 224, 3), (4096, 4096, 3))] == [1000, 222, 1]
    monkeypatch.setattr(probes_file, "PIXELS", 3 * 12)
    answers = {"labels": np.zeros(5), **dict.fromkeys(("clean_logits", "adversarial_logits"), np.zeros((5, 3), "f4"))}
    for count in range(6):
        pixels = np.zeros((count, 2, 2, 3), np.uint8)
        (tmp_path / "probes.npz").write_bytes(as_npz({"images": pixels, "change": pixels, **answers}))
        with nullcontext() if count == 3 else pytest.raises(BadEvidence, match="do not fit together"):
            assert len(read_probes(tmp_path / "probes.npz")["labels"]) == 3


def test_a_regression_is_named(subject: Subject, other_run: Path, tmp_path: Path) -> None:
    """Against its own report a model has lost nothing; a worse one is blocked, by the images that it newly loses."""
    wanted = policy(0.001, "1/255", 120, "no_regression at 95 %")
    first = gate(subject, policy(0.001, "1/255", images=90, statistics="fixed"), tmp_path / "first")
    same = gate(subject, wanted, tmp_path / "same", baseline=tmp_path / "first" / "report.json")
    baseline = present(same.baseline)
    assert (same.verdict, len(baseline.newly_broken)) == ("passed", baseline.only_baseline)
    assert baseline.only_baseline <= 2  # other blocks, other random starts
    assert baseline.images == 90
    worse = load_run(other_run).model
    with torch.no_grad():
        worse.get_parameter("net.fc.weight").mul_(-1)  # wrong on almost every image
    decide = exactly(worse)
    turned = replace(subject, model=worse, decide=lambda x: decide(x), digest="f" * 64)
    blocked = gate(
        turned,
        Policy.model_validate(
            {**wanted.model_dump(), "criteria": ["robust_accuracy >= 0.000001 at 95 %", wanted.criteria[2]]}
        ),
        tmp_path / "worse",
        baseline=tmp_path / "first" / "report.json",
    )
    assert blocked.criteria[-1].outcome == "missed"
    assert blocked.verdict == "failed"
    lost = present(blocked.baseline)
    broken = set(lost.newly_broken)
    held = {
        index for index, bit in zip(first.per_image.index, first.evaluation.per_image.robust, strict=True) if bit == "1"
    }
    assert broken <= held
    assert len(broken) == lost.only_baseline > 20


def test_a_baseline_must_be_comparable(subject: Subject, passed: Path, tmp_path: Path) -> None:
    """Another radius, other attacks, or no report at all: said in one line; and no_regression needs one."""
    wanted = policy(0.001, "2/255", 120, "no_regression at 95 %")
    with pytest.raises(BadInput, match="needs --baseline"):
        gate(subject, wanted, tmp_path / "evidence")
    with pytest.raises(BadInput, match="made with other threat"):
        gate(subject, policy(0.03, "3/255"), tmp_path / "evidence", baseline=passed / "report.json")
    other = policy(0.03, attacks={"suite": ["fgsm"], "block": 30, "substitute": 0})
    with pytest.raises(BadInput, match="made with other attacks"):
        gate(subject, other, tmp_path / "evidence", baseline=passed / "report.json")
    with pytest.raises(BadInput, match="not readable as JSON"):
        gate(subject, wanted, tmp_path / "evidence", baseline=passed / "probes.npz")
    assert list(tmp_path.iterdir()) == []


def test_without_gradients_a_model_can_fail_but_not_pass(subject: Subject, tmp_path: Path) -> None:
    """Black-box attacks alone: a find is a fact, none proves nothing."""
    blind = replace(subject, model=None, no_gradients="it lets none through")
    modest = policy(
        0.001, "1/255", 60, attacks={"suite": "fast", "block": 30, "black_box": ["square-40"], "substitute": 0}
    )
    report = gate(blind, modest, tmp_path / "modest")
    assert (report.verdict, report.reasons) == ("inconclusive", ("no_gradients",))
    assert report.why == {"no_gradients": "it lets none through"}
    assert "no gradients, so that only black-box attacks ran: they can block it, not pass it: it lets none through" in (
        tmp_path / "modest" / "report.md"
    ).read_text(encoding="utf-8")
    assert [attack.name for attack in report.evaluation.attacks] == ["square-40"]
    hard = policy(
        0.9, "40/255", 60, attacks={"suite": "fast", "block": 30, "black_box": ["square-40"], "substitute": 0}
    )
    assert gate(blind, hard, tmp_path / "hard").verdict == "failed"


def test_transfer_is_recorded_and_named_an_upper_bound(
    subject: Subject, other_run: Path, standard_run: Path, tmp_path: Path
) -> None:
    """Per image, what held against images crafted on a surrogate; the judged model itself is none."""
    carried = policy(0.03, attacks={"suite": ["pgd-3"], "block": 30, "transfer": ["pgd-3"], "substitute": 0})
    report = gate(subject, carried, tmp_path / "evidence", surrogates={"other": load_run(other_run)})
    (transfer,) = report.transfer
    assert transfer.attacks[0].parameters == dict(Attack.parse_transfer("pgd-3").parameters)  # as the sidecar's
    passes = transfer.attacks[0].per_image.forward
    assert sorted(set(passes) - {0}) == [3]  # it looks at the surrogate, 3 times
    assert passes.count(3) == report.evaluation.clean.k  # with the images that are right
    assert (transfer.about.kind, transfer.about.surrogate) == ("transfer", "other")
    assert len(transfer.per_image.robust) == report.statistics.attacked
    assert transfer.robust.k >= report.evaluation.robust.k
    with pytest.raises(BadInput, match="is the judged model itself"):
        gate(subject, policy(0.03), tmp_path / "own", surrogates={"own": load_run(standard_run)})
    for names, why in ((["apgd-ce"], "'apgd-ce' does not transfer"), (["fgsm", "fgsm"], "fgsm, fgsm: name at least")):
        wrong = policy(0.03, attacks={"suite": ["fgsm"], "transfer": names})
        with pytest.raises(BadInput, match=why):
            gate(subject, wrong, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_damaged_probes_are_bad_evidence(tmp_path: Path) -> None:
    """Whichever byte of the archive is another: one line, or arrays that fit together; never another error."""
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    logits = np.zeros((2, 3), np.float32)
    arrays: dict[str, np.ndarray] = {"images": images, "change": images[::-1], "labels": np.zeros(2)}
    arrays |= {"clean_logits": logits, "adversarial_logits": logits}
    whole, path, seen = as_npz(arrays), tmp_path / "probes.npz", 0
    path.write_bytes(whole)
    assert (read_probes(path)["adversarial"] == images + images[::-1]).all()
    for place in range(len(whole)):
        for flip in (0xFF, 0x01):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                read_probes(path)
            except BadEvidence as error:
                assert str(error).startswith(f"{path}: ")  # noqa: PT017  # either end is right
                seen += 1
    assert seen > len(whole)


def data_of(path: Path, classes: dict[int, int]) -> dict[str, Any]:
    """A policy's data section: the digits with so many test images of each class named, and all of the others."""
    digits = load_dataset("digits")
    kept = [np.flatnonzero(digits.y_test == number)[: classes.get(number)] for number in range(10)]
    index = np.sort(np.concatenate(kept))
    parts: dict[str, Any] = {"x_train": digits.x_train, "y_train": digits.y_train}
    np.savez(path, **parts, x_test=digits.x_test[index], y_test=digits.y_test[index], classes=digits.classes)
    return {"name": "npz", "path": str(path)}


@pytest.mark.parametrize("statistics", ["sequential", "fixed"])
@pytest.mark.parametrize("metric", ["class_robust_accuracy", "class_clean_accuracy"])
def test_a_class_without_images_is_never_met(subject: Subject, tmp_path: Path, metric: str, statistics: str) -> None:
    """It was not tested: bad input before any attack, and the class is named."""
    data = data_of(tmp_path / "data.npz", {3: 0})
    wanted = policy(0.1, "1/255", 0, f"{metric} >= 0.02 at 95 %", data=data, statistics=statistics)
    with pytest.raises(BadInput, match=rf"{metric} >= 0\.02 at 95 %': the test part has no image of class 3;"):
        gate(subject, wanted, tmp_path / "evidence", track=unattacked)
    assert not (tmp_path / "evidence").exists()


def drawn_by(subject: Subject, data: Dataset, wanted: Policy) -> NDArray[np.int64]:
    """The order in which a gate without a key attacks the test images."""
    return order_of(Matter(subject.digest, data.sha256, wanted.digest, len(data.x_test)))


@pytest.mark.parametrize("statistics", ["sequential", "fixed"])
def test_a_class_that_the_cap_never_reaches_is_open(subject: Subject, tmp_path: Path, statistics: str) -> None:
    """No image of it among those attacked: inconclusive, and the line, the report and the page name it."""
    data = {**data_of(tmp_path / "data.npz", {3: 1, 4: 2}), "images": 60}
    loaded, claim = load_dataset("npz", str(tmp_path / "data.npz")), "class_robust_accuracy >= 0.02 at 95 %"
    several = (policy(0.1, "1/255", 0, claim, data=data, statistics=statistics, seed=seed) for seed in range(99))
    # The order follows from digests, so that another processor's weights are attacked in another one.
    wanted = next(one for one in several if 3 not in loaded.y_test[drawn_by(subject, loaded, one)[:60]])
    report = gate(subject, wanted, tmp_path / "evidence")
    assert (report.verdict, report.reasons) == ("inconclusive", ("cap_reached",))
    seen = {name: report.per_image.label.count(number) for number, name in enumerate("0123456789")}
    rows = {row.class_name: row for row in report.criteria if row.class_name is not None}
    assert list(rows) == list("0123456789")
    unseen = [name for name, count in seen.items() if not count]
    assert unseen
    for name in unseen:
        assert (rows[name].outcome, rows[name].value, rows[name].n) == ("open", None, 0)
        assert f"class {name}" in (tmp_path / "evidence" / "report.md").read_text(encoding="utf-8")
    assert {row.outcome for row in rows.values()} <= {"met", "open"}


def test_the_cap_is_no_reason_where_there_was_none(subject: Subject, tmp_path: Path) -> None:
    """A missed criterion ends the gate, whatever is open then; and without a cap it is the images that were too few."""
    missed = policy(0.99, "40/255", 0, "class_robust_accuracy >= 0.02 at 95 %")
    report = gate(subject, missed, tmp_path / "missed")
    assert (report.verdict, report.reasons) == ("failed", ())
    assert "open" in {row.outcome for row in report.criteria}
    # Whatever becomes of three images, a claim of half of them is open.
    few = data_of(tmp_path / "data.npz", {number: int(number < 3) for number in range(10)})
    spent = gate(subject, policy(0.5, "1/255", 0, data=few, statistics="fixed"), tmp_path / "spent")
    assert (spent.verdict, spent.reasons) == ("inconclusive", ("images_spent",))
    assert "the cap on images" not in (tmp_path / "spent" / "report.md").read_text(encoding="utf-8")


def test_the_first_label_that_differs_is_named(subject: Subject, tmp_path: Path) -> None:
    """Labels in another order, another number of classes, another size: each in words of its own."""
    swapped = replace(subject, classes=("0", "1", "3", "2", *"456789"))
    with pytest.raises(BadInput, match=r"class 2 is '2', the model's label 2 is '3'; bring the labels into") as caught:
        gate(swapped, policy(0.03), tmp_path / "evidence", track=unattacked)
    assert "(16, 16, 3)" not in str(caught.value)
    with pytest.raises(BadInput, match="has 10 classes, the model 7"):
        gate(replace(subject, classes=7), policy(0.03), tmp_path / "evidence")
    small = replace(subject, contract=replace(subject.contract, width=8))
    with pytest.raises(BadInput, match="images are 16x16x3, the model takes 16x8x3"):
        gate(small, policy(0.03), tmp_path / "evidence")


def test_logits_that_are_not_finite_are_named(subject: Subject, tmp_path: Path) -> None:
    """On some images they count as wrong, and block the model; on all of them nothing can be judged."""
    some = replace(subject, decide=lambda x: spoilt(subject.decide(x), x, 0.36), digest="a" * 64)
    report = gate(some, policy(0.02, "1/255", 60, statistics="fixed"), tmp_path / "some")
    wild = present(report.evaluation.not_finite)
    means = load_dataset("digits").x_test[list(report.per_image.index)].mean(axis=(1, 2, 3)) / 255
    assert 0 < wild == (means > 0.36).sum() < 60
    assert (report.verdict, report.reasons) == ("failed", ("not_finite",))
    assert report.why == {"not_finite": f"for {wild} of 60 images"}
    assert report.evaluation.clean.k <= 60 - wild
    assert not {"outputs_differ", "batch_dependent"} & {finding.check for finding in report.findings}
    every = replace(subject, decide=lambda x: spoilt(subject.decide(x), x, -1), digest="b" * 64)
    with pytest.raises(BadInput, match="logits are not finite for 128 of 128 images; look for weights"):
        gate(every, policy(0.02), tmp_path / "every", track=unattacked)


def spoilt(logits: torch.Tensor, x: torch.Tensor, bright: float) -> torch.Tensor:
    """NaN for images whose mean is above `bright`."""
    rows = x.mean(dim=(1, 2, 3)).cpu() > bright
    return torch.where(rows[:, None], torch.nan, logits)


@pytest.mark.parametrize(
    ("kind", "dtype", "repair"),
    [
        ("candidate", "uint8", "export its file again with `0..1 mean=[^`]*` in --input, or make it a first layer"),
        ("onnx", "uint8", "make it a first layer of the model"),
        ("onnx", "float32", "declare it: --input 'float32 NHWC 16x16x3 0..1 mean=[^']*'$"),
    ],
)
def test_another_preprocessing_is_told_and_not_blamed_on_the_model(
    subject: Subject, standard_run: Path, tmp_path: Path, kind: str, dtype: str, repair: str
) -> None:
    """The network without the layer that normalises, as files come from elsewhere: bad input, with what repairs it."""
    behind = load_run(standard_run).model.net.eval()
    contract = replace(subject.contract, dtype=dtype)
    foreign = replace(subject, kind=kind, model=behind, decide=exactly(behind), contract=contract, run={})
    said = (
        rf"as `.*` it is right on \d+ % of 64 images, as declared on \d+ %, so its preprocessing is another; {repair}"
    )
    with pytest.raises(BadInput, match=said):
        gate(foreign, policy(0.03), tmp_path / "evidence", track=unattacked)


def test_a_baseline_that_could_lose_nothing_proves_nothing() -> None:
    """Of a baseline with so few images that held, losing all could be chance: open, with the reason, not met."""
    policy = policy_of(["robust_accuracy >= 0.000001 at 95 %", "no_regression at 95 %"])
    for held in (0, 3, 20):
        count = held + 5
        probes = probes_of((2, 2, 3), 10, count)
        flags = tuple(number < held for number in range(count))
        pairs = Pairs("1" * 64, "2" * 64, count, tuple(range(count)), flags, flags)
        found = true_report(probes, {"model.onnx": "3" * 64}, policy=policy, pairs=pairs)
        baseline = present(found.baseline)
        assert (baseline.of, baseline.held) == (count, held)
        small = held < 20
        assert (found.criteria[-1].outcome == "open") == small
        assert found.reasons == (("small_baseline",) if small else ())
        assert (found.verdict == "inconclusive") == small


@pytest.mark.parametrize(("index", "robust"), [([], ""), ([0, 0], "11"), ([0, 450], "11"), ([-1], "1")])
def test_a_baseline_of_other_images_is_bad_input(
    subject: Subject, passed: Path, tmp_path: Path, index: list[int], robust: str
) -> None:
    """None, one twice, or one that the data set has not: it does not follow from its own record."""
    report = report_of(passed).to_json()
    report["per_image"]["index"], report["evaluation"]["per_image"]["robust"] = index, robust
    (tmp_path / "baseline.json").write_text(json.dumps(report))
    wanted = policy(0.03, "2/255", 120, "no_regression at 95 %")
    with pytest.raises(BadInput, match=r"--baseline .*follows from its own record"):
        gate(subject, wanted, tmp_path / "evidence", baseline=tmp_path / "baseline.json", track=unattacked)


def test_a_model_of_floats_is_attacked_at_every_radius_that_is_named(subject: Subject, tmp_path: Path) -> None:
    """As bytes 1.9/255 is 1/255; in floats it is not, and the criterion is about the larger ball."""
    floats = replace(subject, contract=replace(subject.contract, dtype="float32"))
    more = ["robust_accuracy(1.9/255) >= 0.05 at 95 %"]
    for judged, radii in ((subject, []), (floats, ["1.9/255"])):
        report = gate(judged, policy(0.05, "1/255", 60, *more), tmp_path / f"{len(radii)}")
        assert [one.threat.label for one in report.radii] == radii


PLACES = {
    "a file": ("../file", 2),
    "in a file": ("../file/out", 2),
    "a file system that takes nothing": ("/proc/out", 2),
    "the working directory": (".", 2),
    "somebody's directory": ("..", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_found_out_before_the_attacks(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """At once, not minutes later."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    out, code = PLACES[place]
    with pytest.raises(DfmclError, match=f"^{re.escape(out)}: ") as caught:
        gate(subject, policy(0.03), Path(out), track=unattacked)
    assert caught.value.exit_code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
