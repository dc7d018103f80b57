"""What follows from a gate's record: the one way from images, policy and checks to claims, bounds, reasons and verdict.

The gate writes its report by it, and whoever reads a report as evidence derives it again: what somebody edited differs.
Taken as given is what cannot be derived: which attack flipped which image, what each check found, digests and dates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.gating.order import Draw, Matter, order_of
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import NO_REGRESSION, Criterion, Policy, digest_of
from dfmcl.gating.roster import SELDOM, absent_checks, attacks_of, is_early, sources_of
from dfmcl.gating.signing.faults import refusal
from dfmcl.gating.verdict import EXIT_CODES, Claim, Judgement, Outcome, Standing, claims_about, decide, one_look
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.statistics import Flags

Probes = Mapping[str, NDArray[Any]]
Row = dict[str, Any]
MOST_IMAGES = 10**7  # of a data set; drawing the order of more would take the reader's memory
# Special functions of another scipy differ in the last digits; whoever wants another outcome must move far more.
RELATIVE, ABSOLUTE = 1e-9, 1e-12
FOUND = ("check", "why", "do")
OUTCOMES = {"clear", "raised", "not_run"}
PROBES = "probes.npz"
KINDS = {"white-box", "black-box"}
MOST_PASSES = 10**12  # of an attack on an image; more is no count
BALL_FREE = "cw-l2"  # this attack looks beyond the ball
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, BadInput)


@dataclass(frozen=True)
class Record:
    """What a gate saw of one model: all that its verdict follows from.

    policy_sha256, data_sha256, model_sha256: as digests they fix the order.
    grid: whether adversarial images count as uint8.
    population: images of the data set; class_images: of each class, None in reports that do not say.
    labels: `(N,)` of the images attacked, in the order.
    evaluations: one for each of the policy's threats, smallest first; transfer: upper bounds, for the record.
    pairs: baseline and candidate on the baseline's images, where there is a baseline.
    no_gradients: why only black-box attacks could run; None where gradients were there.
    not_finite: images whose logits are not finite as attacks left them.
    draw: of the order, by the gate's key; None where the digests alone fix it.
    """

    policy: Policy
    policy_sha256: str
    data_sha256: str
    model_sha256: str
    grid: bool
    population: int
    classes: Sequence[str]
    class_images: Sequence[int] | None
    labels: NDArray[np.int64]
    evaluations: Sequence[Evaluation]
    transfer: Sequence[Evaluation]
    checks: Sequence[Mapping[str, Any]]
    pairs: Pairs | None = None
    no_gradients: str | None = None
    not_finite: int = 0
    draw: Draw | None = None

    @property
    def matter(self) -> Matter:
        """What the order is of."""
        return Matter(self.model_sha256, self.data_sha256, self.policy_sha256, self.population)

    @property
    def order(self) -> NDArray[np.int64]:
        """All images of the data set `(population,)`, in the order in which they are attacked."""
        return order_of(self.matter, self.draw)

    @property
    def cap(self) -> int:
        """How many of them may be attacked."""
        return self.policy.data.images or self.population

    @property
    def place(self) -> int:
        """Which of the evaluations is at the policy's own radius."""
        return self.policy.place(self.policy.parsed_threat, self.grid)

    @property
    def main(self) -> Evaluation:
        return self.evaluations[self.place]

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """What the criteria say about the data set, but for `no_regression`."""
        criteria = [criterion for criterion in self.policy.parsed_criteria if criterion.metric != NO_REGRESSION]
        return claims_about(criteria, self.classes, self.class_images, self.population)

    @cached_property
    def regressions(self) -> tuple[Criterion, ...]:
        return tuple(criterion for criterion in self.policy.parsed_criteria if criterion.metric == NO_REGRESSION)

    @property
    def among(self) -> int:
        """How many claims share the chance of failing a good model."""
        return len(self.claims) + len(self.regressions)

    @cached_property
    def flags(self) -> list[tuple[Flags, Flags]]:
        """For each evaluation, per image `(N,)`: right as it came, and in the worst case over all attacks there."""
        return [(np.array(one.correct, bool), np.array(one.robust_images, bool)) for one in self.evaluations]

    @property
    def ends(self) -> list[int]:
        """How many images were attacked after each block."""
        size, count = self.policy.attacks.block, len(self.labels)
        return [*range(size, count, size), count]


