"""From what was counted to a verdict. Pure arithmetic; the exit codes are a stable interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.gating.criterion import Criterion
from dfmcl.robustness.drawn import DrawnSequence, Fates, one_look_bounds
from dfmcl.robustness.means import AnswerCounts, MeanSequence, mean_lower_bound, mean_upper_bound
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.sequential import ConfidenceSequence
from dfmcl.robustness.statistics import Flags, Share, lower_bound, upper_bound
from dfmcl.robustness.threats.corruption import Corruption

EXIT_CODES = {"passed": 0, "failed": 1, "inconclusive": 3, "suspect": 4}
Outcome = Literal["met", "missed", "open"]
Seen = Fates | AnswerCounts


@dataclass(frozen=True)
class Claim:
    """One share that must reach a threshold: a criterion, or a criterion for one class.

    class_index: the class whose images it is about; None: all. population: how many of those the data set holds.
    drawn: only a drawn part of the images meets all attacks. kind: of corruption; "": all that the criterion names.
    """

    criterion: Criterion
    population: int
    class_index: int | None = None
    class_name: str | None = None
    drawn: bool = False
    kind: str = ""

    def __str__(self) -> str:
        about = f", class {self.class_name}" if self.class_name is not None else ""
        return f"{self.criterion}{about}{f', {self.kind}' if self.kind else ''}"

    @cached_property
    def corruptions(self) -> tuple[Corruption, ...]:
        """The corruptions whose mean it is about; none where it is about something else."""
        return tuple(one for one in self.criterion.corruptions if self.kind in ("", one.corruption))

    @property
    def answers(self) -> int:
        """How many answers each image gives."""
        return len(self.corruptions) or 1

    def seen(self, evaluations: Sequence[Evaluation], drawn: Flags, whole: int) -> Seen:
        """What images say about it, in their order, and whatever their class.

        evaluations: of these images, one for each threat that it is about. drawn: which of them `(N,)` met the last
        `whole` of the attacks, which others did not.
        """
        if self.corruptions:
            return AnswerCounts.of(evaluations)
        if self.criterion.robust:
            return Fates.worst(evaluations, drawn, whole)
        return Fates.of(np.array(evaluations[0].correct, bool))


@dataclass(frozen=True)
class Judgement:
    """A claim against what was counted: met, missed, or open where the bounds straddle the threshold.

    decided_after: the number of the claim's own images after which that was so; None while it is open.
    """

    claim: Claim
    share: Share
    lower: float
    upper: float
    outcome: Outcome
    decided_after: int | None = None

    @property
    def criterion(self) -> Criterion:
        return self.claim.criterion

    def __str__(self) -> str:
        measured = f"measured {self.share.value:.4f} ({self.share.k} of {self.share.n})" if self.share.n else "no image"
        return f"{self.claim}: {self.outcome}, {measured}, one-sided bounds {self.lower:.4f} and {self.upper:.4f}"


def claims(
    criteria: Sequence[Criterion], classes: Sequence[str], labels: NDArray[np.int64], *, drawn: bool = False
) -> tuple[Claim, ...]:
    """What the criteria say about a data set with labels `(N,)`; drawn: only a part of it meets all attacks.

    BadInput where one is about a class without an image: what cannot be tested is not met.
    """
    sizes = np.bincount(labels, minlength=len(classes)).tolist()
    return claims_about(criteria, classes, sizes, len(labels), drawn=drawn)


def claims_about(
    criteria: Sequence[Criterion],
    classes: Sequence[str],
    sizes: Sequence[int] | None,
    population: int,
    *,
    drawn: bool = False,
) -> tuple[Claim, ...]:
    """The same from how many images each class has; None: nobody knows, and ValueError where a criterion asks."""
    found: list[Claim] = []
    if sizes is None and any(criterion.by_class for criterion in criteria):
        raise ValueError("criteria about classes need the number of images of each")
    sizes = sizes or ()
    empty = [name for name, size in zip(classes, sizes, strict=False) if not size]
    for criterion in criteria:
        part = drawn and criterion.robust
        if criterion.by_class:
            if empty:
                raise BadInput(
                    f"criterion {str(criterion)!r}: the test part has no image of {_named(empty)}; add images of it, or"
                    " promise nothing of each class"
                )
            found += [Claim(criterion, size, index, classes[index], part) for index, size in enumerate(sizes)]
        elif criterion.each:
            kinds = dict.fromkeys(one.corruption for one in criterion.corruptions)
            found += [Claim(criterion, population, kind=kind) for kind in kinds]
        else:
            found.append(Claim(criterion, population, drawn=part))
    return tuple(found)


def _named(classes: Sequence[str], most: int = 10) -> str:
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return f"class {', '.join(classes[:most])}{more}"


@dataclass(frozen=True)
class Standing:
    """A claim while images come in, one by one in an order that does not depend on them.

    To pass, every claim must be met, so each lower bound may err with probability 1 - confidence: a model that misses a
    claim passes no more often. To fail, one missed claim is enough, so that each upper bound has only its share of it,
    (1 - confidence) / `among` (Bonferroni): a model that meets them all fails no more often.
    """

    claim: Claim
    among: int
    seen: Seen
    lower: ConfidenceSequence | DrawnSequence | MeanSequence
    upper: ConfidenceSequence | DrawnSequence | MeanSequence

    @staticmethod
    def begin(claim: Claim, among: int) -> Standing:
        """Before the first image, as one of `among` claims."""
        levels = claim.criterion.confidence, 1 - (1 - claim.criterion.confidence) / among
        if claim.corruptions:
            bounds = [MeanSequence.begin(claim.population, claim.answers, level) for level in levels]
            return Standing(claim, among, AnswerCounts.none(claim.answers), *bounds)
        begin = DrawnSequence.begin if claim.drawn else ConfidenceSequence
        return Standing(claim, among, Fates.none(), *(begin(claim.population, level) for level in levels))

    def after(self, seen: Seen) -> Standing:
        """With the next outcomes of the claim's own images."""
        lower, upper = (_after(bound, seen) for bound in (self.lower, self.upper))
        return replace(self, seen=self.seen + seen, lower=lower, upper=upper)  # type: ignore[operator]  # of one kind

    @property
    def whole(self) -> int:
        """The answers about all images of the population."""
        return self.claim.population * self.claim.answers

    def bounds_after(self, images: int) -> tuple[float, float]:
        """Lower and upper bound of the share, after so many of the images that were seen."""
        if not images:
            return 0.0, 1.0
        return float(self.lower.lower[images - 1]) / self.whole, float(self.upper.upper[images - 1]) / self.whole

    @property
    def judgement(self) -> Judgement:
        """As of now. The first bound to reach the threshold decided, and nothing that came later changes it."""
        threshold = self.claim.criterion.threshold
        met, missed = self.lower.lower / self.whole >= threshold, self.upper.upper / self.whole < threshold
        decided = np.flatnonzero(met | missed)
        outcome: Outcome = "open" if not len(decided) else ("met" if met[decided[0]] else "missed")
        return Judgement(
            self.claim,
            self.seen.share,
            *self.bounds_after(len(self.seen)),
            outcome,
            int(decided[0]) + 1 if len(decided) else None,
        )


