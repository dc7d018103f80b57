"""A report from others: its parts must agree, and all that follows must follow from its own record."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import Decider
from dfmcl.gating.contradiction import contradiction, difference, require
from dfmcl.gating.derivation import derived
from dfmcl.gating.disbelief import require_checks
from dfmcl.gating.order import FIRST_BLOCK, seed_of
from dfmcl.gating.record import GateRecord, Probes, count_of, other_than, recorded
from dfmcl.gating.roster import attacks_of, sources_of
from dfmcl.gating.signing.faults import refusal
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.attacks.suites import FROM, carried_by, parameters_of
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.rules import SPREAD
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball

PROBES = "probes.npz"
KINDS = {"white-box", "black-box"}
MOST_PASSES = 10**12  # of an attack on an image; more is no count
ALIKE = 10 * SPREAD  # of the deviation of clean logits: an image asked twice differs by less, or a check is raised
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
    require(path, "per_image.label: entries", len(record.labels), again.statistics.attacked)
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
    require_checks(record, path, remote=report.candidate.kind == "endpoint")
    sizes = record.class_images
    if sizes is not None:
        found = np.bincount(record.labels, minlength=len(record.classes)).tolist()
        least = [max(count_of(size, record.population), seen) for size, seen in zip(sizes, found, strict=True)]
        require(path, "statistics.class_images", list(sizes), least)
        require(path, "data.images", record.population, sum(sizes))
    require(path, "radii", [str(one.threat) for one in record.evaluations], [str(threat) for threat in expected])
    left, seed = main.correct, seed_of(record.policy.seed, record.draw)
    for one, threat in zip(record.evaluations, expected, strict=True):
        where = f"evaluation at {threat}"
        attacks = _attacks(report, threat.kind, record.no_gradients is not None)
        require(path, f"{where}: threat", one.threat.to_json(), threat.to_json())
        require(path, f"{where}: grid", one.grid, record.grid or not isinstance(threat, Ball))
        require(path, f"{where}: correct", one.correct, main.correct)
        require(path, f"{where}: images", len(one.correct), count)
        require(path, f"{where}: not_finite", one.not_finite, main.not_finite)
        require(path, f"{where}: kind", one.about.get("kind"), main.about.get("kind"))
        require(path, f"{where}: attacks", ", ".join(attack.name for attack in one.attacks), ", ".join(attacks))
        require(path, f"{where}: seed", one.seed, derived_seed(seed, *FIRST_BLOCK))
        left = _require_left(path, where, one, left if threat.kind == own else main.correct, record)
        _require_measured(path, where, one)
    for number, one in enumerate(record.transfer):
        require(path, f"transfer[{number}]: seed", one.seed, seed)
        _require_measured(path, f"transfer[{number}]", one, carried=True)
    _require_pairs(path, record)
    if probes is not None:
        _require_answers(path, record, probes)


def _require_subject(report: Report, record: GateRecord, path: Path) -> None:
    """The kind is one that the policy judges, has the files of that kind, and gives gradients or not."""
    about, kind, files = record.main.about.get("kind"), report.candidate.kind, report.candidate.files
    require(path, "candidate.kind: judged by the policy", kind in record.policy.subjects, True)
    require(path, "candidate.kind: of files", kind == "candidate", bool(files))
    require(path, "candidate.model_sha256", record.model_sha256, files.get("model.onnx", record.model_sha256))
    decided = Decider() if report.decided is None else report.decided.decider
    require(path, "decided", str(decided), str(record.policy.decide.decider))
    if datetime.fromisoformat(report.created).tzinfo is None:
        raise ValueError("created names no time zone")
    require(path, "data.part", report.data.part, "test")
    require(path, "data.name", report.data.name, record.policy.data.name)
    require(path, "evaluation.about: a known kind", about in KINDS, True)
    if kind == "endpoint":
        require(path, "evaluation.about.kind", about, "black-box")


def _attacks(report: Report, kind: str, blind: bool) -> list[str]:
    surrogates = [one.about.surrogate for one in report.transfer]
    sources = sources_of(report.policy, report.candidate.kind, surrogates)
    return attacks_of(report.policy, kind, blind=blind, sources=sources)


def _require_measured(path: Path, where: str, one: Evaluation, *, carried: bool = False) -> None:
    """What is only measured is a possible count, or a time; ValueError otherwise. What a name says is what was run.

    carried: whether all attacks were crafted on other networks.
    """
    for attack in one.attacks:
        _require_spent(path, f"{where}: {attack.name}", attack)
        fixed = carried_by(attack.name) if carried or FROM in attack.name else parameters_of(attack.name)[1]
        require(path, f"{where}: {attack.name}: parameters", dict(attack.parameters), fixed)
    for seconds in (one.seconds, *(attack.seconds for attack in one.attacks)):
        if not 0 <= seconds <= MOST_PASSES:
            raise ValueError(f"{str(seconds)[:20]!r} is no time")


def _require_spent(path: Path, where: str, attack: AttackRecord) -> None:
    """Whoever attacks an image asks about it, and nobody asks about another; each falls, is dropped or lies outside."""
    counts = (attack.outside, attack.unconfirmed or 0, *attack.forward, *attack.backward)
    for value in counts:
        count_of(value, MOST_PASSES)
    if {len(attack.forward), len(attack.backward)} != {len(attack.tried)}:
        raise ValueError(f"{attack.name}: passes of other images than attacked")
    require(path, f"{where}: images with a pass", [passes > 0 for passes in attack.forward], list(attack.tried))
    idle = [passes for passes, tried in zip(attack.backward, attack.tried, strict=True) if not tried]
    require(path, f"{where}: backward passes of images not tried", sum(idle), 0)
    standing = sum(attack.tried) - attack.flipped
    for field, count in (("outside", attack.outside), ("unconfirmed", attack.unconfirmed or 0)):
        require(path, f"{where}: {field}", count, min(count, standing))


def _require_left(
    path: Path, where: str, one: Evaluation, left: tuple[bool, ...], record: GateRecord
) -> tuple[bool, ...]:
    """Each attack saw all that was left before it, in the smaller balls too, and leaves no more; what all leave.

    The last ones saw only those of them that were drawn, and leave the others as they were.
    """
    for number, attack in enumerate(one.attacks, start=1):
        everyone = number <= len(one.attacks) - record.whole
        shown = [was and (everyone or drawn) for was, drawn in zip(left, record.drawn.tolist(), strict=True)]
        require(path, f"{where}: {attack.name}: images tried", list(attack.tried), shown)
        may = [was if not tried else None for was, tried in zip(left, attack.tried, strict=True)]
        unseen = [was is not None and held != was for held, was in zip(attack.held, may, strict=True)]
        require(path, f"{where}: {attack.name}: images held without a try", sum(unseen), 0)
        left = attack.held
    return left


def _require_pairs(path: Path, record: GateRecord) -> None:
    """The comparison with a baseline has the candidate's own outcomes, and leaves no image out of one that can pass."""
    if record.pairs is None:
        require(path, "baseline", None, None if not record.regressions else "the comparison that the policy asks for")
        return
    pairs, policy = record.pairs, record.policy
    among = len({*pairs.index} & {*range(record.population)})
    require(path, "baseline.per_image.index: images of the data", among, pairs.images)
    needed, wished = policy.regressed(record.grid), policy.spoiled
    found = dict.fromkeys([*needed, *(wished if pairs.others.keys() >= {*wished} else ())])
    require(path, "baseline.others: threats", list(pairs.others), list(found))
    index = record.order[: len(record.labels)].tolist()
    measured = {str(one.threat): one for one in record.evaluations}
    for name, (before, after) in {"": (pairs.before, pairs.after), **pairs.others}.items():
        require(path, f"baseline.before: images {name}".rstrip(), len(before), pairs.images)
        one = measured[name] if name else record.main
        held = dict(zip(index, one.robust_images, strict=True))
        known = [flag for image, flag in zip(pairs.index, after, strict=True) if image in held]
        require(path, f"baseline.after {name}".rstrip(), known, [held[image] for image in pairs.index if image in held])


