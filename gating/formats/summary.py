"""A report in plain words and small tables: what every format says, said once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.gating.criterion import CORRUPTION
from dfmcl.gating.kinds import BY_BATCH, KINDS, QUANTISE
from dfmcl.gating.policy import threat_in
from dfmcl.gating.signing.evaluation import EvaluationEntry, SuiteEntry
from dfmcl.gating.signing.report import BaselineEntry, CheckEntry, CriterionEntry, Report
from dfmcl.robustness.folder import described
from dfmcl.robustness.statistics import Share
from dfmcl.robustness.threats.corruption import Corruption

Probes = Mapping[str, NDArray[Any]]
"""Arrays of probes.npz, in the order attacked: images, change, labels, clean_logits, adversarial_logits.

Adversarial images are images + change, modulo 256.
"""

HEADLINES = {
    "passed": "PASSED: every criterion is met",
    "failed": "BLOCKED: the model misses a criterion",
    "suspect": "SUSPECT: the evidence cannot be believed",
    "inconclusive": "INCONCLUSIVE: the images seen do not decide",
}

KEEP = "Keep the released model."
REPAIR = "Repair its numbers: look for weights that are not finite, for a division by zero or an overflow in it."
HARDEN = "Harden this one (longer training, stronger attacks in it)"
TRAIN = "Train this one to be right more often without any attack"
AUGMENT = "Train this one on noisy, blurred and otherwise spoiled images, too"
COMPARE = "Train this one until it holds what the baseline holds"
PROMISE = "or change what is promised; the same images under the same policy will not pass it."
SUSPECT = "Do not promote. Do what each raised check says, then run the gate again."
UNTIL = "Until then a human may decide, and nobody promotes."

REASONS = {
    "cap_reached": "the cap on images was reached (data.images of the policy) before the bounds left the threshold",
    "images_spent": "all images of the data set were attacked, and are too few for the bounds to leave the threshold",
    "small_baseline": "so few of the baseline's images held that losing them all could be chance",
    "no_gradients": "the model gives no gradients, so that only black-box attacks ran: they can block it, not pass it",
    "not_finite": "logits are not finite",
}

REMEDIES = {
    "cap_reached": "raise data.images in the policy, or promise less",
    "images_spent": "bring more test images, or promise less",
    "small_baseline": "compare with a baseline that holds on more images",
    "no_gradients": "bring gradients (--run of a candidate, or a file that can be differentiated)",
}
# Sentences about criteria: a policy may have hundreds, a person reads some.
MOST = 20


@dataclass(frozen=True)
class ClassRow:
    """One class: images of it, how many are right and how many held; exact two-sided 95 % interval of the latter.

    threshold, outcome: of the policy's criterion about this class, where there is one.
    """

    name: str
    images: int
    right: int
    held: int
    lower: float
    upper: float
    threshold: float | None = None
    outcome: str | None = None


@dataclass(frozen=True)
class AttackRow:
    """One attack of the suite, in the order in which they ran. left: images still right after it, of all."""

    name: str
    tried: int
    flipped: int
    left: int
    images: int
    seconds: float
    forward: int
    backward: int


def percent(share: float | None) -> str:
    """`45.0 %`, or a dash where nothing was measured."""
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`38 s`, `12 min 5 s`, `2 h 3 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def order(report: Report) -> str:
    """Which order the images were attacked in, and who drew it."""
    draw = report.statistics.draw
    by = "fixed by digests alone" if draw is None else f"drawn by key {draw.keyid[:12]}"
    return f"{report.statistics.order_sha256}, {by}"


def threat(evaluation: EvaluationEntry[Any]) -> str:
    """`Linf 8/255 as uint8`."""
    return f"{evaluation.threat.parsed} as {evaluation.grid}"


def others(report: Report) -> list[SuiteEntry]:
    """Evaluations at other threats than the policy's own that are no corruptions: those are a table of their own."""
    return [one for one in report.radii if not isinstance(one.threat.parsed, Corruption)]


def unions(report: Report) -> list[tuple[str, Share]]:
    """The worst case over several threats, where a criterion names one: its spelling, and the share that holds."""
    rows = {row.eps: Share(row.k, row.n) for row in report.criteria if row.metric == "robust_accuracy" and row.n}
    norm = report.evaluation.threat.parsed.kind
    named = [(threat_in(eps, norm), share) for eps, share in rows.items() if eps]
    return [(str(threat), share) for threat, share in named if len(threat.parts) > 1]