@dataclass(frozen=True)
class Course:
    """One claim from the first image to the last. own: which of the images `(N,)` it is about; held: of those."""

    claim: Claim
    own: Flags
    held: Flags
    standing: Standing | None

    @staticmethod
    def of(claim: Claim, record: Record) -> Course:
        """Worst case per image over all attacks, or the clean answers, in the order of the record."""
        place = record.policy.place(record.policy.threat_of(claim.criterion), record.grid)
        flags = record.flags[place][claim.criterion.robust]
        own = np.ones(len(flags), bool) if claim.class_index is None else record.labels == claim.class_index
        if record.policy.statistics == "fixed":
            return Course(claim, own, flags[own], None)
        return Course(claim, own, flags[own], Standing.begin(claim, record.among).after(flags[own]))

    def judgement(self, among: int) -> Judgement:
        """After the last image."""
        return one_look(self.claim, self.held, among) if self.standing is None else self.standing.judgement

    def bounds(self, images: int, among: int) -> tuple[float, float]:
        """After so many images of the order."""
        seen = int(self.own[:images].sum())
        if self.standing is not None:
            return self.standing.bounds_after(seen)
        looked = one_look(self.claim, self.held[:seen], among)
        return looked.lower, looked.upper


def derived(record: Record) -> Row:
    """All entries of a report that follow from the record."""
    among = record.among
    courses = [Course.of(claim, record) for claim in record.claims]
    judgements = [course.judgement(among) for course in courses]
    rows = [criterion_row(judgement) for judgement in judgements]
    if record.pairs is not None:
        rows += [regression_row(criterion, record.pairs, among) for criterion in record.regressions]
    why = reasons(record, judgements, rows[len(judgements) :])
    findings = [{key: check[key] for key in FOUND} for check in record.checks if check["outcome"] == "raised"]
    verdict = decide([row["outcome"] for row in rows], findings, list(why))
    order = record.order
    sizes = {} if record.class_images is None else {"class_images": list(record.class_images)}
    draw = {} if record.draw is None else {"draw": record.draw.to_json()}
    return {
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "reasons": list(why),
        "why": why,
        "statistics": {
            "kind": record.policy.statistics,
            "population": record.population,
            "attacked": stop(record, courses, judgements),
            "cap": record.cap,
            "order_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
            **sizes,
            **draw,
        },
        "criteria": rows,
        "progress": progress(record, courses, among),
        "findings": findings,
        "policy": {"sha256": record.policy_sha256},
        "evaluation": record.main.to_json(),
        "radii": [one.to_json() for number, one in enumerate(record.evaluations) if number != record.place],
        "transfer": [one.to_json() for one in record.transfer],
        "per_image": {"index": order[: len(record.labels)].tolist(), "label": record.labels.tolist()},
        "baseline": None if record.pairs is None else record.pairs.to_json(),
    }


def progress(record: Record, courses: Sequence[Course], among: int) -> list[Row]:
    """The bounds after each block, of the claims that are not about one class."""
    return [
        {"images": end, "criterion": number, "lower": lower, "upper": upper}
        for end in record.ends
        for number, course in enumerate(courses)
        if not course.claim.criterion.by_class
        for lower, upper in [course.bounds(end, among)]
    ]


def stop(record: Record, courses: Sequence[Course], judgements: Sequence[Judgement]) -> int:
    """After how many images a gate must stop: at the block that misses a claim or decides all, else the cap."""
    count, decided = len(record.labels), [_decided_at(*pair) for pair in zip(courses, judgements, strict=True)]
    missed = [at for at, judgement in zip(decided, judgements, strict=True) if judgement.outcome == "missed"]
    enough = min([*missed, max(decided)])
    if record.policy.statistics == "fixed" or enough > count:
        return record.cap
    return next(end for end in record.ends if end >= enough)


