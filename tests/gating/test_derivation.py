"""A report says what follows from its own record: any other word in it is refused, by whichever command reads it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from dfmcl.common.files import sha256_of
from dfmcl.gating.criterion import Criterion
from dfmcl.gating.derivation import derived
from dfmcl.gating.order import Matter, order_of
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.record import recorded
from dfmcl.gating.roster import LATER, attacks_of, sources_of
from dfmcl.gating.signing.attestation import NotAttested
from dfmcl.gating.signing.evidence import candidate_files, read_evidence, read_report
from dfmcl.gating.signing.faults import EvidenceError
from dfmcl.gating.signing.probes_file import as_npz
from dfmcl.gating.signing.report import Report, RunEntry
from dfmcl.gating.soundness import require_derived
from dfmcl.gating.verdict import Standing, claims_about, one_look
from dfmcl.robustness import checks
from dfmcl.robustness.means import AnswerCounts, MeanSequence
from dfmcl.robustness.reasons import REASONS
from dfmcl.robustness.records import Evaluation, from_bits
from dfmcl.robustness.threats.registry import parse_threat
from tests.exports import Export
from tests.findings import FIGURES, finding
from tests.present import present
from tests.serving.workshop import write_run
from tests.signing import (
    code_of,
    corrupted,
    evaluated,
    make_key,
    policy_of,
    probes_of,
    report_on,
    sign_again,
    true_report,
    write_report,
    write_trust,
)

CRITERIA = (
    "robust_accuracy >= 0.3 at 95 %",
    "robust_accuracy(8/255) >= 0.4 at 95 %",
    "clean_accuracy >= 0.5 at 95 %",
    "class_clean_accuracy >= 0.05 at 95 %",
    "no_regression at 95 %",
    "corruption_accuracy(fog@1|fog@2|snow@1) >= 0.5 at 95 %",
    "corruption_accuracy(each of fog@1|fog@2|snow@1) >= 0.3 at 95 %",
    "no_regression(linf:38/255|fog@2) at 95 %",
)
BLOCK, POPULATION = 8, 100
# Measured, or about another file: nothing in the report says what they should be, within bounds.
GIVEN = ("seconds", "about", "outside", "unconfirmed", "forward", "backward")
GIVEN_PATHS = {
    ("baseline", "report_sha256"), ("baseline", "model_sha256"), ("baseline", "per_image", "index"), ("checks",),
    # What transfers from surrogates decides nothing; its counts follow from its own bits.
    ("transfer",), ("transfer", 0, "threat"), ("transfer", 0, "attacks"), ("transfer", 0, "attacks", 0, "name"),
}  # fmt: skip
DERIVED = (
    "verdict", "exit_code", "reasons", "why", "statistics", "criteria", "progress", "findings", "checks", "policy",
    "evaluation", "radii", "transfer", "per_image", "baseline",
)  # fmt: skip


def whole_report(candidate: Path, evidence: Path) -> Report:
    """A passing report with all its parts: two radii, classes, a baseline, transfer, statistics that stop early."""
    reports = (whole_report_on(count, candidate, evidence) for count in range(BLOCK, POPULATION, BLOCK))
    return next(report for report in reports if report.statistics.attacked == len(report.per_image.label))


def whole_report_on(count: int, candidate: Path, evidence: Path) -> Report:
    """The same on so many images, which may be too few or too many to stop at."""
    manifest = json.loads((candidate / "manifest.json").read_text())
    probes = probes_of(manifest["input"]["shape"], len(manifest["labels"]), count)
    (evidence / "probes.npz").write_bytes(as_npz(probes))
    right = np.ones(count, bool)
    held = probes["adversarial_logits"].argmax(axis=1) == probes["labels"]
    before = tuple(held.tolist())
    about = {"kind": "transfer", "surrogate": "other", "surrogate_sha256": "3" * 64}
    policy = policy_of(CRITERIA, statistics="sequential", attacks={"suite": ["fgsm"], "substitute": 0, "block": BLOCK})
    record = {"model": candidate_files(candidate)["model.onnx"], "data": "d" * 64}
    index = order_of(Matter(**record, policy=policy.digest, images=POPULATION))[:count]
    return true_report(
        probes,
        candidate_files(candidate),
        policy=policy,
        run=RunEntry(**manifest["run"]),
        classes=manifest["labels"],
        population=POPULATION,
        class_images=[POPULATION // 10] * 10,
        evaluations=[evaluated(right, right, "8/255"), evaluated(right, held), *under_corruptions(count)],
        transfer=[evaluated(right, right, "38/255", about)],
        pairs=Pairs("1" * 64, "2" * 64, count, tuple(index.tolist()), before, before, in_others(count)),
    )


def under_corruptions(count: int) -> list[Evaluation]:
    """All images hold in light fog, 4 of 5 in a denser one, and of these 3 of 4 in snow."""
    right, place = np.ones(count, bool), np.arange(count)
    fog, snow = place % 5 != 1, (place % 5 != 1) & (place % 4 != 1)
    kinds = {"fog@1": right, "fog@2": fog, "snow@1": snow}
    return [corrupted(right, held, spelling) for spelling, held in kinds.items()]


def in_others(count: int) -> dict[str, tuple[tuple[bool, ...], tuple[bool, ...]]]:
    """Both models under each corruption: the baseline fell in light fog three times, and held as often as this one."""
    held = {str(one.threat): one.robust_images for one in under_corruptions(count)}
    light = tuple(place > 2 for place in range(count))
    return {name: (light if name == "fog@1" else held[name], held[name]) for name in ("fog@2", "fog@1", "snow@1")}


@pytest.fixture(scope="module")
def home(export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A really exported candidate, signed evidence that it passed, and who is trusted."""
    home = tmp_path_factory.mktemp("derivation")
    export_once(write_run(home / "run"), home / "candidate")
    key = make_key(home, "release")
    write_trust(key)
    (home / "evidence").mkdir()
    write_report(home / "evidence", whole_report(home / "candidate", home / "evidence"), key)
    return home


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return shutil.copytree(home, tmp_path / "home")


