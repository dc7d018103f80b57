"""What follows from a gate's record: the one way from images, policy and checks to claims, bounds, reasons and verdict.

The gate writes its report by it, and every reader of evidence derives it again: an edited report differs.
Taken as given is what cannot be derived: which attack flipped which image, what each check found, digests and dates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dfmcl.gating.criterion import Criterion
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import Policy
from dfmcl.gating.record import GateRecord, other_than
from dfmcl.gating.signing.evaluation import SuiteEntry, TransferEntry
from dfmcl.gating.signing.report import (
    BaselineEntry,
    BoundsEntry,
    Conclusions,
    CriterionEntry,
    ErrorEntry,
    FindingEntry,
    ImagesEntry,
    PolicyEntry,
    RegressionEntry,
    StatisticsEntry,
    WholeSuite,
)
from dfmcl.gating.verdict import EXIT_CODES, Claim, Judgement, Seen, Standing, decide, one_look
from dfmcl.robustness.drawn import Fates
from dfmcl.robustness.statistics import Flags


@dataclass(frozen=True)
class ClaimCourse:
    """One claim from the first image to the last. own: which of the images `(N,)` it is about; seen: of those."""

    claim: Claim
    own: Flags
    seen: Seen
    standing: Standing | None

    @staticmethod
    def of(claim: Claim, record: GateRecord) -> ClaimCourse:
        """Worst case per image over all attacks, or the clean answers, in the order of the record."""
        seen = record.seen(claim)
        own = np.ones(len(seen), bool) if claim.class_index is None else record.labels == claim.class_index
        if record.policy.statistics == "fixed":
            return ClaimCourse(claim, own, seen[own], None)
        return ClaimCourse(claim, own, seen[own], Standing.begin(claim, record.among).after(seen[own]))

    def judgement(self, among: int) -> Judgement:
        """After the last image."""
        return one_look(self.claim, self.seen, among) if self.standing is None else self.standing.judgement

    def bounds(self, images: int, among: int) -> tuple[float, float]:
        """After so many images of the order."""
        count = int(self.own[:images].sum())
        if self.standing is not None:
            return self.standing.bounds_after(count)
        looked = one_look(self.claim, self.seen[:count], among)
        return looked.lower, looked.upper


def derived(record: GateRecord) -> Conclusions:
    """All entries of a report that follow from the record."""
    among = record.among
    courses = [ClaimCourse.of(claim, record) for claim in record.claims]
    judgements = [course.judgement(among) for course in courses]
    rows = [criterion_row(judgement) for judgement in judgements]
    regressions = compared(record)
    rows += [regression_row(criterion, pairs, among) for criterion, pairs in regressions.items()]
    why = reasons(record, judgements, list(zip(regressions.values(), rows[len(judgements) :], strict=True)))
    raised = [check for check in record.checks if check.outcome == "raised"]
    verdict = decide([row.outcome for row in rows], [check.check for check in raised], list(why))
    order, main = record.order, SuiteEntry.from_json(record.main.to_json())
    others = other_than(record.place, record.evaluations)
    return Conclusions(
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        reasons=tuple(why),
        why=why,
        statistics=StatisticsEntry(
            kind=record.policy.statistics,
            population=record.population,
            attacked=stop(record, courses, judgements),
            cap=record.cap,
            order_sha256=hashlib.sha256(order.tobytes()).hexdigest(),
            class_images=None if record.class_images is None else tuple(record.class_images),
            draw=record.draw,
            whole=whole_suite(record),
        ),
        criteria=tuple(rows),
        progress=tuple(progress(record, courses, among)),
        findings=tuple(FindingEntry(check=one.check, why=one.why, do=one.do) for one in raised),
        policy=PolicyEntry.of(record.policy),
        evaluation=main,
        radii=tuple(SuiteEntry.from_json(one.to_json()) for one in others),
        transfer=tuple(TransferEntry.from_json(one.to_json()) for one in record.transfer),
        per_image=ImagesEntry(index=tuple(order[: len(record.labels)].tolist()), label=tuple(record.labels.tolist())),
        baseline=None if record.pairs is None else baseline_entry(record.pairs, record.policy, regressions),
    )


def compared(record: GateRecord) -> dict[Criterion, Pairs]:
    """The criteria that forbid a regression, with both models in the threat of each; none without a baseline."""
    if record.pairs is None:
        return {}
    return {
        criterion: record.pairs.within(record.policy.names_of(criterion, record.grid))
        for criterion in record.regressions
    }


def baseline_entry(pairs: Pairs, policy: Policy, regressions: Mapping[Criterion, Pairs]) -> BaselineEntry:
    """The comparison, with what is decided in other threats, and the errors under corruptions that both models met."""
    rows = tuple(
        RegressionEntry(
            threat=str(policy.threat_of(criterion)),
            held=one.held,
            only_baseline=one.counts.only_first,
            only_candidate=one.counts.only_second,
            p=one.p,
            newly_broken=one.newly_broken,
        )
        for criterion, one in regressions.items()
        if criterion.eps
    )
    kinds: dict[str, list[str]] = {}
    for name in policy.spoiled:
        if pairs.images and name in pairs.others:
            kinds.setdefault(name.partition("@")[0], []).append(name)
    shares = {kind: pairs.errors(names) for kind, names in kinds.items()}
    known = bool(shares) and all(before for before, _ in shares.values())
    return replace(
        pairs.entry,
        regressions=rows or None,
        errors=tuple(ErrorEntry(corruption=kind, before=one, after=two) for kind, (one, two) in shares.items()) or None,
        mce=float(np.mean([after / before for before, after in shares.values()])) if known else None,
    )


def whole_suite(record: GateRecord) -> WholeSuite | None:
    """How the drawn images fared, where only these met the whole suite: drawn, of those tried, and of those lost."""
    if not record.whole:
        return None
    seen = Fates.by(record.main, record.drawn, record.whole)
    drawn, tried, lost = (int(one.sum()) for one in (seen.drawn, seen.drawn & seen.held, seen.lost))
    return WholeSuite(chance=record.policy.attacks.chance, drawn=drawn, tried=tried, lost=lost)


def progress(record: GateRecord, courses: Sequence[ClaimCourse], among: int) -> list[BoundsEntry]:
    """The bounds after each block, of the claims that are not about one class or one kind of corruption."""
    return [
        BoundsEntry(images=end, criterion=number, lower=lower, upper=upper)
        for end in record.ends
        for number, course in enumerate(courses)
        if not course.claim.criterion.several
        for lower, upper in [course.bounds(end, among)]
    ]


def stop(record: GateRecord, courses: Sequence[ClaimCourse], judgements: Sequence[Judgement]) -> int:
    """After how many images a gate must stop: at the block that misses a claim or decides all, else the cap."""
    count, decided = len(record.labels), [_decided_at(*pair) for pair in zip(courses, judgements, strict=True)]
    missed = [at for at, judgement in zip(decided, judgements, strict=True) if judgement.outcome == "missed"]
    enough = min([*missed, max(decided)])
    if record.policy.statistics == "fixed" or enough > count:
        return record.cap
    return next(end for end in record.ends if end >= enough)


def _decided_at(course: ClaimCourse, judgement: Judgement) -> float:
    """The image, counted from 1, after which a claim was decided; infinity while it is open."""
    if judgement.decided_after is None:
        return math.inf
    return int(np.flatnonzero(course.own)[judgement.decided_after - 1]) + 1


def reasons(
    record: GateRecord, judgements: Sequence[Judgement], regressions: Sequence[tuple[Pairs, CriterionEntry]]
) -> dict[str, str]:
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
    small = [
        f"{pairs.held} of {pairs.of}{f' in {row.eps}' if row.eps else ''}"
        for pairs, row in regressions
        if row.outcome == "open" and pairs.images == pairs.of
    ]
    if small:
        why["small_baseline"] = ", ".join(small)
    return why


def criterion_row(judgement: Judgement) -> CriterionEntry:
    """A claim as the report has it."""
    criterion, share = judgement.criterion, judgement.share
    return CriterionEntry(
        criterion=str(judgement.claim),
        metric=criterion.metric,
        eps=criterion.eps or None,
        class_name=judgement.claim.class_name,
        corruption=judgement.claim.kind or None,
        answers=judgement.claim.answers if judgement.claim.corruptions else None,
        threshold=criterion.threshold,
        confidence=criterion.confidence,
        outcome=judgement.outcome,
        decided_after=judgement.decided_after,
        k=share.k,
        n=share.n,
        value=share.value if share.n else None,
        lower=judgement.lower,
        upper=judgement.upper,
    )


def regression_row(criterion: Criterion, pairs: Pairs, among: int) -> CriterionEntry:
    """`no_regression`: missed where chance would break so many more images in less than its share of the runs.

    The images are a fixed set, looked at once. Met says that no regression was shown, not that there is none; and it
    could have been: open where not all images were compared, and where the baseline held so few that losing every one
    would be chance. k of n images were not newly broken; there is no threshold, and no bounds.
    """
    kept = pairs.images - len(pairs.newly_broken)
    level = (1 - criterion.confidence) / among
    tested = pairs.images == pairs.of and 0.5**pairs.held <= level
    return CriterionEntry(
        criterion=str(criterion),
        metric=criterion.metric,
        eps=criterion.eps or None,
        class_name=None,
        threshold=None,
        confidence=criterion.confidence,
        outcome="missed" if pairs.p <= level else "met" if tested else "open",
        decided_after=pairs.images or None,
        k=kept,
        n=pairs.images,
        value=kept / pairs.images if pairs.images else None,
        lower=None,
        upper=None,
    )