def _decided_at(course: Course, judgement: Judgement) -> float:
    """The image, counted from 1, after which a claim was decided; infinity while it is open."""
    if judgement.decided_after is None:
        return math.inf
    return int(np.flatnonzero(course.own)[judgement.decided_after - 1]) + 1


def reasons(record: Record, judgements: Sequence[Judgement], regressions: Sequence[Row]) -> dict[str, str]:
    """Why no evidence of this kind will do to pass, each with what is known of it ("": nothing more)."""
    why = {} if record.no_gradients is None else {"no_gradients": record.no_gradients}
    outcomes = [judgement.outcome for judgement in judgements]
    if "missed" not in outcomes and "open" in outcomes:
        capped = record.cap < record.population
        why |= {"cap_reached": f"{record.cap} of {record.population} images"} if capped else {"images_spent": ""}
    count, clean = len(record.labels), record.main.not_finite
    if clean:
        why["not_finite"] = f"for {clean} of {count} images"
    elif record.not_finite:
        why["not_finite"] = f"for {record.not_finite} of {count} images as attacks left them"
    pairs = record.pairs
    if pairs is not None and pairs.images == pairs.of and any(row["outcome"] == "open" for row in regressions):
        why["small_baseline"] = f"{pairs.held} of {pairs.of}"
    return why


def criterion_row(judgement: Judgement) -> Row:
    """A claim as the report has it."""
    criterion = judgement.criterion
    return {
        "criterion": str(judgement.claim),
        "metric": criterion.metric,
        "eps": criterion.eps or None,
        "class": judgement.claim.class_name,
        "threshold": criterion.threshold,
        "confidence": criterion.confidence,
        "outcome": judgement.outcome,
        "decided_after": judgement.decided_after,
        "k": judgement.share.k,
        "n": judgement.share.n,
        "value": judgement.share.value if judgement.share.n else None,
        "lower": judgement.lower,
        "upper": judgement.upper,
    }


def regression_row(criterion: Criterion, pairs: Pairs, among: int) -> Row:
    """`no_regression`: missed where chance would break so many more images in less than its share of the runs.

    The images are a fixed set, looked at once. Met says that no regression was shown, not that there is none; and it
    could have been: open where not all images were compared, and where the baseline held so few that losing every one
    would be chance. k of n images were not newly broken; there is no threshold, and no bounds.
    """
    kept = pairs.images - len(pairs.newly_broken)
    level = (1 - criterion.confidence) / among
    tested = pairs.images == pairs.of and 0.5**pairs.held <= level
    outcome: Outcome = "missed" if pairs.p <= level else "met" if tested else "open"
    return {
        "criterion": str(criterion),
        "metric": criterion.metric,
        "eps": None,
        "class": None,
        "threshold": None,
        "confidence": criterion.confidence,
        "outcome": outcome,
        "decided_after": pairs.images or None,
        "k": kept,
        "n": pairs.images,
        "value": kept / pairs.images if pairs.images else None,
        "lower": None,
        "upper": None,
    }


def require_derived(report: Mapping[str, Any], path: Path, probes: Probes | None = None) -> None:
    """Refuse a report, read from `path`, that differs anywhere from what follows from its own record.

    probes: labels and logits of the images attacked; None where they are not at hand.
    """
    try:
        record = recorded(report, probes)
        _require_sound(report, record, path, probes)
        again = derived(record)
    except MALFORMED as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise refusal("malformed", f"{path}: not a gate's report ({' '.join(lacks.split())[:200]})") from None
    _require(path, "per_image.label: entries", len(record.labels), again["statistics"]["attacked"])
    there = {"why": {}, **report, "policy": {"sha256": report["policy"]["sha256"]}}
    for key, value in again.items():
        if (found := difference(there.get(key), value, key)) is not None:
            raise contradiction(path, *found)


