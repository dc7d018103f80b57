"""One round: what is asked, in which order, and a whole result or none.

Through Triton: who answers, the gate's images again, fresh ones clean, and their adversarial versions where they were
right. Through the gateway: fresh images clean, and a search by queries where they were right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dfmcl.common.errors import DfmclError, Rejected
from dfmcl.monitoring.asker import Asker, Clock, Manners, Paused, Predict, reason_of
from dfmcl.monitoring.probes import NO_ATTACK, PROBES, Ask, Scene, Seen
from dfmcl.monitoring.releases import Find, Release
from dfmcl.monitoring.results import (
    GATEWAY,
    TRITON,
    AttackResult,
    Example,
    ReplayResult,
    Round,
    RoundFailure,
    RoundResult,
    RoundSkipped,
    compared,
)
from dfmcl.monitoring.threatened import Threatened
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball

EXAMPLES = 2  # of an attack and round, for the page


@dataclass(frozen=True)
class RoundPlan:
    """What all rounds of one path share. attacks: of the kind that the path allows, in the ball `threat` or in threats
    of their own; images: fresh ones a round.

    replay: the gate's images a round; tolerance: of a replayed logit, as a share of the largest one; classes: K.
    """

    model: str
    classes: int
    threat: Ball
    attacks: tuple[Attack, ...]
    images: int
    replay: int = 0
    tolerance: float = 1e-3

    @property
    def cost(self) -> int:
        """How many images a round asks about at most."""
        queries = sum(int(attack.parameters.get("queries", 1)) for attack in self.attacks)
        return 1 + self.replay + self.images * (1 + queries)


@dataclass(frozen=True)
class Measured:
    """What a round found, before anybody knows whether it counts. correct: `(N,)`."""

    correct: Flags
    attacks: list[AttackResult]
    further: list[AttackResult]
    examples: list[Example]
    replay: ReplayResult | None = None


def run_round(
    plan: RoundPlan, number: int, scene: Scene, predict: Predict, find: Find, clock: Clock, manners: Manners
) -> Round:
    """Through Triton. scene: of this round, crafted before; find: the release behind a version."""
    endpoint = Asker(plan.classes, clock, manners)
    ask = endpoint.through(predict)

    def measure() -> Measured:
        ask(scene.images[:1])  # tells the version, and with it what to replay
        release = find(endpoint.version)  # looked up even if nothing is replayed: figures stand beside it
        replay = _replayed(plan, number, scene, ask, release) if plan.replay else None
        correct = PROBES["clean"](scene, NO_ATTACK, ask).answers == scene.labels
        return _attacked(plan, scene, correct, "transfer", ask, replay)

    return _framed(plan, number, TRITON, endpoint, clock, measure)


def run_query_round(
    plan: RoundPlan, number: int, scene: Scene, predict: Predict, harmless: Predict, clock: Clock, manners: Manners
) -> Round:
    """Through the gateway. predict: with the key of the canary that attacks; harmless: with that of the one that does
    not, whose images are those of any customer."""
    endpoint = Asker(plan.classes, clock, manners)

    def measure() -> Measured:
        correct = PROBES["clean"](scene, NO_ATTACK, endpoint.through(harmless)).answers == scene.labels
        return _attacked(plan, scene, correct, "query", endpoint.through(predict), None)

    return _framed(plan, number, GATEWAY, endpoint, clock, measure)


def _replayed(plan: RoundPlan, number: int, scene: Scene, ask: Ask, release: Release) -> ReplayResult | None:
    recorded = release.replay
    if recorded is None:
        return None
    if recorded.images.shape[1:] != scene.images.shape[1:] or recorded.logits.shape[1] != plan.classes:
        raise Rejected("the gate's images or classes are not those of the watch's data", "rejected")
    part = recorded.part(number, min(plan.replay, len(recorded.images)))
    return compared(ask(part.images), part.logits, plan.tolerance, part.kinds)


def _attacked(
    plan: RoundPlan, scene: Scene, correct: Flags, probe: str, ask: Ask, replay: ReplayResult | None
) -> Measured:
    """Every attack on the images that were right: one that is wrong is no attacker's merit, nor worth a query."""
    right = scene.only(correct)
    results: list[AttackResult] = []
    further: list[AttackResult] = []
    examples: list[Example] = []
    for attack in plan.attacks:
        found: Seen = PROBES[probe](right, attack, ask)
        flipped = found.answers != right.labels
        held = correct.copy()
        held[correct] = ~flipped
        where = further if isinstance(attack, Threatened) else results
        where.append(AttackResult(attack.name, tuple(held.tolist()), found.queries))
        examples += [
            Example(attack.name, right.images[i], found.images[i], int(right.labels[i]), int(found.answers[i]))
            for i in np.flatnonzero(flipped)[:EXAMPLES]
        ]
    return Measured(correct, results, further, examples, replay)


def _framed(
    plan: RoundPlan, number: int, via: str, endpoint: Asker, clock: Clock, measure: Callable[[], Measured]
) -> Round:
    """The round that `measure` makes: figures, a failure with its reason, or no opinion where it was told to stop."""
    started, begun = clock.time(), clock.monotonic()
    try:
        found = measure()
    except Paused:
        seconds, queries = clock.monotonic() - begun, tuple(endpoint.queries)
        return RoundSkipped(number, via, plan.model, "paused", "the kill switch is on", started, seconds, queries)
    except DfmclError as error:
        seconds, queries = clock.monotonic() - begun, tuple(endpoint.queries)
        message = " ".join(str(error).split())
        return RoundFailure(number, via, plan.model, reason_of(error), message, started, seconds, queries)
    return RoundResult(
        number=number,
        via=via,
        model=plan.model,
        version=endpoint.version,
        norm=plan.threat.norm,
        epsilon=plan.threat.label,
        started=started,
        seconds=clock.monotonic() - begun,
        correct=tuple(found.correct.tolist()),
        attacks=tuple(found.attacks),
        further=tuple(found.further),
        queries=tuple(endpoint.queries),
        replay=found.replay,
        examples=tuple(found.examples),
    )
