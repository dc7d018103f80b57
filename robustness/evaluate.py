"""The frame around attacks: it checks each returned image against the ball, classifies it again, and counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.gradients import IMAGES, AttackPass, attack_pass
from dfmcl.robustness.losses import right
from dfmcl.robustness.models import device_of, exactly, frozen, to_bytes, to_float
from dfmcl.robustness.portions import answered
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.threat import Threat

# Images that come as bytes lie in channels_last, which a CPU answers 15 % faster in a large batch; in one of these the
# reordering of weights decides, and takes a quarter longer for it.
FEW = 16

Logits = NDArray[np.float32]
Decide = Callable[[Tensor], Tensor]
"""Float images `(N, C, H, W)` in [0, 1] to logits `(N, K)`: the artefact whose answer counts."""


@dataclass(frozen=True)
class Outcome:
    """An evaluation and the bytes behind it.

    adversarial: uint8 `(N, H, W, C)`, per image the one that flipped it, else the last one tried, else the image.
    """

    evaluation: Evaluation
    adversarial: Bytes
    clean_logits: Logits
    adversarial_logits: Logits

    def part(self, rows: NDArray[np.int64]) -> Outcome:
        """Of some of the images."""
        arrays = (self.adversarial[rows], self.clean_logits[rows], self.adversarial_logits[rows])
        return Outcome(self.evaluation.part(rows.tolist()), *arrays)


def evaluate(
    model: nn.Module | None,
    images: Bytes,
    labels: Labels,
    threat: Threat,
    attacks: Sequence[Attack],
    *,
    decide: Decide | None = None,
    source: nn.Module | None = None,
    grid: bool = False,
    cascade: bool = False,
    after: Outcome | None = None,
    clean: Logits | None = None,
    seed: int = 0,
    batch_size: int = 128,
    precision: str = "auto",
    about: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Outcome:
    """Attack `model` on uint8 images `(N, H, W, C)` with labels `(N,)` and count, per image, what still holds.

    model: what is attacked; None where only answers can be had, so that attacks that need gradients cannot run.
    threat: what the attacker may do, one that is no union; on the grid, a ball's eps rounded down to whole levels.
    attacks: one after another.
    decide: whose answers count; default: the model itself, in float32.
    source: where gradients come from, a surrogate for a transfer attack; default: the model. It is climbed as a fast
        copy, in bfloat16 where precision and hardware allow it; an AttackPass is climbed as it is.
    grid: count only bytes inside the ball.
    cascade: an attack sees only what earlier ones left, which is the worst case at less cost.
    after: in a cascade, what was found in a smaller ball around the same images: what fell there has fallen here.
    clean: the logits `(N, K)` of the images as they come, where they are known.
    seed: of the attacks' draws, with the attack's name and the number of the batch.
    batch_size: images that are attacked together.
    precision: of the fast copy, `auto`, `float32` or `bfloat16`.
    about: for the record.
    track: where progress goes.

    Every point on which the source errs is decided at once, and an image that fell is shown to the attack no more; what
    an attack returns is decided as well. A result outside the ball is counted as `outside`, never as a success; on the
    grid it is first brought to the nearest bytes inside the ball, which in Linf always exist.
    """
    if not len(images):
        raise BadInput("evaluate: no images; ask for at least one")
    if after is not None and not cascade:
        raise BadInput("evaluate: what fell in a smaller ball counts in a cascade only; set cascade")
    started = time.perf_counter()
    threat = threat.on_grid() if grid else threat
    source = source or model
    if decide is None:
        if model is None:
            raise BadInput("evaluate: neither a model nor somebody to decide; hand in one of them")
        decide = exactly(model)
    with _frozen(model), _frozen(source):
        bench = _Bench(images, labels, threat, decide, device_of(source), grid, cascade, seed, batch_size, track)
        climbed = None if source is None else _climbed(source, bench.batch(slice(IMAGES))[0], precision)
        bench.begin(after, clean)
        records = tuple(bench.record(attack, climbed) for attack in attacks)
    evaluation = Evaluation(
        threat=threat,
        grid=grid,
        seed=seed,
        correct=tuple(bench.correct.tolist()),
        attacks=records,
        seconds=time.perf_counter() - started,
        about=about or {},
        not_finite=int((~bench.clean_logits.isfinite().all(dim=1)).sum()),
    )
    return Outcome(evaluation, bench.adversarial, bench.clean_logits.numpy(), bench.adversarial_logits.numpy())


@dataclass
class _Bench:
    """All images under one attack after another: what came of each so far.

    images: uint8 `(N, H, W, C)`; labels: `(N,)`; the next ones as `evaluate` has them.
    adversarial, clean_logits, adversarial_logits: as Outcome has them, on the CPU.
    correct, left: which images were right as they came, and which no attack flipped, `(N,)`.
    """

    images: Bytes
    labels: Labels
    threat: Threat
    decide: Decide
    device: torch.device
    grid: bool
    cascade: bool
    seed: int
    batch_size: int
    track: Track
    adversarial: Bytes = field(init=False)
    clean_logits: Tensor = field(init=False)
    adversarial_logits: Tensor = field(init=False)
    correct: Tensor = field(init=False)
    left: Tensor = field(init=False)

    def begin(self, after: Outcome | None, clean: Logits | None) -> None:
        """Ask for the clean answers where they are not known, or take over what was found in a smaller ball."""
        if after is None:
            self.clean_logits = self._answers() if clean is None else torch.from_numpy(clean)
            self.adversarial, self.adversarial_logits = self.images.copy(), self.clean_logits.clone()
        else:
            self.clean_logits = torch.from_numpy(after.clean_logits)
            self.adversarial = after.adversarial.copy()
            self.adversarial_logits = torch.from_numpy(after.adversarial_logits).clone()
        self.correct = right(self.clean_logits, torch.from_numpy(self.labels))
        self.left = self.correct.clone()
        if after is not None:
            self.left &= torch.tensor(after.evaluation.robust_images)

    def _answers(self) -> Tensor:
        parts = _batches(self.batch_size, torch.from_numpy(self.images))
        return torch.cat([_answer(self.decide, to_float(part).to(self.device)) for part in parts])

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images and labels at `index` as attacks see them."""
        x, y = torch.from_numpy(self.images)[index], torch.from_numpy(self.labels)[index]
        return to_float(x).to(self.device), y.to(self.device)

    def record(self, attack: Attack, climbed: AttackPass | None) -> AttackRecord:
        """Put the images through an attack; climbed: where its gradients come from, None where it only asks."""
        begun, tried = time.perf_counter(), (self.left if self.cascade else self.correct).clone()
        counts = _Counts(len(self.images))
        chunks = list(_batches(self.batch_size, torch.nonzero(tried).squeeze(1)))
        for number, index in enumerate(self.track(chunks, f"{attack.name} at {self.threat}", len(chunks))):
            x, y = self.batch(index)
            stream = generator(self.seed, attack.name, number, device=self.device)
            kept = _Kept(self.decide, x, y, self.threat, self.grid)
            trial = Trial(y, None if climbed is None else kept.confirm)  # a query decides itself
            shown: Decide = partial(_answer, self.decide)
            if climbed is not None:
                shown = climbed.exact if attack.kind.float32 else climbed
            kept.conclude(attack(shown, x, y, self.threat, generator=stream, trial=trial))
            self._keep(index, x, kept)
            counts.add(index, kept, trial)
        # In a cascade "held" means held so far, so that every record is an accuracy on all images.
        held = self.left if self.cascade else tried & ~counts.fooled
        return counts.record(attack, held, tried, time.perf_counter() - begun)

    def _keep(self, index: Tensor, x: Tensor, kept: _Kept) -> None:
        newest = index[kept.fooled | (~kept.outside & self.left[index])]
        chosen = torch.isin(index, newest)
        as_bytes = to_bytes(kept.points if self.grid else self.threat.to_uint8(kept.points, x)).cpu().numpy()
        self.adversarial[newest.numpy()] = as_bytes[chosen.numpy()]
        self.adversarial_logits[newest] = kept.logits[chosen]
        self.left[index[kept.fooled]] = False