def claim(report: Report) -> str:
    """The subject of the verdict: exactly these images, or the population that they were drawn from."""
    statistics, whole = report.statistics, report.statistics.whole
    part = f"{report.data.name} ({report.data.part} part)"
    skipped = described(report.data.skipped or {})
    remark = f" The loader {skipped}." if skipped else ""
    if whole is not None:
        remark = (
            f" All of them met the suite fast; {whole.drawn:,}, drawn beforehand, were to meet the whole standard"
            f" suite: {whole.tried:,} of these held until then, and {whole.lost:,} fell. The bounds are about the"
            f" whole suite and all images.{remark}"
        )
    if statistics.kind == "sequential":
        return (
            f"The claim is about exactly the {statistics.population:,} images of {part}, and this attack suite."
            f" {statistics.attacked:,} of them were attacked, in an order fixed beforehand; the bounds hold however"
            f" often one looks.{remark}"
        )
    return (
        f"The claim is about the population that the images of {part} were drawn from, and this attack suite."
        f" {statistics.attacked:,} images were attacked and looked at once, as fixed beforehand.{remark}"
    )


def headline(report: Report) -> str:
    """The verdict in one line."""
    outcomes = {row.outcome for row in report.criteria}
    if report.verdict == "failed" and "missed" not in outcomes:
        return "BLOCKED: the model does not answer every image with numbers"
    if report.verdict == "inconclusive" and "open" not in outcomes:
        return "INCONCLUSIVE: every criterion is met, and that is not enough"
    return HEADLINES[report.verdict] + (reservations(report) if report.verdict == "passed" else "")


def reservations(report: Report) -> str:
    """What a pass rests on without a test: the checks that did not run, and code that was trusted."""
    absent = [check.check for check in report.checks if check.outcome == "not_run"]
    said = [f"not run: {', '.join(absent)}"] if absent else []
    twin = report.candidate.gradients
    said += [f"gradients came from {twin}"] if twin else []
    said += ["its code was trusted, which can deceive the gate"] if trusted_code(report) else []
    return "".join(f"; {part}" for part in said)


def trusted_code(report: Report) -> bool:
    """Whether a user's code gave the answers."""
    return KINDS[report.candidate.kind].code


def advice(report: Report) -> str:
    """What to do now, by what was found and by what was judged."""
    if report.verdict == "passed":
        by_batch = BY_BATCH in (report.candidate.gradients or "")
        return QUANTISE if by_batch else KINDS[report.candidate.kind].promote
    if report.verdict == "suspect":
        return SUSPECT
    if report.verdict == "inconclusive":
        remedies = [REMEDIES[reason] for reason in report.reasons if reason in REMEDIES]
        return f"{_sentence('; '.join(remedies))}, and run the gate again. {UNTIL}" if remedies else UNTIL
    missed = {row.metric for row in report.criteria if row.outcome == "missed"}
    ways = [HARDEN] if any("robust" in metric for metric in missed) else []
    ways += [TRAIN] if any("clean" in metric for metric in missed) else []
    ways += [AUGMENT] if CORRUPTION in missed else []
    ways += [COMPARE] if "no_regression" in missed else []
    repair = [REPAIR] if "not_finite" in report.reasons else []
    return " ".join([KEEP, *repair, *([f"{'. '.join(ways)} {PROMISE}"] if ways else [])])


def reasons(report: Report) -> list[str]:
    """Why no evidence of this kind will do to pass, a sentence each, with what is known of it."""
    why = report.why or {}
    return [f"{REASONS[reason]}{f': {why[reason]}' if why.get(reason) else ''}" for reason in report.reasons]


def decided(report: Report) -> list[str]:
    """One sentence for each criterion, check or reason that made the verdict; of very many, the first."""
    found = [f"{finding.check} was raised: {finding.why}" for finding in report.findings]
    if report.verdict != "suspect":
        wanted = {"failed": "missed", "inconclusive": "open", "passed": "met"}[report.verdict]
        found = _by_criterion([row for row in report.criteria if row.outcome == wanted], wanted)
    more = [f"and {len(found) - MOST} more"] if len(found) > MOST else []
    return [*found[:MOST], *more, *reasons(report)]


def _by_criterion(rows: Sequence[CriterionEntry], outcome: str) -> list[str]:
    sentences = [judged(row) for row in rows if row.class_name is None and row.corruption is None]
    several: dict[tuple[str, str], list[CriterionEntry]] = {}
    for row in rows:
        if row.class_name is not None:
            several.setdefault((row.criterion.removesuffix(f", class {row.class_name}"), "classes"), []).append(row)
        elif row.corruption is not None:
            several.setdefault((row.criterion.removesuffix(f", {row.corruption}"), "corruptions"), []).append(row)
    for (criterion, kind), same in several.items():
        if len(same) == 1:
            sentences.append(judged(same[0]))
        else:
            named = listed([shortened(row.class_name or row.corruption) for row in same], 5)
            sentences.append(f"{criterion}: {outcome} for {len(same)} {kind}, {named}")
    return sentences