def commands(home: Path) -> dict[str, list[str]]:
    """The four commands that read a report as evidence."""
    evidence, trust = str(home / "evidence"), ["--trust", str(home / "release.toml")]
    candidate = [str(home / "candidate"), "--evidence", evidence, *trust]
    return {
        "sign": ["sign", evidence, "--key", str(home / "release.key")],
        "verify": ["verify", *candidate],
        "verdict": ["verdict", evidence],
        "promote": ["promote", *candidate, "--repository", str(home / "models"), "--name", "digits"],
    }


def test_a_report_that_follows_is_believed_by_all(place: Path) -> None:
    """Nothing below is refused for another reason: untouched, all four commands end with 0."""
    report = json.loads((place / "evidence" / "report.json").read_text())
    jsonschema.validate(report, json.loads((resources.files("dfmcl.gating") / "report.schema.json").read_text()))
    assert (report["verdict"], len(report["progress"]) >= 6) == ("passed", True)
    assert {name: code_of(*arguments) for name, arguments in commands(place).items()} == dict.fromkeys(
        ("sign", "verify", "verdict", "promote"), 0
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a report whose values follow; of a long list its first, and its length."""
    inner = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and value and path != ("baseline", "per_image", "index"):
        inner = [(0, value[0]), (len(value) - 1, value[-1])]
    for key, one in inner:
        if key not in GIVEN and path != ("transfer", 0, "threat"):
            yield from leaves(one, (*path, key))
    if isinstance(value, dict) or path in GIVEN_PATHS:
        return
    if isinstance(value, list) or path[0] != "checks" or path[-1] == "outcome":
        yield path


def other(value: Any) -> Any:
    """Something else of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value - 0.01 if value > 0.5 else value + 0.01
    if isinstance(value, list):
        return value[:-1] if value else ["cap_reached"]
    if value and not value.strip("01"):
        return value[:-1] + "10"[int(value[-1])]
    return {"passed": "failed", "met": "missed", "clear": "raised", "not_run": "raised"}.get(value, f"{value}0")


def changed(report: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy with one value replaced."""
    spoiled = copy.deepcopy(report)
    inner: Any = spoiled
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = other(inner[path[-1]])
    return spoiled


def test_no_field_can_be_changed(place: Path) -> None:
    """Each value that follows from the record, replaced alone: the reader of evidence refuses it and names a field."""
    evidence = place / "evidence"
    report = json.loads((evidence / "report.json").read_text())
    paths = [path for key in DERIVED for path in leaves(report[key], (key,))]
    assert len(paths) > 200
    found = {path: fault_of(evidence, changed(report, path)) for path in paths}
    assert [path for path, fault in found.items() if fault not in ("contradiction", "malformed", "probes")] == []


def fault_of(evidence: Path, report: dict[str, Any]) -> str:
    """Why a report is not believed; empty where it is."""
    (evidence / "report.json").write_text(json.dumps(report))
    try:
        read_evidence(evidence)
    except EvidenceError as error:
        return "of two lines" if "\n" in str(error) else error.fault
    return ""


def unseen(value: dict[str, Any], image: int) -> dict[str, Any]:
    """An evaluation whose first attack was not shown an image that it broke."""
    one = Evaluation.from_json(value)
    first, *others = one.attacks
    assert not first.held[image]
    tried = tuple(flag and place != image for place, flag in enumerate(first.tried))
    return replace(one, attacks=(replace(first, tried=tried), *others)).to_json()


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    """What a report says of a check."""
    found: dict[str, Any] = next(one for one in report["checks"] if one["check"] == name)
    return found


def figures_of_another(name: str) -> Callable[[dict[str, Any]], object]:
    """The figures of a model that the check finds out, beside the word that it is clear."""
    return lambda r: row(r, name).update(figures=finding(name, "raised").to_json()["figures"])


def left_out(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda r: row(r, name).update(outcome="not_run", figures={})


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a criterion was missed": lambda r: r["criteria"][0].update(k=0, outcome="missed"),
    "a check was raised": lambda r: r["checks"][0].update(outcome="raised"),
    "a softer policy under the old digest": lambda r: r["policy"].update(criteria=["robust_accuracy >= 0.01 at 50 %"]),
    "a softer policy and its rows": lambda r: (
        r["policy"].update(criteria=["robust_accuracy >= 0.01 at 50 %"]),
        r["criteria"][0].update(criterion="robust_accuracy >= 0.01 at 50 %", threshold=0.01, confidence=0.5),
    ),
    "a bound": lambda r: r["criteria"][0].update(lower=0.9),
    "a mean": lambda r: r["criteria"][-5].update(k=r["criteria"][-5]["k"] + 1),
    "a kind of corruption": lambda r: r["criteria"][-3].update(lower=0.6, value=0.7),
    "a kind less": lambda r: r["criteria"].pop(-3),
    "a corruption that spoiled nothing": lambda r: r["radii"][-1]["per_image"].update(
        robust=r["radii"][-1]["per_image"]["correct"]
    ),
    "a corruption less": lambda r: r["radii"].pop(-1),
    "a corruption that the baseline did not meet": lambda r: r["baseline"]["others"].pop(-1),
    "errors of the baseline": lambda r: r["baseline"]["errors"][0].update(before=0.5),
    "a relative error": lambda r: r["baseline"].update(mce=0.5),
    "a regression in fog": lambda r: r["baseline"]["others"][0].update(
        after=r["baseline"]["others"][0]["before"].replace("0", "1")
    ),
    "a count": lambda r: r["evaluation"]["robust"].update(k=48),
    "the order": lambda r: r["per_image"]["index"].reverse(),
    "the exit code": lambda r: r.update(exit_code=3),
    "a failure": lambda r: r.update(verdict="failed", exit_code=1),
    "a finding": lambda r: r["findings"].append({"check": "x", "why": "y", "do": "z"}),
    "an attack less": lambda r: (
        r["evaluation"]["attacks"].clear(),
        r["evaluation"]["per_image"].update(robust=r["evaluation"]["per_image"]["correct"]),
    ),
    "a baseline less": lambda r: r.update(baseline=None),
    "no checks": lambda r: r["checks"].clear(),
    "a check less": lambda r: r["checks"].pop(3),
    "a check twice": lambda r: r["checks"].append(r["checks"][0]),
    "another check in its place": lambda r: r["checks"][5].update(check="bad_gradient"),
    "a check that did not run": lambda r: r["checks"][0].update(outcome="not_run"),
    "an attack from another network less": lambda r: r["evaluation"]["attacks"].pop(),
    "an attack more": lambda r: r["evaluation"]["attacks"].append({**r["evaluation"]["attacks"][0], "name": "pgd-20"}),
    "an attack that did not see an image": lambda r: r["evaluation"]["attacks"].__setitem__(
        0, unseen(r["evaluation"], 0)["attacks"][0]
    ),
    "points outside the ball that no check saw": lambda r: r["evaluation"]["attacks"][0].update(outside=1),
    **{
        f"{name} was clear": figures_of_another(name) for name in FIGURES if name not in ("outside_ball", "seen_images")
    },
    "images of the training part": lambda r: row(r, "seen_images").update(
        outcome="clear", figures=finding("seen_images", "raised").to_json()["figures"]
    ),
    "a chance that is none of its counts": lambda r: row(r, "unaccounted")["figures"].update(p=0.5),
    "more ways than attacks": lambda r: row(r, "unaccounted")["figures"].update(broken=9, p=0.5),
    "a figure less": lambda r: row(r, "outputs_differ").update(figures={}),
    "a check with another meaning": lambda r: row(r, "outputs_differ").update(when="never"),
    "a check with other advice": lambda r: row(r, "outputs_differ").update(do="nothing"),
    **{
        f"{name} had nothing to look at": left_out(name)
        for name in FIGURES
        if name not in ("seen_images", "cr_is_blind")
    },
    "an attack without steps": lambda r: r["evaluation"]["attacks"][0]["parameters"].update(steps=0),
    "a transfer of another attack": lambda r: r["transfer"][0]["attacks"][0]["parameters"].update(steps=1),
    "attacks that asked nothing": lambda r: [
        attack["per_image"].update({way: [0] * len(attack["per_image"][way]) for way in ("forward", "backward")})
        for attack in r["evaluation"]["attacks"]
    ],
    "more outside than stood": lambda r: r["radii"][0]["attacks"][0].update(outside=10**6),
    "more dropped than stood": lambda r: r["radii"][0]["attacks"][0].update(unconfirmed=10**6),
    "another seed": lambda r: r["evaluation"].update(seed=1),
    "another seed in a smaller ball": lambda r: r["radii"][0].update(seed=1),
    "another seed of a transfer": lambda r: r["transfer"][0].update(seed=1),
    "another part of the data": lambda r: r["data"].update(part="train"),
    "another kind": lambda r: r["candidate"].update(kind="module"),
    "another data set": lambda r: r["data"].update(name="cifar10"),
    "another model": lambda r: r["candidate"].update(model_sha256="0" * 64),
    "other data": lambda r: r["data"].update(sha256="0" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_contradiction_is_refused_by_all_four_commands(
    place: Path, capfd: pytest.CaptureFixture[str], lie: str
) -> None:
    """Signed by a trusted key as it stands, it is 1 for all four, in one line that says why."""
    evidence = place / "evidence"
    report = json.loads((evidence / "report.json").read_text())
    LIES[lie](report)
    sign_again(evidence, place / "release.key", **report)
    assert (evidence / "report.json").read_text() == json.dumps(report)
    expected = {"a failure": {"verify": "verdict", "promote": "verdict"}}.get(lie, {})
    for name, arguments in commands(place).items():
        assert code_of(*arguments) == 1, name
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert ("the verdict is" if name in expected else "follows from its own record") in said, (name, said)
    assert not (place / "models").exists()


def test_an_early_stop_is_no_stop(home: Path) -> None:
    """A record cut after a block at which the gate would have gone on is not one of the gate's."""
    report = json.loads((home / "evidence" / "report.json").read_text())
    short = copy.deepcopy(report)
    for part in (short["evaluation"], *short["radii"]):
        for bits in (part["per_image"], *(attack["per_image"] for attack in part["attacks"])):
            bits.update({key: value[:BLOCK] for key, value in bits.items()})
    short["per_image"] = {key: value[:BLOCK] for key, value in short["per_image"].items()}
    with pytest.raises(NotAttested, match=r"per_image\.label: entries is 8, and 100 follows|baseline"):
        require_derived(Report.from_json(short), home / "evidence" / "report.json")


def test_probes_that_say_otherwise_are_refused(place: Path) -> None:
    """Logits of another answer than the record's, or labels of other images, contradict it, whatever the digests."""
    evidence = place / "evidence"
    report = report_on(place / "candidate", evidence)
    with np.load(evidence / "probes.npz") as archive:
        probes = {name: archive[name] for name in archive.files}
    spoils = {key: np.roll(probes[key], 1, axis=0) for key in ("labels", "clean_logits", "adversarial_logits")}
    spoils["change"] = np.zeros_like(probes["change"])
    for key, value in spoils.items():
        spoiled = {**probes, key: value}
        (evidence / "probes.npz").write_bytes(as_npz(spoiled))
        write_report(evidence, replace(report, files={"probes.npz": sha256_of(evidence / "probes.npz")}))
        with pytest.raises(NotAttested, match=rf"probes\.npz: (images that )?{key}"):
            read_evidence(evidence)


def test_a_mean_is_that_of_the_answers(home: Path) -> None:
    """Counted by hand from the record: all answers, then those about each kind; no kind is judged by another's."""
    report, _ = read_report(home / "evidence" / "report.json")
    held = np.array([from_bits(one.per_image.robust) for one in report.radii[-3:]])
    _, n = held.shape
    mean, fog, snow, _, _ = report.criteria[-5:]
    assert [(row.corruption, row.answers) for row in (mean, fog, snow)] == [(None, 3), ("fog", 2), ("snow", 1)]
    for row, rows in ((mean, held), (fog, held[:2]), (snow, held[2:])):
        assert (row.k, row.n) == (rows.sum(), rows.size)
        one, other = (MeanSequence.begin(POPULATION, len(rows), level) for level in (0.95, 1 - 0.05 / 18))
        seen = AnswerCounts(rows.sum(axis=0), len(rows))
        assert row.lower == one.after(seen).lower[-1] / (POPULATION * len(rows))
        assert row.upper == other.after(seen).upper[-1] / (POPULATION * len(rows))
        assert row.outcome == "met"
        assert row.decided_after is not None
        assert row.decided_after <= n
    assert fog.criterion == "corruption_accuracy(each of fog@1|fog@2|snow@1) >= 0.3 at 95 %, fog"


def test_a_regression_in_another_threat_is_of_that_threat(home: Path) -> None:
    """The worst of ball and fog on both sides, counted by hand; the errors under corruptions are those of the flags."""
    report, _ = read_report(home / "evidence" / "report.json")
    own = np.array(from_bits(report.evaluation.per_image.robust))
    light, fog, snow = (np.array(from_bits(one.per_image.robust)) for one in report.radii[-3:])
    row, baseline = report.criteria[-1], report.baseline
    assert baseline is not None
    assert row.criterion == "no_regression(linf:38/255|fog@2) at 95 %"
    assert (row.outcome, row.k, row.n, row.eps) == ("met", len(own), len(own), "linf:38/255|fog@2")
    assert baseline.regressions is not None
    (found,) = baseline.regressions
    assert (found.held, found.only_baseline, found.only_candidate) == ((own & fog).sum(), 0, 0)
    assert baseline.errors is not None
    kinds = {one.corruption: (one.before, one.after) for one in baseline.errors}
    before = (3 + (~fog).sum()) / (2 * len(fog))
    assert kinds["fog"] == pytest.approx((before, ((~light).sum() + (~fog).sum()) / (2 * len(fog))))
    assert kinds["snow"] == pytest.approx(((~snow).mean(), (~snow).mean()))
    assert baseline.mce == pytest.approx((kinds["fog"][1] / kinds["fog"][0] + 1) / 2)


@pytest.mark.parametrize(("before", "after", "outcome"), [(40, 0, "missed"), (3, 3, "open"), (40, 40, "met")])
def test_a_threat_that_newly_breaks_images_is_missed_by_name(before: int, after: int, outcome: str) -> None:
    """The policy's own ball lost nothing: the criterion about patches is missed where all images newly fall to one, and
    open where the baseline held three."""
    policy = policy_of(["robust_accuracy >= 0.1 at 95 %", "no_regression at 95 %", "no_regression(patch:2x2) at 95 %"])
    probes, right, place = probes_of((16, 16, 3), 10), np.ones(40, bool), np.arange(40)
    held = probes["adversarial_logits"].argmax(axis=1) == probes["labels"]
    found = corrupted(right, place < after, "fog@1")
    attacks = tuple(replace(found.attacks[0], name=name) for name in ("patch", "patch-rs-500"))
    found = replace(found, threat=parse_threat("patch:2x2"), attacks=attacks)
    own, patched = tuple(held.tolist()), tuple((place < before).tolist())
    index = order_of(Matter("3" * 64, "d" * 64, policy.digest, 40)).tolist()
    pairs = Pairs("1" * 64, "2" * 64, 40, tuple(index), own, own, {"patch 2x2": (patched, found.robust_images)})
    evaluations = [evaluated(right, held), found]
    report = true_report(probes, {"model.onnx": "3" * 64}, policy=policy, evaluations=evaluations, pairs=pairs)
    require_derived(report, Path("report.json"), probes)
    assert [row.outcome for row in report.criteria] == ["met", "met", outcome]
    assert report.why == ({"small_baseline": "3 of 40 in patch:2x2"} if outcome == "open" else {})


def test_a_kind_without_images_is_open() -> None:
    """Nothing was asked: no threshold is reached, not even that of nothing, by either kind of statistics."""
    criterion = Criterion.parse("corruption_accuracy(each of fog|snow) >= 0 at 95 %")
    for claim in claims_about([criterion], ["a"], None, 9):
        assert Standing.begin(claim, 2).judgement.outcome == "open"
        assert one_look(claim, AnswerCounts.none(5), 2).outcome == "open"


def test_the_same_last_digits_are_not_asked_for(home: Path) -> None:
    """Another scipy's last digits are no contradiction; a billionth of a bound is."""
    path = home / "evidence" / "report.json"
    report, _ = read_report(path)
    first, *others = report.criteria
    lower = present(first.lower)
    require_derived(replace(report, criteria=(replace(first, lower=lower * (1 + 1e-13)), *others)), path)
    with pytest.raises(NotAttested, match=r"criteria\[0\]\.lower is"):
        require_derived(replace(report, criteria=(replace(first, lower=lower * (1 + 1e-7)), *others)), path)


def test_an_image_that_fell_in_a_smaller_ball_fell_in_a_larger_one(place: Path) -> None:
    """A record that lets it stand again is refused, though all its figures follow from that."""
    path = place / "evidence" / "report.json"
    report, _ = read_report(path)
    record = recorded(report)
    small, main, *others = record.evaluations
    (attack,) = small.attacks[:1]
    held = tuple(flag and place != 1 for place, flag in enumerate(attack.held))
    passes = tuple(map(int, held))
    later = [replace(one, held=held, tried=held, forward=passes, backward=passes) for one in small.attacks[1:]]
    fallen = [replace(attack, held=held), *later]
    again = derived(replace(record, evaluations=(replace(small, attacks=tuple(fallen)), main, *others)))
    assert again.verdict == "passed"
    with pytest.raises(NotAttested, match=r"fgsm: images tried"):
        require_derived(replace(report, **vars(again)), path)


OTHERWISE_TYPED: tuple[Callable[[dict[str, Any], dict[str, Any]], object], ...] = (
    lambda report, attack: attack.update(seconds="long"),
    lambda report, attack: attack.update(seconds=10**400),
    lambda report, attack: attack.update(outside=None),
    lambda report, attack: report["evaluation"].update(images=float(report["evaluation"]["images"])),
    lambda report, attack: report["evaluation"].update(not_finite=None),
    lambda report, attack: report.update(exit_code=False),
    lambda report, attack: report.update(note="splendid"),
    lambda report, attack: attack["per_image"].update(forward=["many"] * len(attack["per_image"]["held"])),
    lambda report, attack: attack["per_image"].update(backward=[1]),
    lambda report, attack: report.update(created="2026-01-02T03:04:05"),
)


@pytest.mark.parametrize("spoil", OTHERWISE_TYPED)
def test_a_part_of_another_type_is_no_report(
    place: Path, spoil: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    """Another type, a part that nobody knows, a measured figure that is none: 2, and no error of ours."""
    path = place / "evidence" / "report.json"
    report = json.loads(path.read_text())
    spoil(report, report["evaluation"]["attacks"][0])
    path.write_text(json.dumps(report))
    assert code_of("verdict", str(place / "evidence")) == 2


def test_the_roster_is_that_of_the_gate() -> None:
    """The names that a reader without torch knows are those of the checks that run, in their order."""
    assert [check.run.__name__ for check in checks.CHECKS.values()] == list(REASONS)
    assert {*REASONS} >= LATER


@pytest.mark.parametrize(
    ("attacks", "kind", "surrogates", "blind", "names"),
    [
        ({"suite": "fast", "substitute": 9}, "onnx", [], False, "cr apgd-ce-20 subspace-10 pgd-3:substitute"),
        ({"suite": "fast"}, "onnx", ["a"], False, "apgd-ce apgd-t"),
        ({"suite": ["fgsm"], "substitute": 0}, "candidate", ["a", "b", "a+b"], False, "fgsm pgd-3:a pgd-3:b pgd-3:a+b"),
        ({"suite": ["fgsm", "rays-9"], "substitute": 9}, "endpoint", ["a"], True, "rays-9 square-9 pgd-3:a"),
        ({"suite": ["square-9"], "substitute": 9}, "onnx", [], True, "square-9 pgd-3:substitute"),
    ],
)
def test_a_policy_implies_its_attacks(
    attacks: dict[str, Any], kind: str, surrogates: list[str], blind: bool, names: str
) -> None:
    """The suite's, without gradients those by queries; then from each other network. None of it where none was."""
    policy = policy_of(attacks={"transfer": ["pgd-3"], "black_box": ["square-9"], **attacks})
    found = attacks_of(policy, "linf", blind=blind, sources=sources_of(policy, kind, surrogates))
    assert found == [name.replace(":", " from ") for name in names.split()]


@pytest.mark.parametrize(("suite", "substitute"), [("fast", 0), (["fgsm"], 2000), (["fgsm", "pgd-20"], 0)])
def test_attacks_that_the_policy_implies_and_that_did_not_run_are_missed(
    place: Path, suite: str | list[str], substitute: int
) -> None:
    """A record that holds FGSM alone is none of a gate by such a policy, and no signature makes it one."""
    evidence, candidate = place / "evidence", place / "candidate"
    policy = policy_of(attacks={"suite": suite, "substitute": substitute})
    write_report(evidence, report_on(candidate, evidence, policy=policy), place / "release.key")
    for name, arguments in commands(place).items():
        assert code_of(*arguments) == 1, name


@pytest.mark.parametrize("key", ["adversarial_logits", "clean_logits"])
def test_answers_to_wrong_images_are_the_clean_ones(place: Path, key: str) -> None:
    """What was wrong as it came was not attacked: another answer, or one that is a number once, is no gate's."""
    evidence, files = place / "evidence", candidate_files(place / "candidate")
    probes = probes_of((16, 16, 3), 10)
    for logits in (probes["clean_logits"], probes["adversarial_logits"]):
        logits[2] = np.roll(logits[1], 4)
    probes[key][2, 5] = np.nan
    report = true_report(probes, files, policy=policy_of(["robust_accuracy >= 0.1 at 95 %"]))
    (evidence / "probes.npz").write_bytes(as_npz(probes))
    write_report(evidence, report)
    with pytest.raises(NotAttested, match="wrong images with other adversarial logits is 1"):
        read_evidence(evidence)


@pytest.mark.parametrize("part", ["run", "data"])
def test_a_report_about_another_interface_is_refused(place: Path, capfd: pytest.CaptureFixture[str], part: str) -> None:
    """Signed as it stands: classes or a run that the candidate's own manifest does not name."""
    evidence = place / "evidence"
    report = report_on(place / "candidate", evidence)
    changes: dict[str, Any] = {
        "run": RunEntry(checkpoint_sha256="0" * 64),
        "data": replace(report.data, classes=tuple(f"class {name}" for name in report.data.classes)),
    }
    write_report(evidence, replace(report, **{part: changes[part]}), place / "release.key")
    for name in ("verify", "promote"):
        assert code_of(*commands(place)[name]) == 1
        assert "than manifest.json names" in capfd.readouterr().err