class _Kept:
    """What counts of one attack on one batch: points `(N, C, H, W)`, logits `(N, K)`, who fell, who is outside `(N,)`.

    Logits and flags are on the CPU. An image that fell keeps the point at which it did.
    """

    def __init__(self, decide: Decide, x: Tensor, y: Tensor, threat: Threat, grid: bool) -> None:
        self._decide, self._x, self._y, self._threat, self._grid = decide, x, y, threat, grid
        self.points, self.logits = x.clone(), torch.zeros(0)
        self.fooled = torch.zeros(len(x), dtype=torch.bool)
        self.outside = torch.zeros(len(x), dtype=torch.bool)

    def confirm(self, rows: Tensor, points: Tensor) -> Tensor:
        """Which of the points `(M, C, H, W)` of images `rows` `(M,)` really fool: `(M,)` bool."""
        judged = _judge(self._decide, points, self._x[rows], self._y[rows], self._threat, self._grid)
        self._keep(rows[judged.fooled.to(rows.device)], judged.only(judged.fooled))
        return judged.fooled.to(points.device)

    def conclude(self, candidates: Tensor) -> None:
        """Judge what the attack returned of the images that have not fallen yet."""
        rest = torch.nonzero(~self.fooled).squeeze(1).to(candidates.device)
        if len(rest):
            x, y = self._x[rest], self._y[rest]
            self._keep(rest, _judge(self._decide, candidates[rest], x, y, self._threat, self._grid))

    def _keep(self, rows: Tensor, judged: _Judged) -> None:
        if not self.logits.numel():
            self.logits = torch.zeros(len(self._x), judged.logits.shape[1])
        self.points[rows] = judged.points
        rows = rows.cpu()
        self.logits[rows], self.fooled[rows], self.outside[rows] = judged.logits, judged.fooled, judged.outside


