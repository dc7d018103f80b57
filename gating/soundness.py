"""A report from others: its parts must agree, and all that follows must follow from its own record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import Decider
from dfmcl.gating.derivation import derived
from dfmcl.gating.record import GateRecord, Probes, count_of, other_than, recorded
from dfmcl.gating.roster import SELDOM, absent_checks, attacks_of, is_early, sources_of
from dfmcl.gating.signing.faults import refusal
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball

# Special functions of another scipy differ in the last digits; another outcome takes far larger changes.
RELATIVE, ABSOLUTE = 1e-9, 1e-12
OUTCOMES = {"clear", "raised", "not_run"}
PROBES = "probes.npz"
KINDS = {"white-box", "black-box"}
MOST_PASSES = 10**12  # of an attack on an image; more is no count
BALL_FREE = "cw-l2"  # this attack looks beyond the ball
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, BadInput)


def require_derived(report: Report, path: Path, probes: Probes | None = None) -> None:
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
    _require(path, "per_image.label: entries", len(record.labels), again.statistics.attacked)
    there = {"why": {}, **report.to_json()}
    for key, value in again.to_json().items():
        if (found := difference(there[key], value, key)) is not None:
            raise contradiction(path, *found)


def _require_sound(report: Report, record: GateRecord, path: Path, probes: Probes | None) -> None:
    """What the record's parts say of each other, before anything is derived from them."""
    count, main = len(record.labels), record.main
    expected = [threat.on_grid() if record.grid else threat for threat in record.policy.threats(record.grid)]
    own = record.policy.threat.norm
    _require_subject(report, record, path)
    _require_checks(record, path)
    sizes = record.class_images
    if sizes is not None:
        found = np.bincount(record.labels, minlength=len(record.classes)).tolist()
        least = [max(count_of(size, record.population), seen) for size, seen in zip(sizes, found, strict=True)]
        _require(path, "statistics.class_images", list(sizes), least)
        _require(path, "data.images", record.population, sum(sizes))
    _require(path, "radii", [str(one.threat) for one in record.evaluations], [str(threat) for threat in expected])
    left = main.correct
    for one, threat in zip(record.evaluations, expected, strict=True):
        where = f"evaluation at {threat}"
        attacks = _attacks(report, threat.kind, record.no_gradients is not None)
        _require(path, f"{where}: threat", one.threat.to_json(), threat.to_json())
        _require(path, f"{where}: grid", one.grid, record.grid or not isinstance(threat, Ball))
        _require(path, f"{where}: correct", one.correct, main.correct)
        _require(path, f"{where}: images", len(one.correct), count)
        _require(path, f"{where}: not_finite", one.not_finite, main.not_finite)
        _require(path, f"{where}: kind", one.about.get("kind"), main.about.get("kind"))
        _require(path, f"{where}: attacks", ", ".join(attack.name for attack in one.attacks), ", ".join(attacks))
        _require_measured(one)
        left = _require_left(path, where, one, left if threat.kind == own else main.correct, record)
    for one in record.transfer:
        _require_measured(one)
    _require_pairs(path, record)
    if probes is not None:
        _require_answers(path, record, probes)


def _require_subject(report: Report, record: GateRecord, path: Path) -> None:
    """The kind is one that the policy judges, has the files of that kind, and gives gradients or not."""
    about, kind, files = record.main.about.get("kind"), report.candidate.kind, report.candidate.files
    _require(path, "candidate.kind: judged by the policy", kind in record.policy.subjects, True)
    _require(path, "candidate.kind: of files", kind == "candidate", bool(files))
    _require(path, "candidate.model_sha256", record.model_sha256, files.get("model.onnx", record.model_sha256))
    decided = Decider() if report.decided is None else report.decided.decider
    _require(path, "decided", str(decided), str(record.policy.decide.decider))
    if datetime.fromisoformat(report.created).tzinfo is None:
        raise ValueError("created names no time zone")
    _require(path, "data.part", report.data.part, "test")
    _require(path, "data.name", report.data.name, record.policy.data.name)
    _require(path, "evaluation.about: a known kind", about in KINDS, True)
    if kind == "endpoint":
        _require(path, "evaluation.about.kind", about, "black-box")


def _require_checks(record: GateRecord, path: Path) -> None:
    """Each check stands there once, and each that could run did."""
    checks = record.checks
    _require(path, "checks: outcomes", sorted({check.outcome for check in checks} - OUTCOMES), [])
    names = [check.check for check in checks]
    _require(path, "checks: absent", absent_checks(names, early=is_early(record.policy)), [])
    outside = sum(one.outside for one in record.main.attacks if not one.name.startswith(BALL_FREE))
    said = {check.check: check.outcome for check in checks}["outside_ball"]
    _require(path, "checks: outside_ball", said, "raised" if outside else "clear")
    if record.no_gradients is None and any(record.main.correct[: record.policy.checks.images]):
        idle = [check.check for check in checks if check.outcome == "not_run" and check.check not in SELDOM]
        _require(path, "checks: not run", idle, [])