def _require_answers(path: Path, record: GateRecord, probes: Probes) -> None:
    """Labels and logits in probes.npz say of each image what the record says; one that was wrong was not attacked."""
    require(path, f"{PROBES}: labels", probes["labels"].tolist(), record.labels.tolist())
    clean, wrong = probes["clean_logits"], ~np.array(record.main.correct, bool)
    other = wrong & ~_alike(clean, probes["adversarial_logits"])
    require(path, f"{PROBES}: wrong images with other adversarial logits", int(other.sum()), 0)
    require(path, "evaluation.not_finite", record.main.not_finite, int((~np.isfinite(clean)).any(axis=1).sum()))
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
    _require_changes(path, record, probes)


def _require_further(path: Path, record: GateRecord, probes: Probes) -> list[tuple[str, tuple[bool, ...]]]:
    """Logits of further threats by their key, with what the record says of their images; none of an earlier gate."""
    others = other_than(record.place, record.evaluations)
    keys = [f"adversarial_logits{number}" for number in range(1, len(others) + 1)]
    there = [key for key in probes if key.startswith("adversarial_logits") and key != "adversarial_logits"]
    if not there:
        return []
    require(path, f"{PROBES}: threats", len(there), len(others))
    wrong = ~np.array(record.main.correct, bool)
    for key in keys:
        found, count = probes[key], len(probes[key])
        other = wrong[:count] & ~_alike(probes["clean_logits"][:count], found)
        require(path, f"{PROBES}: {key} of wrong images that differ", int(other.sum()), 0)
    return [(key, one.robust_images[: len(probes[key])]) for key, one in zip(keys, others, strict=True)]


def _require_changes(path: Path, record: GateRecord, probes: Probes) -> None:
    """An image that nothing was added to has its own answer, as far as a model answers the same twice.

    Of floats the bytes are only near what was judged. A check that was raised may say that answers differ.
    """
    if any(check.outcome == "raised" for check in record.checks):
        return
    clean = probes["clean_logits"]
    finite = clean[np.isfinite(clean)]
    apart = ALIKE * float(finite.std()) if len(finite) else 0.0
    for number, one in enumerate([record.main, *other_than(record.place, record.evaluations)]):
        place = str(number or "")
        if not one.grid or f"change{place}" not in probes:
            continue
        change = probes[f"change{place}"]
        same = ~change.reshape(len(change), -1).any(axis=1)
        before, after = clean[: len(change)][same], probes[f"adversarial_logits{place}"][: len(change)][same]
        known = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
        other = np.abs(after[known] - before[known]).max(axis=1, initial=0) > apart
        require(path, f"{PROBES}: images that change{place} leaves, with other logits", int(other.sum()), 0)


def _alike(one: NDArray[Any], other: NDArray[Any]) -> Flags:
    """Whether rows of logits `(N, K)` are the same, no numbers too."""
    return np.asarray(((one == other) | (np.isnan(one) & np.isnan(other))).all(axis=1))
