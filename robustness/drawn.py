"""Bounds for a share under a dear suite of attacks that only a drawn part of the images meets.

All images meet a cheap suite; each is drawn, whatever comes of it, with the same chance for the dear one. An image
holds where it holds under both, so the share that holds is the share that holds under the cheap suite, less the share
that holds there and falls to the dear one. The drawn images are themselves a random sample of the data set in random
order, so each of the two shares has exact bounds, and both together err at most as often as the two risks add up to:
half for each. Nothing is assumed of the images that are lost, neither how many they are nor how near to the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.sequential import LOG_ODDS, RARE, ConfidenceSequence, Counts
from dfmcl.robustness.statistics import Flags, Share, lower_bound, upper_bound


@dataclass(frozen=True)
class Fates:
    """What became of M images. held: under the cheap suite; drawn: for the dear one; lost: held, and fell to that."""

    held: Flags
    drawn: Flags
    lost: Flags

    @staticmethod
    def of(held: Flags) -> Fates:
        """By one suite that all images meet."""
        nobody = np.zeros(len(held), bool)
        return Fates(held, nobody, nobody)

    @staticmethod
    def by(evaluation: Evaluation, drawn: Flags, whole: int) -> Fates:
        """By a record whose last `whole` attacks only the drawn images `(N,)` met."""
        kept = np.array(evaluation.robust_images, bool)
        if not whole:
            return Fates.of(kept)
        held = np.array(replace(evaluation, attacks=evaluation.attacks[:-whole]).robust_images, bool)
        return Fates(held, drawn, held & ~kept)

    @staticmethod
    def worst(evaluations: Sequence[Evaluation], drawn: Flags, whole: int) -> Fates:
        """By records of the same images under one threat or several: image by image the worst. whole: of one only."""
        if len(evaluations) == 1:
            return Fates.by(evaluations[0], drawn, whole)
        return Fates.of(np.logical_and.reduce([np.array(one.robust_images, bool) for one in evaluations]))

    @staticmethod
    def none() -> Fates:
        """Of no image."""
        return Fates.of(np.zeros(0, bool))

    @property
    def kept(self) -> Flags:
        """Which hold under all that they met."""
        return self.held & ~self.lost

    @property
    def share(self) -> Share:
        """Of all images."""
        return Share(int(self.kept.sum()), len(self))

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, rows: Flags | slice) -> Fates:
        return Fates(self.held[rows], self.drawn[rows], self.lost[rows])

    def __add__(self, other: Fates) -> Fates:
        pairs = ((self.held, other.held), (self.drawn, other.drawn), (self.lost, other.lost))
        return Fates(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True)
class DrawnSequence:
    """As a ConfidenceSequence: how many of the population can hold, after each of the T images, by both suites."""

    population: int
    held: ConfidenceSequence
    lost: ConfidenceSequence
    met: Counts
    """How many of the first t images were drawn `(T,)`."""

    @staticmethod
    def begin(population: int, confidence: float) -> DrawnSequence:
        """Before the first image; one-sided, wrong ever with probability at most 1 - confidence."""
        half = (1 + confidence) / 2
        held, lost = (ConfidenceSequence(population, half, log_odds=beliefs) for beliefs in (LOG_ODDS, RARE))
        return DrawnSequence(population, held, lost, np.zeros(0, np.int64))

    def after(self, seen: Fates) -> DrawnSequence:
        """With the next outcomes in the fixed order."""
        so_far = int(self.met[-1]) if len(self.met) else 0
        return DrawnSequence(
            self.population,
            self.held.after(seen.held),
            self.lost.after(seen.lost[seen.drawn]),
            np.concatenate([self.met, so_far + np.cumsum(seen.drawn)]),
        )

    @property
    def lower(self) -> Counts:
        """Counts `(T,)`, included."""
        most_lost = np.concatenate([[self.population], self.lost.upper])[self.met]
        left: Counts = np.maximum(self.held.lower - most_lost, 0)
        return left

    @property
    def upper(self) -> Counts:
        """Counts `(T,)`, included."""
        least_lost = np.concatenate([[0], self.lost.lower])[self.met]
        left: Counts = np.maximum(self.held.upper - least_lost, 0)
        return left


def one_look_bounds(seen: Fates, confidence: float, confidence_above: float) -> tuple[float, float]:
    """Lower and upper bound of the share in the population behind the images, one-sided, by one look (binomial)."""
    k, n, lost, met = (int(count) for count in (seen.held.sum(), len(seen), seen.lost.sum(), seen.drawn.sum()))
    half, half_above = (1 + confidence) / 2, (1 + confidence_above) / 2
    most_lost = upper_bound(lost, met, half) if met else 1.0
    least_lost = lower_bound(lost, met, half_above) if met else 0.0
    return max(lower_bound(k, n, half) - most_lost, 0.0), max(upper_bound(k, n, half_above) - least_lost, 0.0)
