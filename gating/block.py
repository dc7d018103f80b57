"""A block of images, attacked together at every radius: the unit in which a gate works, saves itself and goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.progress import Track, silent
from dfmcl.gating.policy import radius
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.evaluate import Outcome, evaluate
from dfmcl.robustness.gradients import AttackPass
from dfmcl.robustness.records import Evaluation, joined
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.threats.threat import Threat

ARRAYS = ("adversarial", "clean_logits", "adversarial_logits")


@dataclass(frozen=True)
class Source:
    """Another network than the judged one, and the attacks that are crafted on it."""

    name: str
    model: nn.Module
    attacks: tuple[Attack, ...]


@dataclass(frozen=True)
class BlockPlan:
    """What every block is put through.

    threats: ascending.
    sources: whatever attacks crafted on them break counts as well.
    purpose: what these images are attacked for; part of the seed's address, so that no two blocks draw the same.
    remarks: what the record says beside.
    """

    model: AttackPass | None
    decide: Callable[[Tensor], Tensor]
    threats: tuple[Threat, ...]
    attacks: tuple[Attack, ...]
    grid: bool
    seed: int
    sources: tuple[Source, ...] = ()
    purpose: str = "block"
    remarks: Mapping[str, str] = field(default_factory=dict)

    def place(self, threat: Threat) -> int:
        """Which of the outcomes is about a ball."""
        return [radius(one, self.grid) for one in self.threats].index(radius(threat, self.grid))

    @property
    def about(self) -> dict[str, str]:
        """What the evaluation's record says of how it was made."""
        if self.model is None:
            return {"kind": "black-box", **self.remarks}
        return {"kind": "white-box", "gradients": self.model.precision, **self.remarks}


@dataclass(frozen=True)
class Block:
    """Outcomes on the same images, one for each threat of the plan."""

    outcomes: tuple[Outcome, ...]

    def to_bytes(self) -> bytes:
        """As an .npz file."""
        evaluations = json.dumps([outcome.evaluation.to_json() for outcome in self.outcomes])
        arrays = {f"{name}{i}": getattr(outcome, name) for i, outcome in enumerate(self.outcomes) for name in ARRAYS}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, evaluations=np.frombuffer(evaluations.encode(), np.uint8), **arrays)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Block:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            evaluations = json.loads(archive["evaluations"].tobytes())
            outcomes = [
                Outcome(Evaluation.from_json(value), *(archive[f"{name}{i}"] for name in ARRAYS))
                for i, value in enumerate(evaluations)
            ]
        return Block(tuple(outcomes))


def attack_block(plan: BlockPlan, images: Bytes, labels: Labels, number: int, track: Track = silent) -> Block:
    """Block `number` of the plan: images uint8 `(N, H, W, C)`, labels `(N,)`. Depends on nothing but its arguments."""
    outcomes: list[Outcome] = []
    for threat in plan.threats:
        found = _attacked(plan, images, labels, number, threat, outcomes[-1] if outcomes else None, None, track)
        for source in plan.sources:
            found = _beside(found, _attacked(plan, images, labels, number, threat, found, source, track))
        outcomes.append(found)
    return Block(tuple(outcomes))


def _attacked(
    plan: BlockPlan,
    images: Bytes,
    labels: Labels,
    number: int,
    threat: Threat,
    after: Outcome | None,
    source: Source | None,
    track: Track,
) -> Outcome:
    """By the plan's own attacks, or by attacks crafted on a source, on the images left before."""
    attacks = plan.attacks if source is None else tuple(one.crafted_on(source.name) for one in source.attacks)
    return evaluate(
        plan.model,
        images,
        labels,
        threat,
        attacks,
        decide=plan.decide,
        source=None if source is None else source.model,
        grid=plan.grid,
        cascade=True,
        after=after,
        seed=derived_seed(plan.seed, plan.purpose, number),
        batch_size=len(images),
        about=plan.about,
        track=track,
    )


def _beside(before: Outcome, now: Outcome) -> Outcome:
    """What was found on what `before` had left, with the record of both."""
    first, second = before.evaluation, now.evaluation
    both = replace(
        second,
        attacks=first.attacks + second.attacks,
        seconds=first.seconds + second.seconds,
    )
    return replace(now, evaluation=both)


def joined_outcomes(blocks: Sequence[Block]) -> tuple[Outcome, ...]:
    """All blocks as one, an outcome for each threat."""
    return tuple(
        Outcome(joined([outcome.evaluation for outcome in column]), *(_stacked(column, name) for name in ARRAYS))
        for column in zip(*(block.outcomes for block in blocks), strict=True)
    )


def _stacked(outcomes: Sequence[Outcome], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(outcome, name) for outcome in outcomes])
