"""What a gate saw of one model: all that its verdict follows from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dfmcl.gating.criterion import NO_REGRESSION, Criterion
from dfmcl.gating.order import Draw, Matter, drawn_of, hex_of, order_of
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import Policy
from dfmcl.gating.signing.report import CheckEntry, Report
from dfmcl.gating.verdict import Claim, Seen, claims_about
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.union import Union

T = TypeVar("T")
Probes = Mapping[str, NDArray[Any]]
MOST_IMAGES = 10**7  # of a data set; drawing the order of more would take the reader's memory


@dataclass(frozen=True)
class GateRecord:
    """What a gate saw of one model: all that its verdict follows from.

    policy, data_sha256, model_sha256: by their digests they fix the order.
    grid: whether adversarial images count as uint8.
    population: images of the data set; class_images: of each class, None in reports that do not say.
    labels: `(N,)` of the images attacked, in the order.
    evaluations: one for each of the policy's threats, in its order; transfer: upper bounds, for the record.
    pairs: baseline and candidate on the baseline's images, where there is a baseline.
    no_gradients: why only black-box attacks could run; None where gradients were there.
    not_finite: images whose logits are not finite as attacks left them.
    draw: of the order, by the gate's key; None where the digests alone fix it.
    """

    policy: Policy
    data_sha256: str
    model_sha256: str
    grid: bool
    population: int
    classes: Sequence[str]
    class_images: Sequence[int] | None
    labels: NDArray[np.int64]
    evaluations: Sequence[Evaluation]
    transfer: Sequence[Evaluation]
    checks: Sequence[CheckEntry]
    pairs: Pairs | None = None
    no_gradients: str | None = None
    not_finite: int = 0
    draw: Draw | None = None

    @property
    def whole(self) -> int:
        """How many of the attacks, the last ones, only the drawn images met."""
        return len(self.policy.attacks.phases[1]) if self.no_gradients is None else 0

    @cached_property
    def drawn(self) -> Flags:
        """Which of the images attacked `(N,)` met the whole suite."""
        by_image = drawn_of(self.matter, self.draw, self.policy.attacks.chance)
        chosen: Flags = by_image[self.order[: len(self.labels)]]
        return chosen

    @property
    def matter(self) -> Matter:
        """What the order is of."""
        return Matter(self.model_sha256, self.data_sha256, self.policy.digest, self.population)

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
        return self.policy.place(self.grid)

    @property
    def main(self) -> Evaluation:
        return self.evaluations[self.place]

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """What the criteria say about the data set, but for `no_regression`."""
        criteria = [criterion for criterion in self.policy.parsed_criteria if criterion.metric != NO_REGRESSION]
        return claims_about(criteria, self.classes, self.class_images, self.population, drawn=self.whole > 0)

    @cached_property
    def regressions(self) -> tuple[Criterion, ...]:
        return tuple(criterion for criterion in self.policy.parsed_criteria if criterion.metric == NO_REGRESSION)

    @property
    def among(self) -> int:
        """How many claims share the chance of failing a good model."""
        return len(self.claims) + len(self.regressions)

    def seen(self, claim: Claim) -> Seen:
        """What all images say about the claim."""
        places = places_of(claim, self.policy, self.grid)
        return claim.seen([self.evaluations[place] for place in places], self.drawn, self.whole)

    @property
    def ends(self) -> list[int]:
        """How many images were attacked after each block."""
        size, count = self.policy.attacks.block, len(self.labels)
        return [*range(size, count, size), count]


def places_of(claim: Claim, policy: Policy, grid: bool) -> tuple[int, ...]:
    """Which of the policy's threats a claim is about."""
    threat = Union.of(claim.corruptions) if claim.corruptions else policy.threat_of(claim.criterion)
    return policy.places(threat, grid)


def other_than(place: int, found: Sequence[T]) -> list[T]:
    """All but the one at the policy's own threat, in the order in which a report has them as `radii`."""
    return [one for number, one in enumerate(found) if number != place]


def recorded(report: Report, probes: Probes | None = None) -> GateRecord:
    """The record in a report. KeyError, TypeError or ValueError where it is none of the gate's."""
    policy, data, why, labels = report.policy, report.data, report.why or {}, report.per_image.label
    evaluations = [Evaluation.from_json(one.to_json()) for one in report.radii]
    main = Evaluation.from_json(report.evaluation.to_json())
    grid = report.candidate.input.dtype == "uint8"
    evaluations.insert(policy.place(grid), main)
    blind = main.about.get("kind") == "black-box"
    return GateRecord(
        policy=policy,
        data_sha256=hex_of(data.sha256, 32),
        model_sha256=hex_of(report.candidate.model_sha256, 32),
        grid=grid,
        population=count_of(data.images, MOST_IMAGES),
        classes=data.classes,
        class_images=report.statistics.class_images,
        labels=np.array([count_of(label, len(data.classes) - 1) for label in labels], np.int64),
        evaluations=evaluations,
        transfer=[Evaluation.from_json(one.to_json()) for one in report.transfer],
        checks=report.checks,
        pairs=None if report.baseline is None else Pairs.of_entry(report.baseline),
        no_gradients=why.get("no_gradients", "") if blind else None,
        not_finite=_not_finite(why, len(labels)) if probes is None else wild(probes),
        draw=report.statistics.draw,
    )


def wild(probes: Probes) -> int:
    """Of how many images the logits are not finite, as attacks left them."""
    return int((~np.isfinite(probes["adversarial_logits"])).any(axis=1).sum())


def _not_finite(why: Mapping[str, str], count: int) -> int:
    """The same as a report says it: all that is known without the logits."""
    said = why.get("not_finite", "").split(" ")
    return int(said[1]) if said[2:] == f"of {count} images as attacks left them".split(" ") else 0


def count_of(value: int, most: int) -> int:
    """A whole number from 0 to `most`; ValueError for others."""
    if not 0 <= value <= most:
        raise ValueError(f"{value!r} is no count up to {most:,}")
    return value