class _Counts:
    """What one attack did and cost, per image `(N,)`."""

    def __init__(self, size: int) -> None:
        self.fooled, self.outside, self.unconfirmed = torch.zeros(3, size, dtype=torch.bool)
        self.forward, self.backward = torch.zeros(2, size, dtype=torch.int64)

    def add(self, index: Tensor, kept: _Kept, trial: Trial) -> None:
        self.fooled[index], self.outside[index] = kept.fooled, kept.outside
        self.unconfirmed[index] = trial.unconfirmed.cpu() & ~kept.fooled
        self.forward[index], self.backward[index] = trial.forward.cpu(), trial.backward.cpu()

    def record(self, attack: Attack, held: Tensor, tried: Tensor, seconds: float) -> AttackRecord:
        return AttackRecord(
            name=attack.name,
            parameters=dict(attack.parameters),
            held=tuple(held.tolist()),
            tried=tuple(tried.tolist()),
            outside=int(self.outside.sum()),
            seconds=seconds,
            unconfirmed=int(self.unconfirmed.sum()),
            forward=tuple(self.forward.tolist()),
            backward=tuple(self.backward.tolist()),
        )


@dataclass
class _Judged:
    """Candidates as they are counted: points `(M, C, H, W)`, and on the CPU logits `(M, K)` and flags `(M,)`."""

    points: Tensor
    logits: Tensor
    fooled: Tensor
    outside: Tensor

    def only(self, rows: Tensor) -> _Judged:
        return _Judged(
            self.points[rows.to(self.points.device)], self.logits[rows], self.fooled[rows], self.outside[rows]
        )

    def put(self, rows: Tensor, other: _Judged) -> None:
        """Others in place of these rows `(m,)`."""
        self.points[rows] = other.points
        rows = rows.cpu()
        self.logits[rows], self.fooled[rows], self.outside[rows] = other.logits, other.fooled, other.outside


def _judge(decide: Decide, candidates: Tensor, x: Tensor, y: Tensor, threat: Threat, grid: bool) -> _Judged:
    """What counts of an attack's points.

    They are clipped to [0, 1] and, on the grid, brought to bytes inside the ball. An L2 attack that seeks the least
    perturbation ends at the border, where rounding to bytes flips it back half of the time; so there the same direction
    at the whole radius, which is the attacker's too, counts as well.
    """
    candidates = candidates.detach()
    finite = candidates.isfinite().flatten(1).all(dim=1)
    x_adv = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), candidates, x).clamp(0, 1)
    if not grid:
        return _decided(decide, x_adv, y, finite & threat.contains(x_adv, x))
    judged = _decided_as_bytes(decide, x_adv, x, y, threat, finite)
    missed = torch.nonzero(~judged.fooled & finite.cpu()).squeeze(1)
    rows = missed.to(x.device)
    whole = threat.outermost(candidates[rows], x[rows]) if len(missed) else None
    if whole is not None:
        second = _decided_as_bytes(decide, whole, x[rows], y[rows], threat, finite[rows])
        judged.put(rows[second.fooled.to(x.device)], second.only(second.fooled))
    return judged


def _decided_as_bytes(decide: Decide, x_adv: Tensor, x: Tensor, y: Tensor, threat: Threat, finite: Tensor) -> _Judged:
    as_bytes = threat.to_uint8(x_adv, x)
    inside = threat.contains_uint8(as_bytes, (x * 255).round().to(torch.uint8))
    return _decided(decide, as_bytes.to(torch.float32) / 255, y, finite & inside)


def _decided(decide: Decide, x_adv: Tensor, y: Tensor, inside: Tensor) -> _Judged:
    logits, inside = _answer(decide, x_adv), inside.cpu()
    return _Judged(x_adv, logits, ~right(logits, y.cpu()) & inside, ~inside)


def climbed_once(model: nn.Module, images: Bytes) -> AttackPass:
    """The fast copy that `evaluate` makes of a model, to be its `source` in several evaluations on these images."""
    return attack_pass(model, to_float(torch.from_numpy(images[:IMAGES])).to(device_of(model)))


def _climbed(source: nn.Module, example: Tensor, precision: str) -> AttackPass:
    return source if isinstance(source, AttackPass) else attack_pass(source, example, precision=precision)


def _frozen(model: nn.Module | None) -> AbstractContextManager[Any]:
    return frozen(model) if model is not None else nullcontext()


def _answer(decide: Decide, x: Tensor) -> Tensor:
    return answered(lambda part: decide(part.contiguous() if len(part) < FEW else part), x)


def _batches(size: int, tensor: Tensor) -> Iterator[Tensor]:
    for begin in range(0, len(tensor), size):
        yield tensor[begin : begin + size]