def _after(
    bound: ConfidenceSequence | DrawnSequence | MeanSequence, seen: Seen
) -> ConfidenceSequence | DrawnSequence | MeanSequence:
    if isinstance(bound, MeanSequence):
        assert isinstance(seen, AnswerCounts)
        return bound.after(seen)
    assert isinstance(seen, Fates)
    return bound.after(seen) if isinstance(bound, DrawnSequence) else bound.after(seen.kept)


def one_look(claim: Claim, seen: Seen, among: int) -> Judgement:
    """The claim about the population behind the data set, by one look at what was seen: one-sided bounds.

    They are exact, but for those of a mean, which err less often than they may.
    """
    share = seen.share
    if not share.n:
        return Judgement(claim, share, 0.0, 1.0, "open")
    confidence, threshold = claim.criterion.confidence, claim.criterion.threshold
    above = 1 - (1 - confidence) / among
    if isinstance(seen, AnswerCounts):
        lower, upper = mean_lower_bound(seen, confidence), mean_upper_bound(seen, above)
    elif claim.drawn:
        lower, upper = one_look_bounds(seen, confidence, above)
    else:
        lower, upper = lower_bound(share.k, share.n, confidence), upper_bound(share.k, share.n, above)
    outcome: Outcome = "met" if lower >= threshold else "missed" if upper < threshold else "open"
    return Judgement(claim, share, lower, upper, outcome, None if outcome == "open" else len(seen))


def decide(outcomes: Sequence[str], raised: Sequence[str], reasons: Sequence[str] = ()) -> str:
    """The verdict: failed before suspect before inconclusive before passed.

    outcomes: of claims and other criteria; raised: the names of checks that were.
    Failed where any claim is certainly missed: an adversarial image that was found is a fact, however suspect the rest;
    and where the model answers an image with no finite numbers, which nobody can serve.
    Suspect where any check was raised. Inconclusive where a claim is open, or for a reason why no evidence would do.
    """
    if "missed" in outcomes or "not_finite" in reasons:
        return "failed"
    if raised:
        return "suspect"
    return "inconclusive" if "open" in outcomes or reasons else "passed"