def judged(row: CriterionEntry) -> str:
    """A criterion with its counts, bounds and outcome in one sentence."""
    after = row.n // (row.answers or 1) if row.decided_after is None else row.decided_after
    bounds = "" if row.lower is None else f", bounds {percent(row.lower)} and {percent(row.upper)}"
    said = f"{shortened(row.criterion, 200)}: {row.outcome}"
    return f"{said} after {after:,} images; {counted(row)}{bounds}"


def counted(row: CriterionEntry) -> str:
    """`45 of 96`, or `3,400 of 7,200 answers`."""
    return f"{row.k:,} of {row.n:,}{'' if row.answers is None else ' answers'}"


def compared(record: BaselineEntry) -> list[str]:
    """What a baseline says of further threats, a sentence each, and of corruptions."""
    said = [
        f"In {one.threat} {one.only_baseline} held only there, {one.only_candidate} hold only now (p = {one.p:.3g})."
        for one in record.regressions or ()
    ]
    if record.errors is not None:
        ratio = "not defined, as the baseline makes no error somewhere" if record.mce is None else percent(record.mce)
        said.append(f"Mean corruption error relative to the baseline (mCE): {ratio}.")
    return said


def attack_rows(evaluation: EvaluationEntry[Any]) -> list[AttackRow]:
    """The attacks as they thinned out what held."""
    return [
        AttackRow(
            attack.name,
            attack.tried,
            attack.flipped,
            attack.accuracy.k,
            attack.accuracy.n,
            attack.seconds,
            sum(attack.per_image.forward),
            sum(attack.per_image.backward),
        )
        for attack in evaluation.attacks
    ]


def class_rows(report: Report) -> list[ClassRow]:
    """Per class of the data, at the main radius; classes without an image among those attacked have n = 0."""
    bits = report.evaluation.per_image
    labels, right, held = np.asarray(report.per_image.label), flags(bits.correct), flags(bits.robust)
    wanted = [row for row in report.criteria if row.metric == "class_robust_accuracy" and row.eps is None]
    about = {row.class_name: row for row in wanted}
    rows = []
    for number, name in enumerate(report.data.classes):
        chosen = labels == number
        n, k = int(chosen.sum()), int(held[chosen].sum())
        lower, upper = Share(k, n).bounds if n else (0.0, 1.0)
        criterion = about.get(name)
        rows.append(
            ClassRow(
                name,
                n,
                int(right[chosen].sum()),
                k,
                lower,
                upper,
                None if criterion is None else criterion.threshold,
                None if criterion is None else criterion.outcome,
            )
        )
    return rows


def classes_by_weight(report: Report) -> list[ClassRow]:
    """Classes whose criterion is missed or open first, then the classes with the smallest share that held."""
    weight = {"missed": 0, "open": 1}
    return sorted(
        class_rows(report),
        key=lambda row: (weight.get(row.outcome or "", 2), row.held / row.images if row.images else 0.0),
    )


def confusion(classes: int, probes: Probes) -> NDArray[np.int64]:
    """Counts `(K, K)`: true class by the answer to the image as the attacks left it."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (probes["labels"], probes["adversarial_logits"].argmax(axis=1)), 1)
    return counts


def checks_by_weight(report: Report) -> list[CheckEntry]:
    """All checks: raised ones first, then checks that could not run."""
    weight = {"raised": 0, "not_run": 1, "clear": 2}
    return sorted(report.checks, key=lambda check: weight[check.outcome])


def by_weight(rows: Iterable[CriterionEntry]) -> list[CriterionEntry]:
    """Criteria: missed ones first, then open ones."""
    weight = {"missed": 0, "open": 1, "met": 2}
    return sorted(rows, key=lambda row: weight[row.outcome])


def shortened(name: object, most: int = 80) -> str:
    """A name from outside on one line, cut where it is longer than any table holds."""
    line = " ".join(str(name).split())
    return line if len(line) <= most else f"{line[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def flags(bits: str) -> NDArray[np.bool_]:
    """`0110` as `(N,)` bool."""
    return np.array([bit == "1" for bit in bits], dtype=np.bool_)


def listed(items: Sequence[Any], limit: int) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(str(item) for item in items[:limit]) + more