def recorded(report: Mapping[str, Any], probes: Probes | None = None) -> Record:
    """The record in a report. KeyError, TypeError or ValueError where it is none of the gate's."""
    text = {key: value for key, value in report["policy"].items() if key != "sha256"}
    policy, candidate, data, why = Policy.of_text(text), report["candidate"], report["data"], report.get("why", {})
    evaluations = [Evaluation.from_json(value) for value in report["radii"]]
    main = Evaluation.from_json(report["evaluation"])
    grid = candidate["input"]["dtype"] == "uint8"
    evaluations.insert(policy.place(policy.parsed_threat, grid), main)
    blind, draw = main.about.get("kind") == "black-box", report["statistics"].get("draw")
    return Record(
        policy=policy,
        policy_sha256=digest_of(text),
        data_sha256=str(data["sha256"]),
        model_sha256=str(candidate["model_sha256"]),
        grid=grid,
        population=_count(data["images"], MOST_IMAGES),
        classes=[str(name) for name in data["classes"]],
        class_images=report["statistics"].get("class_images"),
        labels=np.array([_count(label, len(data["classes"]) - 1) for label in report["per_image"]["label"]], np.int64),
        evaluations=evaluations,
        transfer=[Evaluation.from_json(value) for value in report["transfer"]],
        checks=report["checks"],
        pairs=None if report["baseline"] is None else Pairs.from_json(report["baseline"]),
        no_gradients=str(why.get("no_gradients", "")) if blind else None,
        not_finite=_not_finite(why, len(report["per_image"]["label"])) if probes is None else wild(probes),
        draw=None if draw is None else Draw.from_json(draw),
    )


def wild(probes: Probes) -> int:
    """Of how many images the logits are not finite, as attacks left them."""
    return int((~np.isfinite(probes["adversarial_logits"])).any(axis=1).sum())


def _not_finite(why: Mapping[str, Any], count: int) -> int:
    """The same as a report says it: all that is known without the logits."""
    said = str(why.get("not_finite", "")).split(" ")
    return int(said[1]) if said[2:] == f"of {count} images as attacks left them".split(" ") else 0


