"""Two models on the same images, one after the other: which of them the second newly loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from dfmcl.gating.signing.report import BaselineEntry, OtherFlags, PairFlags
from dfmcl.robustness.records import bits, from_bits
from dfmcl.robustness.statistics import PairedCounts


@dataclass(frozen=True)
class Pairs:
    """A baseline and a candidate on images of the baseline.

    index: positions in the data set; before, after: whether baseline and candidate held each.
    of: how many images the baseline has; fewer are compared where the candidate failed before.
    others: the same, before and after, in other threats than the policy's own, by their names such as `patch 5x5`.
    """

    report_sha256: str
    model_sha256: str
    of: int
    index: tuple[int, ...]
    before: tuple[bool, ...]
    after: tuple[bool, ...]
    others: Mapping[str, tuple[tuple[bool, ...], tuple[bool, ...]]] = field(default_factory=dict)

    def within(self, names: Sequence[str]) -> Pairs:
        """The same images in the worst case over threats of these names; "" is the policy's own."""
        columns = [self.others[name] if name else (self.before, self.after) for name in names]
        before, after = (tuple(map(all, zip(*flags, strict=True))) for flags in zip(*columns, strict=True))
        return replace(self, before=before, after=after, others={})

    def errors(self, names: Sequence[str]) -> tuple[float, float]:
        """The baseline's and the candidate's share of wrong answers, over all images and threats of these names."""
        before, after = (np.array([self.others[name][side] for name in names], bool) for side in (0, 1))
        return float(1 - before.mean()), float(1 - after.mean())

    @property
    def images(self) -> int:
        return len(self.index)

    @property
    def held(self) -> int:
        """How many of the images compared the baseline held, which is all that can be lost."""
        return sum(self.before)

    @property
    def newly_broken(self) -> tuple[int, ...]:
        """The images that the baseline held and the candidate does not."""
        triples = zip(self.index, self.before, self.after, strict=True)
        return tuple(index for index, before, after in triples if before and not after)

    @cached_property
    def counts(self) -> PairedCounts:
        if not self.index:
            return PairedCounts(0, 0)
        return PairedCounts.of(np.array(self.before, bool), np.array(self.after, bool))

    @property
    def p(self) -> float:
        """How likely chance alone breaks at least so many of the images on which the two differ. McNemar 1947."""
        return self.counts.p_more_lost

    @property
    def entry(self) -> BaselineEntry:
        """As the report has it: paired counts, the exact one-sided p, and the flags behind them."""
        return BaselineEntry(
            report_sha256=self.report_sha256,
            model_sha256=self.model_sha256,
            images=self.images,
            of=self.of,
            held=self.held,
            only_baseline=self.counts.only_first,
            only_candidate=self.counts.only_second,
            p=self.p,
            newly_broken=self.newly_broken,
            per_image=PairFlags(index=self.index, before=bits(self.before), after=bits(self.after)),
            others=tuple(
                OtherFlags(threat=name, before=bits(before), after=bits(after))
                for name, (before, after) in self.others.items()
            )
            or None,
        )

    @staticmethod
    def of_entry(entry: BaselineEntry) -> Pairs:
        """What the figures of an entry follow from."""
        each = entry.per_image
        before, after = from_bits(each.before), from_bits(each.after)
        others = {one.threat: (from_bits(one.before), from_bits(one.after)) for one in entry.others or ()}
        return Pairs(entry.report_sha256, entry.model_sha256, entry.of, each.index, before, after, others)