def _attacks(report: Report, kind: str, blind: bool) -> list[str]:
    surrogates = [one.about.surrogate for one in report.transfer]
    sources = sources_of(report.policy, report.candidate.kind, surrogates)
    return attacks_of(report.policy, kind, blind=blind, sources=sources)


def _require_measured(one: Evaluation) -> None:
    """What is only measured is a possible count, or a time; ValueError otherwise."""
    for attack in one.attacks:
        counts = (attack.outside, attack.unconfirmed or 0, *attack.forward, *attack.backward)
        for value in counts:
            count_of(value, MOST_PASSES)
        if {len(attack.forward), len(attack.backward)} - {0, len(one.correct)}:
            raise ValueError(f"{attack.name}: passes of other images than attacked")
    for seconds in (one.seconds, *(attack.seconds for attack in one.attacks)):
        if not 0 <= seconds <= MOST_PASSES:
            raise ValueError(f"{str(seconds)[:20]!r} is no time")


def _require_left(
    path: Path, where: str, one: Evaluation, left: tuple[bool, ...], record: GateRecord
) -> tuple[bool, ...]:
    """Each attack saw all that was left before it, in the smaller balls too, and leaves no more; what all leave.

    The last ones saw only those of them that were drawn, and leave the others as they were.
    """
    for number, attack in enumerate(one.attacks, start=1):
        everyone = number <= len(one.attacks) - record.whole
        shown = [was and (everyone or drawn) for was, drawn in zip(left, record.drawn.tolist(), strict=True)]
        _require(path, f"{where}: {attack.name}: images tried", list(attack.tried), shown)
        may = [was if not tried else None for was, tried in zip(left, attack.tried, strict=True)]
        unseen = [was is not None and held != was for held, was in zip(attack.held, may, strict=True)]
        _require(path, f"{where}: {attack.name}: images held without a try", sum(unseen), 0)
        left = attack.held
    return left


def _require_pairs(path: Path, record: GateRecord) -> None:
    """The comparison with a baseline has the candidate's own outcomes, and leaves no image out of one that can pass."""
    if record.pairs is None:
        _require(path, "baseline", None, None if not record.regressions else "the comparison that the policy asks for")
        return
    pairs, policy = record.pairs, record.policy
    among = len({*pairs.index} & {*range(record.population)})
    _require(path, "baseline.per_image.index: images of the data", among, pairs.images)
    needed, wished = policy.regressed(record.grid), policy.spoiled
    found = dict.fromkeys([*needed, *(wished if pairs.others.keys() >= {*wished} else ())])
    _require(path, "baseline.others: threats", list(pairs.others), list(found))
    index = record.order[: len(record.labels)].tolist()
    measured = {str(one.threat): one for one in record.evaluations}
    for name, (before, after) in {"": (pairs.before, pairs.after), **pairs.others}.items():
        _require(path, f"baseline.before: images {name}".rstrip(), len(before), pairs.images)
        one = measured[name] if name else record.main
        held = dict(zip(index, one.robust_images, strict=True))
        known = [flag for image, flag in zip(pairs.index, after, strict=True) if image in held]
        _require(
            path, f"baseline.after {name}".rstrip(), known, [held[image] for image in pairs.index if image in held]
        )


def _require_answers(path: Path, record: GateRecord, probes: Probes) -> None:
    """Labels and logits in probes.npz say of each image what the record says; one that was wrong was not attacked."""
    _require(path, f"{PROBES}: labels", probes["labels"].tolist(), record.labels.tolist())
    clean, wrong = probes["clean_logits"], ~np.array(record.main.correct, bool)
    other = wrong & ~_alike(clean, probes["adversarial_logits"])
    _require(path, f"{PROBES}: wrong images with other adversarial logits", int(other.sum()), 0)
    _require(path, "evaluation.not_finite", record.main.not_finite, int((~np.isfinite(clean)).any(axis=1).sum()))
    for key, flags in (
        ("clean_logits", record.main.correct),
        ("adversarial_logits", record.main.robust_images),
        *_require_further(path, record, probes),
    ):
        logits, labels = probes[key], record.labels[: len(flags)]
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


def _require_further(path: Path, record: GateRecord, probes: Probes) -> list[tuple[str, tuple[bool, ...]]]:
    """Logits of further threats by their key, with what the record says of their images; none of an earlier gate."""
    others = other_than(record.place, record.evaluations)
    keys = [f"adversarial_logits{number}" for number in range(1, len(others) + 1)]
    there = [key for key in probes if key.startswith("adversarial_logits") and key != "adversarial_logits"]
    if not there:
        return []
    _require(path, f"{PROBES}: threats", len(there), len(others))
    wrong = ~np.array(record.main.correct, bool)
    for key in keys:
        found, count = probes[key], len(probes[key])
        other = wrong[:count] & ~_alike(probes["clean_logits"][:count], found)
        _require(path, f"{PROBES}: {key} of wrong images that differ", int(other.sum()), 0)
    return [(key, one.robust_images[: len(probes[key])]) for key, one in zip(keys, others, strict=True)]


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
