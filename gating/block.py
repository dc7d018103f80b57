"""A block of images, attacked together at every radius: the unit in which a gate works, saves itself and goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.progress import Track, silent
from dfmcl.gating.order import BLOCK
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.evaluate import Logits, Outcome, evaluate
from dfmcl.robustness.gradients import AttackPass
from dfmcl.robustness.records import AttackRecord, Evaluation, joined
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.threat import Threat

T = TypeVar("T")
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

    threats: of the policy, in its order.
    suites: attacks by kind of threat, where these are not `attacks`.
    sources: whatever attacks crafted on them break counts as well.
    whole: attacks that only drawn images meet, on what all others left; of one threat.
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
    whole: tuple[Attack, ...] = ()
    purpose: str = BLOCK
    remarks: Mapping[str, str] = field(default_factory=dict)
    suites: Mapping[str, tuple[Attack, ...]] = field(default_factory=dict)

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

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.outcomes[0].evaluation.correct)

    def shown(self, images: Sequence[int]) -> Block:
        """The same with adversarial pixels of the first images only, of so many by the threat."""
        pairs = zip(self.outcomes, images, strict=True)
        return Block(tuple(replace(one, adversarial=one.adversarial[:count].copy()) for one, count in pairs))

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


def attack_block(
    plan: BlockPlan, images: Bytes, labels: Labels, number: int, track: Track = silent, drawn: Flags | None = None
) -> Block:
    """Block `number` of the plan: images uint8 `(N, H, W, C)`, labels `(N,)`. Depends on nothing but its arguments.

    drawn: which of the images meet the plan's whole suite, `(N,)`.
    """
    outcomes: list[Outcome] = []
    inner: Threat | None = None
    for threat in plan.threats:
        after = outcomes[-1] if isinstance(threat, Ball) and inner is not None and inner.kind == threat.kind else None
        clean = outcomes[0].clean_logits if outcomes else None  # asked for once, however many threats there are
        found = _attacked(plan, images, labels, number, threat, after, None, track, clean)
        for source in plan.sources:
            if all(threat.kind in attack.kind.threats for attack in source.attacks):
                found = _beside(found, _attacked(plan, images, labels, number, threat, found, source, track))
        inner = threat
        if plan.whole and drawn is not None:
            rows, rest = np.flatnonzero(drawn), replace(plan, attacks=plan.whole)
            if len(rows):
                part = _attacked(rest, images[rows], labels[rows], number, threat, found.part(rows), None, track)
                found = _beside(found, _spread(part, rows, found))
            else:
                found = _beside(found, _untried(plan.whole, found))
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
    clean: Logits | None = None,
) -> Outcome:
    """By the plan's own attacks, or by attacks crafted on a source, on the images left before."""
    own = plan.suites.get(threat.kind, plan.attacks)
    attacks = own if source is None else tuple(one.crafted_on(source.name) for one in source.attacks)
    return evaluate(
        plan.model,
        images,
        labels,
        threat,
        attacks,
        decide=plan.decide,
        source=None if source is None else source.model,
        grid=plan.grid or not isinstance(threat, Ball),  # other threats are of bytes
        cascade=True,
        after=after,
        clean=clean,
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


def _spread(part: Outcome, rows: NDArray[np.int64], before: Outcome) -> Outcome:
    """Findings on some rows, for all: the other images were not tried, and stay as they were."""
    count, attacks = len(before.adversarial), []
    held = before.evaluation.robust_images
    for record in part.evaluation.attacks:
        held = _over(held, rows, record.held)
        attacks.append(
            replace(
                record,
                held=held,
                tried=_over((False,) * count, rows, record.tried),
                forward=_over((0,) * count, rows, record.forward),
                backward=_over((0,) * count, rows, record.backward),
            )
        )
    arrays = {name: getattr(before, name).copy() for name in ARRAYS}
    for name, array in arrays.items():
        array[rows] = getattr(part, name)
    return Outcome(replace(before.evaluation, attacks=tuple(attacks), seconds=part.evaluation.seconds), **arrays)


def _untried(attacks: Sequence[Attack], before: Outcome) -> Outcome:
    """Attacks that met none of the images."""
    held = before.evaluation.robust_images
    none, no = (0,) * len(held), (False,) * len(held)
    records = [AttackRecord(one.name, dict(one.parameters), held, no, 0, 0.0, 0, none, none) for one in attacks]
    return replace(before, evaluation=replace(before.evaluation, attacks=tuple(records), seconds=0.0))


def _over(column: tuple[T, ...], rows: NDArray[np.int64], values: tuple[T, ...]) -> tuple[T, ...]:
    """The column with other values at some rows."""
    changed = dict(zip(rows.tolist(), values, strict=True))
    return tuple(changed.get(row, value) for row, value in enumerate(column))


def joined_outcomes(blocks: Sequence[Block]) -> tuple[Outcome, ...]:
    """All blocks as one, an outcome for each threat; adversarial pixels as far as they were kept."""
    return tuple(
        Outcome(joined([outcome.evaluation for outcome in column]), *(_stacked(column, name) for name in ARRAYS))
        for column in zip(*(block.outcomes for block in blocks), strict=True)
    )


def _stacked(outcomes: Sequence[Outcome], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(outcome, name) for outcome in outcomes])
