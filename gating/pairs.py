"""Two models on the same images, one after the other: which of them the second newly loses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dfmcl.gating.signing.report import BaselineEntry, PairFlags
from dfmcl.robustness.records import bits, from_bits
from dfmcl.robustness.statistics import PairedCounts


@dataclass(frozen=True)
class Pairs:
    """A baseline and a candidate on images of the baseline.

    index: positions in the data set; before, after: whether baseline and candidate held each.
    of: how many images the baseline has; fewer are compared where the candidate failed before.
    """

    report_sha256: str
    model_sha256: str
    of: int
    index: tuple[int, ...]
    before: tuple[bool, ...]
    after: tuple[bool, ...]

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
        )

    @staticmethod
    def of_entry(entry: BaselineEntry) -> Pairs:
        """What the figures of an entry follow from."""
        each = entry.per_image
        before, after = from_bits(each.before), from_bits(each.after)
        return Pairs(entry.report_sha256, entry.model_sha256, entry.of, each.index, before, after)