def _count(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no count up to {most:,}")
    return value


def _require_sound(report: Mapping[str, Any], record: Record, path: Path, probes: Probes | None) -> None:
    """What the record's parts say of each other, before anything is derived from them."""
    count, main = len(record.labels), record.main
    expected = [threat.on_grid() if record.grid else threat for threat in record.policy.threats(record.grid)]
    _require_subject(report, record, path)
    _require_checks(report, record, path)
    sizes = record.class_images
    if sizes is not None:
        found = np.bincount(record.labels, minlength=len(record.classes)).tolist()
        least = [max(_count(size, record.population), seen) for size, seen in zip(sizes, found, strict=True)]
        _require(path, "statistics.class_images", list(sizes), least)
        _require(path, "data.images", record.population, sum(sizes))
    _require(path, "radii", [str(one.threat) for one in record.evaluations], [str(threat) for threat in expected])
    attacks, left = _attacks(report, record), main.correct
    for one, threat in zip(record.evaluations, expected, strict=True):
        where = f"evaluation at {threat}"
        _require(path, f"{where}: threat", vars(one.threat), vars(threat))
        _require(path, f"{where}: grid", one.grid, record.grid)
        _require(path, f"{where}: correct", one.correct, main.correct)
        _require(path, f"{where}: images", len(one.correct), count)
        _require(path, f"{where}: not_finite", one.not_finite, main.not_finite)
        _require(path, f"{where}: kind", one.about.get("kind"), main.about.get("kind"))
        _require(path, f"{where}: attacks", ", ".join(attack.name for attack in one.attacks), ", ".join(attacks))
        _require_measured(one)
        left = _require_left(path, where, one, left)
    for one in record.transfer:
        _require_measured(one)
    _require_pairs(path, record)
    if probes is not None:
        _require_answers(path, record, probes)


def _require_subject(report: Mapping[str, Any], record: Record, path: Path) -> None:
    """The kind is one that the policy judges, has the files of that kind, and gives gradients or not."""
    candidate, about = report["candidate"], record.main.about.get("kind")
    kind, files = candidate["kind"], candidate["files"]
    _require(path, "candidate.kind: judged by the policy", kind in record.policy.subjects, True)
    _require(path, "candidate.kind: of files", kind == "candidate", bool(files))
    _require(path, "candidate.model_sha256", record.model_sha256, files.get("model.onnx", record.model_sha256))
    if datetime.fromisoformat(report["created"]).tzinfo is None:
        raise ValueError("created names no time zone")
    _require(path, "data.part", report["data"]["part"], "test")
    _require(path, "data.name", report["data"]["name"], record.policy.data.name)
    _require(path, "evaluation.about: a known kind", about in KINDS, True)
    if kind == "endpoint":
        _require(path, "evaluation.about.kind", about, "black-box")


def _require_checks(report: Mapping[str, Any], record: Record, path: Path) -> None:
    """Each check stands there once, and each that could run did."""
    checks = record.checks
    _require(path, "checks: outcomes", sorted({check["outcome"] for check in checks} - OUTCOMES), [])
    names = [check["check"] for check in checks]
    _require(path, "checks: absent", absent_checks(names, early=is_early(report["policy"])), [])
    outside = sum(one.outside for one in record.main.attacks if not one.name.startswith(BALL_FREE))
    said = {check["check"]: check["outcome"] for check in checks}["outside_ball"]
    _require(path, "checks: outside_ball", said, "raised" if outside else "clear")
    if record.no_gradients is None and any(record.main.correct[: record.policy.checks.images]):
        idle = [check["check"] for check in checks if check["outcome"] == "not_run" and check["check"] not in SELDOM]
        _require(path, "checks: not run", idle, [])


def _attacks(report: Mapping[str, Any], record: Record) -> list[str]:
    surrogates = [str(one.about["surrogate"]) for one in record.transfer]
    sources = sources_of(report["policy"], report["candidate"]["kind"], surrogates)
    return attacks_of(report["policy"], blind=record.no_gradients is not None, sources=sources)


def _require_measured(one: Evaluation) -> None:
    """What is only measured is of the type that it is shown as; ValueError otherwise."""
    for attack in one.attacks:
        counts = (attack.outside, attack.unconfirmed or 0, *attack.forward, *attack.backward)
        for value in counts:
            _count(value, MOST_PASSES)
        if {len(attack.forward), len(attack.backward)} - {0, len(one.correct)}:
            raise ValueError(f"{attack.name}: passes of other images than attacked")
    for seconds in (one.seconds, *(attack.seconds for attack in one.attacks)):
        if type(seconds) not in (int, float) or not 0 <= seconds <= MOST_PASSES:
            raise ValueError(f"{str(seconds)[:20]!r} is no time")


def _require_left(path: Path, where: str, one: Evaluation, left: tuple[bool, ...]) -> tuple[bool, ...]:
    """Each attack saw all that was left before it, in the smaller balls too, and leaves no more; what all leave."""
    for attack in one.attacks:
        _require(path, f"{where}: {attack.name}: images tried", attack.tried, left)
        unseen = [held and not tried for held, tried in zip(attack.held, attack.tried, strict=True)]
        _require(path, f"{where}: {attack.name}: images held without a try", sum(unseen), 0)
        left = attack.held
    return left


def _require_pairs(path: Path, record: Record) -> None:
    """The comparison with a baseline has the candidate's own outcomes, and leaves no image out of one that can pass."""
    if record.pairs is None:
        _require(path, "baseline", None, None if not record.regressions else "the comparison that the policy asks for")
        return
    among = len({*record.pairs.index} & {*range(record.population)})
    _require(path, "baseline.per_image.index: images of the data", among, record.pairs.images)
    index = record.order[: len(record.labels)].tolist()
    held = dict(zip(index, record.main.robust_images, strict=True))
    known = [after for image, after in zip(record.pairs.index, record.pairs.after, strict=True) if image in held]
    _require(path, "baseline.after", known, [held[image] for image in record.pairs.index if image in held])


def _require_answers(path: Path, record: Record, probes: Probes) -> None:
    """Labels and logits in probes.npz say of each image what the record says; one that was wrong was not attacked."""
    _require(path, f"{PROBES}: labels", probes["labels"].tolist(), record.labels.tolist())
    clean, wrong = probes["clean_logits"], ~np.array(record.main.correct, bool)
    other = wrong & ~_alike(clean, probes["adversarial_logits"])
    _require(path, f"{PROBES}: wrong images with other adversarial logits", int(other.sum()), 0)
    _require(path, "evaluation.not_finite", record.main.not_finite, int((~np.isfinite(clean)).any(axis=1).sum()))
    for key, flags in (("clean_logits", record.main.correct), ("adversarial_logits", record.main.robust_images)):
        logits, labels = probes[key], record.labels
        finite = np.isfinite(logits).all(axis=1)
        own = np.where(finite, logits[np.arange(len(labels)), labels], -np.inf)
        others = logits.copy()
        others[np.arange(len(labels)), labels] = -np.inf
        best = np.where(finite, others.max(axis=1), np.inf)
        right, known = own > best, own != best  # a tie is answered by whichever place comes first, there
        wrong = np.flatnonzero((right != np.array(flags)) & known)
        if len(wrong):
            first = int(wrong[0])
            held = "right" if flags[first] else "wrong"
            raise contradiction(path, f"{PROBES}: {key} of image {first}", held, "right" if right[first] else "wrong")


def _alike(one: NDArray[Any], other: NDArray[Any]) -> Flags:
    """Whether rows of logits `(N, K)` are the same, no numbers too."""
    return np.asarray(((one == other) | (np.isnan(one) & np.isnan(other))).all(axis=1))


def contradiction(path: Path, field: str, there: object, again: object) -> Exception:
    """The error that names a field, what is there, and what follows from the record."""
    said = [" ".join(repr(value).split())[:100] for value in (there, again)]
    return refusal("contradiction", f"{path}: {field} is {said[0]}, and {said[1]} follows from its own record")


def _require(path: Path, field: str, there: Any, again: Any) -> None:
    if there != again:
        found = difference(there, again, field)
        raise contradiction(path, *(found or (field, there, again)))


def difference(there: Any, again: Any, field: str) -> tuple[str, Any, Any] | None:
    """The first place where a value is not what was derived: its name, what is there, what was derived."""
    if isinstance(there, Mapping) and isinstance(again, Mapping):
        keys = [*again, *(key for key in there if key not in again)]
        pairs = [(f"{field}.{key}", there.get(key, ABSENT), again.get(key, ABSENT)) for key in keys]
    elif isinstance(there, list | tuple) and isinstance(again, list | tuple):
        if list(there) == list(again) and all(type(item) is int for item in there):
            return None
        if len(there) != len(again):
            return f"{field}: entries", len(there), len(again)
        pairs = [(f"{field}[{place}]", *pair) for place, pair in enumerate(zip(there, again, strict=True))]
    else:
        return None if _same(there, again) else (field, there, again)
    return next((found for name, one, two in pairs if (found := difference(one, two, name)) is not None), None)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _same(there: Any, again: Any) -> bool:
    if isinstance(there, bool) or isinstance(again, bool) or not isinstance(there, int | float):
        return type(there) is type(again) and bool(there == again)
    if not isinstance(again, int | float):
        return False
    if isinstance(again, int) != isinstance(there, int):  # a count is no 48.0, which another reader refuses
        return False
    return there == again if isinstance(again, int) else math.isclose(there, again, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
