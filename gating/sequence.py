"""Block after block of images is attacked until every claim is met, one is missed, or no more may be attacked.

Several processes (torchrun) share the blocks; nothing in the result depends on how many there are, nor on how often the
gate was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.progress import Track
from dfmcl.gating.baseline import Baseline, compare
from dfmcl.gating.block import Block, BlockPlan, attack_block
from dfmcl.gating.criterion import NO_REGRESSION
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import Policy
from dfmcl.gating.record import other_than, places_of
from dfmcl.gating.resumption import State
from dfmcl.gating.signing.probes_file import kept, kept_in
from dfmcl.gating.verdict import Claim, Judgement, Seen, Standing, one_look
from dfmcl.robustness.data import Dataset, Labels
from dfmcl.robustness.evaluate import Outcome
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.statistics import Flags


@dataclass(frozen=True)
class Progress:
    """Where a gate stands. expected: images after which it will probably be decided; seconds: spent on attacks."""

    images: int
    expected: int
    seconds: float
    judgements: tuple[Judgement, ...]


def unwatched(progress: Progress) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Work:
    """What attacking a block takes, wherever its images come from. drawn: of the test images, for the whole suite."""

    plan: BlockPlan
    data: Dataset
    drawn: Flags
    state: State
    ranks: Ranks
    track: Track

    def rounds(
        self, order: NDArray[np.int64], purpose: str, size: int, shown: Sequence[int] = ()
    ) -> Iterator[list[Block]]:
        """Blocks of `size` images of the order, as many at a time as there are processes; each block is saved.

        shown: of how many of all these images the adversarial pixels are kept, by the threat of the plan; (): of none.
        """
        shown = shown or [0] * len(self.plan.threats)
        parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
        for begin in range(0, len(parts), self.ranks.world):
            mine = begin + self.ranks.rank
            pixels = [max(0, count - mine * size) for count in shown]
            block = self._block(parts[mine], purpose, mine, pixels) if mine < len(parts) else None
            yield [found for found in self.ranks.gather(block) if found is not None]

    def _block(self, index: NDArray[np.int64], purpose: str, number: int, shown: Sequence[int]) -> Block:
        done = self.state.load(purpose, number)
        if done is not None:
            return Block.from_bytes(done)
        plan = BlockPlan(**{**vars(self.plan), "purpose": purpose})
        images, labels = self.data.x_test[index], self.data.y_test[index]
        block = attack_block(plan, images, labels, number, self.track, drawn=self.drawn[index]).shown(shown)
        self.state.save(purpose, number, block.to_bytes())
        return block


def run(
    work: Work, found: Sequence[Claim], order: NDArray[np.int64], policy: Policy, watch: Callable[[Progress], None]
) -> tuple[list[Standing], list[Block]]:
    """Attack block after block until the claims are decided: standings, and the blocks that count.

    These hold the adversarial pixels of the first images only, as the probes do.
    """
    labels = work.data.y_test
    among = len(found) + sum(criterion.metric == NO_REGRESSION for criterion in policy.parsed_criteria)
    standings = [Standing.begin(claim, among) for claim in found]
    places = {claim: places_of(claim, policy, work.plan.grid) for claim in found}
    blocks: list[Block] = []
    seen, begun = 0, time.perf_counter()
    watch(Progress(0, len(order), 0.0, tuple(standing.judgement for standing in standings)))
    for arrived in work.rounds(order, "block", policy.attacks.block, shown_of(work, len(order), policy)):
        for block in arrived:
            size = block.images
            index = order[seen : seen + size]
            standings = [
                standing.after(
                    seen_of(
                        standing.claim,
                        [block.outcomes[place] for place in places[standing.claim]],
                        labels[index],
                        work.drawn[index],
                        len(work.plan.whole),
                    )
                )
                for standing in standings
            ]
            blocks.append(block)
            seen += size
            judgements = tuple(standing_judgement(standing, policy) for standing in standings)
            if settled(judgements, policy):
                break
        needed = len(order) if policy.statistics == "fixed" else expected(judgements, seen, len(order))
        watch(Progress(seen, needed, time.perf_counter() - begun, judgements))
        if settled(judgements, policy):
            break
    return standings, blocks


def shown_of(work: Work, images: int, policy: Policy) -> list[int]:
    """Of how many of the first images the adversarial pixels are kept, by the threat of the plan: as the probes do."""
    shape, main = work.data.input_shape, policy.place(work.plan.grid)
    found = kept_in(kept(images, shape), shape, [threat.kind for threat in other_than(main, work.plan.threats)])
    return [*found[:main], kept(images, shape), *found[main:]]


def settled(judgements: Sequence[Judgement], policy: Policy) -> bool:
    """Whether more images can change nothing. One look is one look: `fixed` statistics never stop early."""
    if policy.statistics == "fixed":
        return False
    outcomes = [judgement.outcome for judgement in judgements]
    return "missed" in outcomes or "open" not in outcomes


def standing_judgement(standing: Standing, policy: Policy) -> Judgement:
    """By the statistics that the policy asks for."""
    if policy.statistics == "sequential":
        return standing.judgement
    return one_look(standing.claim, standing.seen, standing.among)


def seen_of(claim: Claim, found: Sequence[Outcome], labels: Labels, drawn: Flags, whole: int) -> Seen:
    """What images, with their labels and draws `(N,)`, say about a claim: of its own class, or of all.

    found: an outcome for each threat of the claim.
    whole: how many of the attacks, the last ones, only the drawn images met.
    """
    seen = claim.seen([outcome.evaluation for outcome in found], drawn, whole)
    return seen if claim.class_index is None else seen[labels == claim.class_index]


def expected(judgements: Sequence[Judgement], seen: int, most: int) -> int:
    """Images after which all claims are probably decided, if the shares stay as they are; at most `most`.

    Wald's mean for a test that knows the share, log(1 / alpha) over the divergence from the threshold, and a third.
    """
    needed = float(seen)
    for judgement in judgements:
        if judgement.outcome == "open" and judgement.share.n:
            share = (judgement.share.k + 1) / (judgement.share.n + 2)
            threshold = min(max(judgement.criterion.threshold, 1e-3), 1 - 1e-3)
            divergence = share * np.log(share / threshold) + (1 - share) * np.log((1 - share) / (1 - threshold))
            own = 1.33 * np.log(1 / (1 - judgement.criterion.confidence)) / max(divergence, 1e-6)
            needed = max(needed, own * seen * judgement.claim.answers / judgement.share.n)
    return int(min(max(needed, seen), most))


def compared(
    work: Work,
    earlier: Baseline,
    index: NDArray[np.int64],
    outcomes: Sequence[Outcome],
    policy: Policy,
    *,
    skip: bool,
) -> Pairs:
    """The candidate on the baseline's images; those not attacked yet are attacked now, unless it failed already."""
    places = {str(outcome.evaluation.threat): place for place, outcome in enumerate(outcomes)}
    wanted = {"": policy.place(work.plan.grid)} | {name: places[name] for name in earlier.others}
    held = {
        name: dict(zip(index.tolist(), outcomes[place].evaluation.robust_images, strict=True))
        for name, place in wanted.items()
    }
    rest = np.array([i for i in earlier.index if i not in held[""]], dtype=np.int64)
    if not skip and len(rest):
        blocks = [block for arrived in work.rounds(rest, "baseline", policy.attacks.block) for block in arrived]
        for name, place in wanted.items():
            found = [flag for block in blocks for flag in block.outcomes[place].evaluation.robust_images]
            held[name] |= dict(zip(rest.tolist(), found, strict=True))
    return compare(earlier, held)
