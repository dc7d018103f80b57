"""The work behind the checks: a few attacks and passes on a few images, each done once, and only if a check asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfmcl.common.progress import Track, silent
from dfmcl.robustness import losses
from dfmcl.robustness.attacks.registry import ATTACKS, Attack, climb, fgsm
from dfmcl.robustness.background import Background
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.evaluate import Decide, Outcome, evaluate
from dfmcl.robustness.gradients import AttackPass, attack_pass
from dfmcl.robustness.models import device_of, frozen, to_float
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.segments import unexplained
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.traces import STEPS, Rescaled, Slopes, Traced, of_another_class, on_grid

IMAGES = 128  # looked at; eleven that only the weaker of two attacks broke are sure, and that is a twelfth of them
FEW_STEPS = 5
# What is left after PGD is attacked by queries: by scores, by labels only, so that no score can mislead, in subspaces.
QUERYING = {"square": 200, "rays": 120, "square-subspace": 120}
SEGMENTS = 24  # images from which segments lead; a third of them that show something are sure
FURTHER = 4  # in eps: as far as what fools another network may have to go until the judged one has to answer for it
LONE = 8  # images that are also asked one by one
REPEATS = 4  # of the same question
# Between the two points of a finite difference lies half a grey level, far above float32's rounding of logits, or an
# eighth of that: in a deep network of many pixels so many ReLUs change sides on the longer way that half of the promise
# is lost (EfficientNet-Lite0: 0.43).
HALF_STEPS = (0.25 / 255, 0.25 / 8 / 255)
# Of the median margin on images that are right: what a quantised file may be from its float twin. Eight bits an
# activation, on digits: 0.02 of it in a hardened network, 0.13 in a plain one, on the image where it is most.
ROUNDING = 0.2
BEYOND = 1.25  # of eps: how far random noise goes where an attack stays inside


class Examination:
    """A model and the first images of an evaluation: n images, M of them right.

    Attacks are counted as in every evaluation: by what `decide` says, on the grid as bytes. Flags `(M,)` are about the
    images that are right, in their order.
    """

    def __init__(
        self,
        model: nn.Module | None,
        decide: Decide,
        images: Bytes,
        labels: Labels,
        threat: Ball,
        *,
        grid: bool,
        seed: int,
        evaluation: Evaluation | None = None,
        transfer: Sequence[Evaluation] = (),
        about: Mapping[str, Any] | None = None,
        background: Background | None = None,
        batch_size: int = 64,
        track: Track = silent,
    ) -> None:
        self.model, self.threat, self.grid, self.seed = model, threat.on_grid() if grid else threat, grid, seed
        self.evaluation, self.transfer, self.about = evaluation, transfer, about or {}
        self.background = background or Background()
        self._decide, self._batch_size, self._track = decide, batch_size, track
        self._images, self._labels = images[:IMAGES], labels[:IMAGES]
        device = device_of(model)
        self.x = to_float(torch.from_numpy(self._images)).to(device)
        self.y = torch.from_numpy(self._labels).to(device)

    @cached_property
    def logits(self) -> Tensor:
        """What the model answers, `(n, K)`."""
        return self.answers(self.x)

    @cached_property
    def finite(self) -> Tensor:
        """The rows of the logits that are finite `(m, K)`; all, where none is."""
        rows = self.logits.isfinite().all(dim=1)
        return self.logits[rows] if rows.any() else self.logits

    @cached_property
    def correct(self) -> Tensor:
        """`(n,)` bool."""
        return losses.right(self.logits, self.y.cpu())

    @cached_property
    def right(self) -> int:
        """M."""
        return int(self.correct.sum())

    @cached_property
    def rounding(self) -> float:
        """How far answers may be from the model's because the file rounds, in logits; 0 where it does not."""
        if not self.background.rounds or not self.right:
            return 0.0
        margins = losses.margin(self.logits, self.y.cpu())[self.correct]
        return ROUNDING * float(margins.abs().median())

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images in batches as they are asked."""
        return tuple(x.split(self._batch_size))

    def answers(self, x: Tensor, size: int = 0) -> Tensor:
        """Logits `(N, K)` of the one whose answers count, batch by batch, or in batches of another size."""
        with torch.no_grad():
            return torch.cat([self._decide(part).detach().float().cpu() for part in x.split(size or self._batch_size)])

    def own_answers(self, x: Tensor) -> Tensor:
        """The same of the model that gives gradients."""
        assert self.model is not None, "a check that needs a model does not run without one"
        with torch.no_grad():
            return torch.cat([self.model(part).detach().float().cpu() for part in self.parts(x)])

    def under_noise(self, eps: float) -> Tensor:
        """The answers to all images after noise on the ball's surface, Linf or L2 of length eps: logits `(n, K)`."""
        threat = self.threat.sized(eps)
        stream = generator(self.seed, "checks", "noise", eps_key(eps), device=self.x.device)
        noise = torch.randn(self.x.shape, generator=stream, device=self.x.device)
        point = threat.project(self.x + eps * threat.steepest(noise), self.x)
        return self.answers(threat.to_uint8(point, self.x).float() / 255 if self.grid else point)

    @property
    def beyond(self) -> float:
        """A radius just outside the ball; on the grid at least one grey level more."""
        return max(BEYOND * self.threat.eps, self.threat.eps + (self.threat.level if self.grid else 0))

    @property
    def everything(self) -> Ball:
        """The ball that holds every image."""
        return self.threat.sized(self.threat.diameter(self.x[0].numel()))

    @cached_property
    def slopes(self) -> Slopes:
        assert self.model is not None, "a check that needs a model does not run without one"
        x, y = self.x[self.correct.to(self.x.device)], self.y[self.correct.to(self.y.device)]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, (part, label) in enumerate(zip(x.split(self._batch_size), y.split(self._batch_size), strict=True)):
            point = self.threat.start(part, generator(self.seed, "checks", "slopes", number, device=part.device))
            _, gradient, _ = losses.value_and_gradient(self.model, point, losses.cross_entropy, (label,), True)
            _, along, _ = losses.value_and_gradient(self.model, point, losses.margin, (label,), True)
            with torch.no_grad():
                ends = [(point + step * along.sign(), point - step * along.sign()) for step in HALF_STEPS]
                margins = [[losses.margin(self.model(end), label).double() for end in pair] for pair in ends]
            steepness = along.flatten(1).abs().sum(dim=1).double()
            rates = torch.stack([(one - two) / (2 * s) for s, (one, two) in zip(HALF_STEPS, margins, strict=True)], 1)
            found.append((gradient.flatten(1).abs().sum(dim=1).double(), steepness, rates))
        return Slopes(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))

    @cached_property
    def unexplained(self) -> dict[str, Tensor]:
        """By where it leads, how much of the change along a segment gradients leave unexplained: of the first images
        that are right `(min(M, SEGMENTS),)` each."""
        assert self.model is not None, "a check that needs a model does not run without one"
        chosen = torch.nonzero(self.correct).squeeze(1)[:SEGMENTS].to(self.x.device)
        y, ways = self.y[chosen], self._ways(chosen)
        # All ways in one row, as a pass takes about as long for a few segments as for a full batch.
        begin, end = (torch.cat(side) for side in zip(*ways.values(), strict=True))
        parts = zip(*(whole.split(self._batch_size) for whole in (begin, end, y.repeat(len(ways)))), strict=True)
        model, decide, rounding = self.model, self._decide, self.rounding
        shares = torch.cat([unexplained(model, decide, one, two, label, rounding) for one, two, label in parts])
        return dict(zip(ways, shares.split(len(chosen)), strict=True))

    def _ways(self, chosen: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Both ends of the segments from images `chosen` `(n,)`, on the uint8 grid."""
        x, y = self.x[chosen], self.y[chosen]
        stream = generator(self.seed, "checks", "segments", device=x.device)
        attacked = to_float(torch.from_numpy(self.adversarial).to(x.device))[chosen]
        grey = torch.randn((len(x), 1, *x.shape[2:]), generator=stream, device=x.device).expand_as(x)
        noise = torch.randn(x.shape, generator=stream, device=x.device)
        other = self.x[of_another_class(self.y, chosen)]
        ends = {
            "to noise": (x, self._moved(x, noise)),
            "to noise alike in all channels": (x, self._moved(x, grey)),
            "to attacked images": (x, attacked),
            "to other images": (x, other),
        }
        for name, network in self.background.others.items():
            with frozen(network):
                for times in (1, FURTHER):
                    threat = self.threat.sized(times * self.threat.eps)
                    found = climb(network, x, y, threat, generator=stream, steps=FEW_STEPS, keep="last")
                    ends[f"to images that fool {name}" + (f" at {times} eps" if times > 1 else "")] = (
                        x,
                        on_grid(found, x, threat),
                    )
        return ends

    def _moved(self, x: Tensor, direction: Tensor) -> Tensor:
        threat = self.threat
        return on_grid(threat.project(x + threat.eps * threat.steepest(direction), x), x, threat)

    @cached_property
    def fgsm(self) -> Flags:
        """Which of the images that are right one step breaks."""
        return self._fell(fgsm, self.threat, "one step")

    @cached_property
    def few_steps(self) -> Flags:
        return self._fell(partial(climb, steps=FEW_STEPS), self.threat, f"{FEW_STEPS} steps")

    @cached_property
    def pgd(self) -> Flags:
        """PGD on the cross-entropy, as all that follow; random start."""
        return self._fell_at(self._pgd)

    @property
    def adversarial(self) -> Bytes:
        """What PGD made of all n images, uint8 `(n, H, W, C)`: adversarial where they fell."""
        return self._pgd.adversarial

    @cached_property
    def adversarial_logits(self) -> Tensor:
        """What the one whose answers count says of them, `(n, K)`."""
        return self.answers(to_float(torch.from_numpy(self.adversarial)).to(self.x.device))

    @cached_property
    def trace(self) -> Tensor:
        """The margin at each of PGD's STEPS + 1 points `(STEPS + 1, M)`; NaN from where an image had fallen.

        Not the cross-entropy that it climbs: that bends upwards as the margin closes, and looks steep to the end.
        """
        (record,) = self._pgd.evaluation.attacks
        found = torch.full((STEPS + 1, len(self.y)), torch.nan)
        if self._traces:
            found[:, torch.tensor(record.tried)] = torch.cat(self._traces, dim=1)
        return found[:, self.correct]

    @cached_property
    def wider(self) -> Flags:
        """PGD at twice the eps."""
        return self._fell(partial(climb, steps=STEPS), self.threat.sized(2 * self.threat.eps), "twice the eps")

    @cached_property
    def unlimited(self) -> Flags:
        """PGD in the whole box, from the image itself: a random start would be another image already."""
        return self._fell(partial(climb, steps=STEPS, random_start=False), self.everything, "unlimited")

    def rescaled(self, factor: float) -> Flags:
        """PGD on the cross-entropy of logits times `factor`."""
        assert self.model is not None, "a check that needs a model does not run without one"
        return self._fell(
            partial(climb, steps=STEPS), self.threat, f"logits x {factor:g}", source=Rescaled(self.model, factor)
        )

    @cached_property
    def queried(self) -> dict[str, tuple[int, int]]:
        """By attack: of how many images that PGD left (second) a few black-box queries broke how many (first)."""
        return {name: self._queried(name) for name in QUERYING if self.threat.norm in ATTACKS[name].threats}

    def _queried(self, name: str) -> tuple[int, int]:
        left = np.flatnonzero(self.correct.numpy())[~self.pgd]
        if not len(left):
            return 0, 0
        outcome = evaluate(
            None,
            self._images[left],
            self._labels[left],
            self.threat,
            [Attack(f"check: {name}", ATTACKS[name].function, {"queries": QUERYING[name]})],
            decide=lambda x: self._decide(x.to(self.x.device)),
            grid=self.grid,
            seed=self.seed,
            batch_size=self._batch_size,
            track=self._track,
        )
        return len(left) - outcome.evaluation.robust.k, len(left)

    @cached_property
    def _pgd(self) -> Outcome:
        self._traces: list[Tensor] = []

        def traced(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: Ball, **rest: Any) -> Tensor:
            trial = Traced(rest.pop("trial"), y)
            x_adv = climb(model, x, y, threat, steps=STEPS, trial=trial, **rest)
            self._traces.append(trial.margins)
            return x_adv

        return self._attack(traced, self.threat, f"{STEPS} steps")

    def _fell(self, function: Callable[..., Tensor], threat: Ball, name: str, source: nn.Module | None = None) -> Flags:
        return self._fell_at(self._attack(function, threat, name, source))

    def _fell_at(self, outcome: Outcome) -> Flags:
        held: Flags = np.array(outcome.evaluation.robust_images)[self.correct.numpy()]
        return ~held

    @cached_property
    def _climbed(self) -> AttackPass:
        """The model's fast copy, which all attacks climb; proven once."""
        assert self.model is not None, "a check that needs a model does not run without one"
        return attack_pass(self.model, self.x)

    def _attack(
        self, function: Callable[..., Tensor], threat: Ball, name: str, source: nn.Module | None = None
    ) -> Outcome:
        return evaluate(
            self.model,
            self._images,
            self._labels,
            threat,
            [Attack(f"check: {name}", function)],
            decide=self._decide,
            source=source or self._climbed,
            grid=self.grid,
            seed=self.seed,
            batch_size=self._batch_size,
            track=self._track,
        )


def eps_key(eps: float) -> str:
    """A radius as part of a seed's address."""
    return f"{eps:.9g}"
