"""From what was counted to a verdict. Pure arithmetic; the exit codes are a stable interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.gating.policy import Criterion
from dfmcl.robustness.drawn import DrawnSequence, Fates, one_look_bounds
from dfmcl.robustness.sequential import ConfidenceSequence
from dfmcl.robustness.statistics import Share, lower_bound, upper_bound

EXIT_CODES = {"passed": 0, "failed": 1, "inconclusive": 3, "suspect": 4}
Outcome = Literal["met", "missed", "open"]


@dataclass(frozen=True)
class Claim:
    """One share that must reach a threshold: a criterion, or a criterion for one class.

    class_index: the class whose images it is about; None: all. population: how many of those the data set holds.
    drawn: only a drawn part of the images meets all attacks.
    """

    criterion: Criterion
    population: int
    class_index: int | None = None
    class_name: str | None = None
    drawn: bool = False

    def __str__(self) -> str:
        return f"{self.criterion}" + (f", class {self.class_name}" if self.class_name is not None else "")


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
    seen: Fates
    lower: ConfidenceSequence | DrawnSequence
    upper: ConfidenceSequence | DrawnSequence

    @staticmethod
    def begin(claim: Claim, among: int) -> Standing:
        """Before the first image, as one of `among` claims."""
        begin = DrawnSequence.begin if claim.drawn else ConfidenceSequence
        levels = claim.criterion.confidence, 1 - (1 - claim.criterion.confidence) / among
        return Standing(claim, among, Fates.none(), *(begin(claim.population, level) for level in levels))

    def after(self, seen: Fates) -> Standing:
        """With the next outcomes of the claim's own images."""
        lower, upper = (
            bound.after(seen) if isinstance(bound, DrawnSequence) else bound.after(seen.kept)
            for bound in (self.lower, self.upper)
        )
        return replace(self, seen=self.seen + seen, lower=lower, upper=upper)

    def bounds_after(self, images: int) -> tuple[float, float]:
        """Lower and upper bound of the share, after so many of the images that were seen."""
        if not images:
            return 0.0, 1.0
        population = self.claim.population
        return float(self.lower.lower[images - 1]) / population, float(self.upper.upper[images - 1]) / population

    @property
    def judgement(self) -> Judgement:
        """As of now. The first bound to reach the threshold decided, and nothing that came later changes it."""
        threshold, population = self.claim.criterion.threshold, self.claim.population
        met, missed = self.lower.lower / population >= threshold, self.upper.upper / population < threshold
        decided = np.flatnonzero(met | missed)
        kept = self.seen.kept
        outcome: Outcome = "open" if not len(decided) else ("met" if met[decided[0]] else "missed")
        return Judgement(
            self.claim,
            Share(int(kept.sum()), len(kept)),
            *self.bounds_after(len(kept)),
            outcome,
            int(decided[0]) + 1 if len(decided) else None,
        )


def one_look(claim: Claim, seen: Fates, among: int) -> Judgement:
    """The claim about the population behind the data set, by one look at what was seen: exact one-sided bounds."""
    share = Share(int(seen.kept.sum()), len(seen))
    if not share.n:
        return Judgement(claim, share, 0.0, 1.0, "open")
    confidence, threshold = claim.criterion.confidence, claim.criterion.threshold
    above = 1 - (1 - confidence) / among
    lower, upper = lower_bound(share.k, share.n, confidence), upper_bound(share.k, share.n, above)
    if claim.drawn:
        lower, upper = one_look_bounds(seen, confidence, above)
    outcome: Outcome = "met" if lower >= threshold else "missed" if upper < threshold else "open"
    return Judgement(claim, share, lower, upper, outcome, None if outcome == "open" else share.n)


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
