"""The work behind the checks: a few attacks and passes on a few images, each done once, and only if a check asks.

Long, because it is one class, whose parts share what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.progress import Track, silent
from dfmcl.robustness import losses
from dfmcl.robustness.attacks.registry import ATTACKS, Attack, climb, fgsm
from dfmcl.robustness.background import Background
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.evaluate import Decide, Outcome, evaluate
from dfmcl.robustness.gradients import AttackPass, as_it_is, attack_pass
from dfmcl.robustness.models import device_of, frozen, to_float
from dfmcl.robustness.portions import ATTACKED, answered, portion
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.rules import BEYOND, FEW_STEPS, STEPS
from dfmcl.robustness.seeds import derived_seed, generator
from dfmcl.robustness.segments import unexplained
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.traces import Rescaled, Slopes, Traced, of_another_class, on_grid

IMAGES = 128  # looked at; eleven that only the weaker of two attacks broke are sure, and that is a twelfth of them
# What is left after PGD is attacked by queries: by scores, by labels only, so that no score can mislead, in subspaces.
QUERYING = {"square": 200, "rays": 120, "square-subspace": 120}
SEGMENTS = 24  # images from which segments lead; a third of them that show something are sure
GROUP = 5  # of them at a time: two groups that show nothing are enough
PALETTE = 1 / 8  # between two levels at the most
FURTHER = 4  # in eps: as far as what fools another network may have to go until the judged one has to answer for it
PROVEN = ("memory_format", "precision", "folded", "portions")  # of a fast copy
LONE = 8  # images that are also asked one by one
REPEATS = 4  # of the same question
# Between the two points of a finite difference lies half a grey level, far above float32's rounding of logits, or an
# eighth of that: in a deep network of many pixels so many ReLUs change sides on the longer way that half of the promise
# is lost (EfficientNet-Lite0: 0.43).
HALF_STEPS = (0.25 / 255, 0.25 / 8 / 255)
# Of the median margin on images that are right: what a quantised file may be from its float twin. Eight bits an
# activation, on digits: 0.02 of it in a hardened network, 0.13 in a plain one, on the image where it is most.
ROUNDING = 0.2
BATCH = 64  # images that are attacked together, fewer where they are large


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
        track: Track = silent,
    ) -> None:
        self.model, self.threat, self.grid, self.seed = model, threat.on_grid() if grid else threat, grid, seed
        self.evaluation, self.transfer, self.about = evaluation, transfer, about or {}
        self.background = background or Background()
        self._decide, self._track = decide, track
        self._images, self._labels = images[:IMAGES], labels[:IMAGES]
        device = device_of(model)
        self.x = to_float(torch.from_numpy(self._images)).to(device)
        self.y = torch.from_numpy(self._labels).to(device)
        self._batch_size = min(BATCH, portion(self.x[0].numel(), ATTACKED))

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
        """Images in batches as the model that gives gradients is asked."""
        return tuple(x.split(min(self._batch_size, self.itself.portions.most)))

    def batches(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images `(N, C, H, W)` as they are attacked together."""
        return tuple(x.split(self._batch_size))

    def floats(self, images: Bytes) -> Iterator[Tensor]:
        """uint8 images `(N, H, W, C)` as floats, batch by batch."""
        return (to_float(part).to(self.x.device) for part in torch.from_numpy(images).split(self._batch_size))

    def answers(self, x: Tensor) -> Tensor:
        """Logits `(N, K)` of the one whose answers count."""
        return torch.cat([answered(self._decide, part) for part in self.batches(x)])

    def answers_together(self, x: Tensor) -> Tensor:
        """The same in one batch."""
        with torch.no_grad():
            return self._decide(x).detach().float().cpu()

    def own_answers(self, x: Tensor) -> Tensor:
        """The same of the model that gives gradients."""
        assert self.model is not None, "a check that needs a model does not run without one"
        with torch.no_grad():
            return torch.cat([self.model(part).detach().float().cpu() for part in self.parts(x)])

    def under_noise(self, eps: float) -> Tensor:
        """The answers to all images after noise on the ball's surface, Linf or L2 of length eps: logits `(n, K)`."""
        threat = self.threat.sized(eps)
        stream = generator(self.seed, "checks", "noise", eps_key(eps), device=self.x.device)
        found = []
        for x in self.batches(self.x):
            noise = torch.randn(x.shape, generator=stream, device=x.device)
            moved = threat.project(x + eps * threat.steepest(noise), x)
            found.append(self.answers(threat.to_uint8(moved, x).float() / 255 if self.grid else moved))
        return torch.cat(found)

    @property
    def beyond(self) -> float:
        """A radius just outside the ball; on the grid at least one grey level more."""
        return max(BEYOND * self.threat.eps, self.threat.eps + (self.threat.level if self.grid else 0))

    @property
    def everything(self) -> Ball:
        """The ball that holds every image."""
        return self.threat.sized(self.threat.diameter(self.x[0].numel()))

    @cached_property
    def itself(self) -> AttackPass:
        """The model, asked in portions."""
        assert self.model is not None, "a check that needs a model does not run without one"
        return as_it_is(self.model, self.x)

    @cached_property
    def slopes(self) -> Slopes:
        x, y = self.x[self.correct.to(self.x.device)], self.y[self.correct.to(self.y.device)]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, (part, label) in enumerate(zip(self.batches(x), self.batches(y), strict=True)):
            point = self.threat.start(part, generator(self.seed, "checks", "slopes", number, device=part.device))
            _, gradient, _ = losses.value_and_gradient(self.itself, point, losses.cross_entropy, (label,), True)
            _, along, _ = losses.value_and_gradient(self.itself, point, losses.margin, (label,), True)
            with torch.no_grad():
                margins = [
                    [losses.margin(self.itself(point + way * along.sign()), label).double() for way in (step, -step)]
                    for step in HALF_STEPS
                ]
            steepness = along.flatten(1).abs().sum(dim=1).double()
            rates = torch.stack([(one - two) / (2 * s) for s, (one, two) in zip(HALF_STEPS, margins, strict=True)], 1)
            found.append((gradient.flatten(1).abs().sum(dim=1).double(), steepness, rates))
        return Slopes(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))

    @property
    def segments(self) -> int:
        """How many images segments lead from: the first ones that are right."""
        return min(self.right, SEGMENTS)

    def unexplained(self, enough: float, is_open: Callable[[str], bool]) -> Iterator[dict[str, Tensor]]:
        """Group by group of the `segments` images, by where it leads, how much of the change along a segment gradients
        leave unexplained: `(GROUP,)` each. Of one at most `enough` it is not found out how little it is. Ways that are
        not open any more are left out, and without any it ends."""
        chosen = torch.nonzero(self.correct).squeeze(1)[: self.segments].to(self.x.device)
        for number, group in enumerate(chosen.split(GROUP)):
            y = self.y[group]
            ends = self._ways(group, generator(self.seed, "checks", "segments", number, device=self.x.device))
            ways = {way: segments for way, segments in ends.items() if is_open(way)}
            if not ways:
                break
            # All ways in one row, as a pass takes about as long for a few segments as for a full batch.
            begin, end = (torch.cat(side) for side in zip(*ways.values(), strict=True))
            parts = zip(*map(self.batches, (begin, end, y.repeat(len(ways)))), strict=True)
            account = partial(unexplained, enough=enough, rounding=self.rounding)
            shares = torch.cat([account(self.itself, self._decide, *part) for part in parts])
            yield dict(zip(ways, shares.split(len(group)), strict=True))

    def _ways(self, chosen: Tensor, stream: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
        """Both ends of the segments from images `chosen` `(n,)`, on the uint8 grid."""
        x, y = self.x[chosen], self.y[chosen]
        attacked = to_float(torch.from_numpy(self.adversarial[chosen.cpu().numpy()]).to(x.device))
        grey = torch.randn((len(x), 1, *x.shape[2:]), generator=stream, device=x.device).expand_as(x)
        noise = torch.randn(x.shape, generator=stream, device=x.device)
        elsewhere = self.x[of_another_class(self.y, chosen)]
        ends = {
            "to noise": (x, self._moved(x, noise)),
            "to noise alike in all channels": (x, self._moved(x, grey)),
            "to fewer grey levels": (x, self._within(self._fewer_levels(x), x)),
            "to attacked images": (x, attacked),
            "to other images": (x, elsewhere),
        }
        for name, network in self.background.others.items():
            with frozen(network):
                other = as_it_is(network, x)
                for times in (1, FURTHER):
                    threat = self.threat.sized(times * self.threat.eps)
                    found = climb(other, x, y, threat, generator=stream, steps=FEW_STEPS, keep="last")
                    ends[f"to images that fool {name}" + (f" at {times} eps" if times > 1 else "")] = (
                        x,
                        on_grid(found, x, threat),
                    )
        return ends

    def _moved(self, x: Tensor, direction: Tensor) -> Tensor:
        return self._within(x + self.threat.eps * self.threat.steepest(direction), x)

    def _fewer_levels(self, x: Tensor) -> Tensor:
        """As few as a value can reach in the ball, as a palette leaves them: no attack goes there, and users may."""
        apart = min(PALETTE, 2 * self.threat.eps)
        return (x / apart).round() * apart

    def _within(self, moved: Tensor, x: Tensor) -> Tensor:
        return on_grid(self.threat.project(moved, x), x, self.threat)

    def fgsm(self, which: Flags) -> Flags:
        """Which of some images that are right `(M,)` one step breaks; False of others, as in all that follow."""
        return self._fell(fgsm, self.threat, "one step", which)

    def few_steps(self, which: Flags) -> Flags:
        return self._fell(partial(climb, steps=FEW_STEPS), self.threat, f"{FEW_STEPS} steps", which)

    @cached_property
    def pgd(self) -> Flags:
        """PGD on the cross-entropy, as all others; random start. Of all images that are right."""
        held: Flags = np.array(self._pgd.evaluation.robust_images)[self.correct.numpy()]
        return ~held

    def held_of(self, images: Bytes, labels: Labels) -> tuple[int, int]:
        """Of how many other images `(m, H, W, C)` that are right (second) PGD leaves how many (first)."""
        others = images, labels
        found = self._attack(partial(climb, steps=STEPS), self.threat, "elsewhere", others=others).evaluation
        return found.robust.k, sum(found.correct)

    @property
    def adversarial(self) -> Bytes:
        """What PGD made of all n images, uint8 `(n, H, W, C)`: adversarial where they fell."""
        return self._pgd.adversarial

    @cached_property
    def adversarial_logits(self) -> Tensor:
        """What the one whose answers count says of them, `(n, K)`."""
        return torch.cat([self.answers(part) for part in self.floats(self.adversarial)])

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

    def wider(self, which: Flags) -> Flags:
        """PGD at twice the eps."""
        return self._fell(partial(climb, steps=STEPS), self.threat.sized(2 * self.threat.eps), "twice the eps", which)

    @cached_property
    def unlimited(self) -> Flags:
        """PGD in the whole box, from the image itself: a random start would be another image already. Of all."""
        everyone = np.ones(self.right, bool)
        return self._fell(partial(climb, steps=STEPS, random_start=False), self.everything, "unlimited", everyone)

    def rescaled(self, factor: float, which: Flags) -> Flags:
        """PGD on the cross-entropy of logits times `factor`."""
        source = Rescaled(self._climbed.network, factor)
        # A factor moves no gradient's direction: what was proven of the copy holds.
        climbed = AttackPass(source, *(getattr(self._climbed, name) for name in PROVEN))
        return self._fell(partial(climb, steps=STEPS), self.threat, f"logits x {factor:g}", which, source=climbed)

    @property
    def querying(self) -> tuple[str, ...]:
        """The black-box attacks that can search in this ball."""
        return tuple(name for name in QUERYING if self.threat.norm in ATTACKS[name].threats)

    def queried(self, name: str, first: int) -> Iterator[Flags]:
        """Which of the images that PGD left a few queries break: of the `first` ones, then of more at once."""
        left = np.flatnonzero(self.correct.numpy())[~self.pgd]
        ends = range(first, len(left), max(first, self._batch_size))
        for number, part in enumerate(np.split(left, [*ends])):
            outcome = evaluate(
                None,
                self._images[part],
                self._labels[part],
                self.threat,
                [Attack(f"check: {name}", ATTACKS[name].function, {"queries": QUERYING[name]})],
                decide=lambda x: self._decide(x.to(self.x.device)),
                grid=self.grid,
                seed=derived_seed(self.seed, "checks", "queries", number),
                batch_size=self._batch_size,
                track=self._track,
            )
            yield ~np.array(outcome.evaluation.robust_images)

    @cached_property
    def _pgd(self) -> Outcome:
        self._traces: list[Tensor] = []

        def traced(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: Ball, **rest: Any) -> Tensor:
            trial = Traced(rest.pop("trial"), y)
            x_adv = climb(model, x, y, threat, steps=STEPS, trial=trial, **rest)
            self._traces.append(trial.margins)
            return x_adv

        return self._attack(traced, self.threat, f"{STEPS} steps")

    def _fell(
        self, function: Callable[..., Tensor], threat: Ball, name: str, which: Flags, source: nn.Module | None = None
    ) -> Flags:
        found = np.zeros(self.right, bool)
        if which.any():
            chosen = np.flatnonzero(self.correct.numpy())[which]
            found[which] = ~np.array(self._attack(function, threat, name, chosen, source).evaluation.robust_images)
        return found

    @cached_property
    def _climbed(self) -> AttackPass:
        """The model's fast copy, which all attacks climb; proven once."""
        assert self.model is not None, "a check that needs a model does not run without one"
        return attack_pass(self.model, self.x)

    def _attack(
        self,
        function: Callable[..., Tensor],
        threat: Ball,
        name: str,
        chosen: NDArray[np.int64] | slice = slice(None),
        source: nn.Module | None = None,
        others: tuple[Bytes, Labels] | None = None,
    ) -> Outcome:
        images, labels = others or (self._images[chosen], self._labels[chosen])
        return evaluate(
            self.model,
            images,
            labels,
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
