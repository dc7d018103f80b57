"""Attacks as functions with one signature: `attack(model, x, y, threat, *, generator, trial=None, ...) -> x_adv`.

`model` maps float images in [0, 1] to logits and is frozen by the caller (`models.frozen`); x `(N, C, H, W)`,
y `(N,)`; the result is a member of `threat`, and in [0, 1]. A `trial` counts passes and says which
images are done; nothing else is changed by a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness import losses
from dfmcl.robustness.attacks.apgd import apgd, apgd_targeted
from dfmcl.robustness.attacks.confined import square_subspace, subspace
from dfmcl.robustness.attacks.cw import cw_l2
from dfmcl.robustness.attacks.fab import fab_targeted
from dfmcl.robustness.attacks.grid import grid
from dfmcl.robustness.attacks.patch import patch
from dfmcl.robustness.attacks.patch_rs import patch_rs
from dfmcl.robustness.attacks.rays import rays
from dfmcl.robustness.attacks.relaxation import constraint_relaxation
from dfmcl.robustness.attacks.square import square
from dfmcl.robustness.attacks.suites import FROM, LAST, ONE_STEP, SUITES, parameters_of
from dfmcl.robustness.attacks.transfer import TRANSFORMS, Pass
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.attacks.universal import universal_patch
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.corruption import Corruption
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.registry import BALLS, FAMILIES
from dfmcl.robustness.threats.spatial import Spatial
from dfmcl.robustness.threats.threat import Threat, parse_eps

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
AttackFunction = Callable[..., Tensor]


def climb(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    loss: Loss = losses.cross_entropy,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    initial: Tensor | None = None,
    momentum: float = 0.0,
    transforms: Sequence[str] = (),
    keep: str = "worst",
    trial: Trial | None = None,
) -> Tensor:
    """Projected gradient ascent, the loop behind FGSM, PGD, margin-PGD and the FGSMs made to transfer.

    keep="worst" returns, per image, the first iterate that fools the model, else the one of highest loss; an image
    that is fooled leaves the batch at once. keep="last" returns the last iterate, as adversarial training and
    transfer need it. initial `(N, C, H, W)` is where the first restart begins, instead of a random or the image's own
    place. step_size defaults to 2.5 eps / steps (Madry et al. 2018). transforms: names in `transfer.TRANSFORMS`, the
    innermost first; with keep="last" only, as what they look at is not the iterate. Every step costs one forward and
    one backward pass; keep="worst" one more forward pass a restart, so that the last iterate counts too.
    """
    step_size = 2.5 * threat.eps / steps if step_size is None else step_size
    if transforms and keep != "last":
        raise BadInput(f"attack: transforms {', '.join(transforms)} need keep='last'; leave one of the two out")
    trial = trial or Trial(y)

    def look(points: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        if keep == "last":  # every image stays to the end
            trial.spend(everyone, forward=1, backward=1)
        return losses.value_and_gradient(model, points, loss, (labels,), with_gradient)

    seen: Pass = look
    for name in transforms:
        seen = TRANSFORMS[name](seen, threat, generator)
    worst, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    alive = everyone = torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        index, origin, velocity = alive, x[alive], torch.zeros_like(x[alive])
        x_adv = threat.start(origin, generator) if random_start else origin.clone()
        if initial is not None and restart == 0:
            x_adv = threat.project(initial, origin)
        for step in range(steps + 1):
            if step == steps and keep == "last":
                break
            value, gradient, logits = seen(x_adv, y[index], step < steps)
            if keep == "worst":
                fooled = trial.look(index, x_adv, logits, gradient=step < steps)
                value = torch.where(fooled, torch.inf, value)
                better = value > highest[index]
                worst[index[better]] = x_adv[better]
                highest[index[better]] = value[better]
                stay = ~fooled
                index, origin, x_adv = index[stay], origin[stay], x_adv[stay]
                gradient, velocity = gradient[stay], velocity[stay]
            if step == steps or len(index) == 0:
                break
            if momentum:
                size = gradient.abs().flatten(1).mean(dim=1).clamp_min(1e-12)
                velocity = momentum * velocity + gradient / size.view(-1, *[1] * (x.dim() - 1))
                gradient = velocity
            x_adv = threat.project(x_adv + step_size * threat.steepest(gradient), origin)
        if keep == "last":
            return x_adv
        alive = index
    return worst


def fgsm(
    model: Model, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator, trial: Trial | None = None
) -> Tensor:
    """One step of length eps from the image itself. Goodfellow et al. 2015."""
    return climb(
        model,
        x,
        y,
        threat,
        generator=generator,
        steps=1,
        step_size=threat.eps,
        random_start=False,
        keep="last",
        trial=trial,
    )


pgd = partial(climb, loss=losses.cross_entropy)
"""Projected gradient descent on the cross-entropy. Madry et al. 2018."""

margin_pgd = partial(climb, loss=losses.margin)
"""PGD on the Carlini & Wagner margin, which does not care about the scale of the logits."""

# 10 steps of eps/10 and momentum 1 are the paper's; the last iterate, as a surrogate that is fooled early
# says little about the target.
mi_fgsm = partial(climb, loss=losses.cross_entropy, momentum=1.0, random_start=False, keep="last")
"""Momentum iterative FGSM, made to transfer. Dong et al. 2018."""

di_fgsm = partial(mi_fgsm, transforms=("di",))
"""MI-FGSM on views of random size and place. Xie et al. 2019 (M-DI2-FGSM)."""

ti_fgsm = partial(mi_fgsm, transforms=("ti",))
"""MI-FGSM by smoothed gradients. Dong et al. 2019."""

vmi_fgsm = partial(mi_fgsm, transforms=("vmi",))
"""MI-FGSM by gradients tuned to those around. Wang & He 2021."""


@dataclass(frozen=True)
class Kind:
    """An attack with its needs and abilities.

    gradients: whether the model must be differentiable.
    scores: whether it looks at more than labels.
    float32: whether a copy in half precision would weaken it.
    restarts: whether it may be told to run more than once.
    carried: its parameters when it is crafted on a surrogate for another model; None where it does not transfer.
    live: whether an outsider runs it against an endpoint.
    threats: the kinds of threat that it can search in.
    """

    function: AttackFunction
    gradients: bool = True
    scores: bool = True
    float32: bool = False
    restarts: bool = True
    carried: Mapping[str, Any] | None = None
    live: bool = False
    threats: tuple[str, ...] = (Linf.kind, L2.kind)


NORMS = tuple(BALLS)
KINDS = tuple(family.kind for family in FAMILIES)
carried = partial(Kind, restarts=False, carried=LAST)  # it starts at the image itself
# What they compare, scores of two proposals, differs by less than bfloat16's steps: that cost Square 2 points of its
# strength. They spend their queries on one search.
blind = partial(Kind, gradients=False, float32=True, restarts=False)

ATTACKS: dict[str, Kind] = {
    "fgsm": Kind(fgsm, carried={}),
    "pgd": Kind(pgd, carried=LAST),
    "margin-pgd": Kind(margin_pgd, carried=LAST),
    "mi-fgsm": carried(mi_fgsm),
    "cw-l2": Kind(cw_l2, restarts=False),  # it searches from the image itself
    "apgd-ce": Kind(apgd, threats=NORMS),
    "apgd-t": Kind(apgd_targeted, threats=NORMS),
    "cr": Kind(constraint_relaxation),
    "fab-t": Kind(fab_targeted, float32=True),  # the way to the border: 1 to 3 points in bfloat16
    "square": blind(square, live=True),
    "subspace": Kind(subspace),
    "square-subspace": blind(square_subspace),
    "rays": blind(rays, scores=False, live=True, threats=(Linf.kind,)),
    "patch": Kind(patch, threats=(Patch.kind,)),
    "patch-rs": blind(patch_rs, threats=(Patch.kind,)),
    "universal-patch": Kind(universal_patch, restarts=False, threats=(Patch.kind,)),  # one run for all images
    "grid": blind(grid, threats=(Spatial.kind, Corruption.kind)),
    "di-fgsm": carried(di_fgsm),
    "ti-fgsm": carried(ti_fgsm),
    "vmi-fgsm": carried(vmi_fgsm),  # 55 passes of the surrogates an image, the others 10
}


@dataclass(frozen=True)
class Attack:
    """A named attack with its parameters, as a policy or a table speaks of it."""

    name: str
    function: AttackFunction
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Attack:
        """From a name: KIND, KIND-STEPS or KIND-STEPSxRESTARTS, and @STEP_SIZE where the attack has one.

        `fgsm`, `pgd-20`, `pgd-50x5`, `apgd-t`, `subspace-10`, `pgd-40@2/255`, `pgd-200x5@eps/4`. For `square-1000`,
        `square-subspace-1000`, `rays-1000`, `patch-rs-1000` and `grid-100` the number is that of queries. BadInput
        where the name or a number makes no sense.
        """
        kind, parameters = parameters_of(text)
        if kind not in ATTACKS:
            raise BadInput(
                f"attack: {text!r} is unknown; choose from {', '.join(ATTACKS)}, with -STEPS or -STEPSxRESTARTS"
            )
        counts = [value for key, value in parameters.items() if key != "step_size"]
        if any(value < 1 for value in counts) or (kind == ONE_STEP and counts):
            raise BadInput(f"attack: {text!r}: steps and restarts must be at least 1, and fgsm takes none")
        if "restarts" in parameters and not ATTACKS[kind].restarts:
            raise BadInput(f"attack: {text!r}: {kind} takes no restarts")
        if (step_size := parameters.get("step_size")) is not None:
            if "step_size" not in inspect.signature(ATTACKS[kind].function).parameters:
                raise BadInput(f"attack: {text!r}: {kind} takes no step size")
            if step_length(step_size, Linf(1.0)) <= 0:
                raise BadInput(f"attack: {text!r}: a step is longer than 0")
        return Attack(text, ATTACKS[kind].function, parameters)

    @staticmethod
    def parse_suite(suite: str | Sequence[str]) -> tuple[Attack, ...]:
        """From a suite's name or a list of attacks; BadInput where a name makes no sense, or one attack comes twice."""
        if isinstance(suite, str):
            if suite not in SUITES:
                raise BadInput(f"attacks: suite {suite!r} is unknown; choose {' or '.join(SUITES)}, or list attacks")
            suite = SUITES[suite]
        if not suite or len(set(suite)) < len(suite):
            raise BadInput(f"attacks: {', '.join(suite) or 'none'}: name at least one attack, and each once")
        return tuple(Attack.parse(name) for name in suite)

    @staticmethod
    def parse_transfer(name: str) -> Attack:
        """An attack as it is used from a surrogate, by the gate and by the sidecar alike: `mi-fgsm-10`, `pgd-10`.

        BadInput for others, and for restarts, which are chosen by looking at the target.
        """
        attack = Attack.parse(name)
        if attack.kind.carried is None:
            known = [kind for kind, found in ATTACKS.items() if found.carried is not None]
            raise BadInput(f"attack: {name!r} does not transfer; choose one of {', '.join(known)}")
        if "restarts" in attack.parameters:
            raise BadInput(f"attack: {name!r}: restarts are chosen by looking at the target; leave them out")
        return replace(attack, parameters={**attack.kind.carried, **attack.parameters})

    def crafted_on(self, network: str) -> Attack:
        """The same under a name that says on which other network it climbs: `mi-fgsm-10 from surrogate`."""
        return replace(self, name=f"{self.name}{FROM}{network}")

    @property
    def kind(self) -> Kind:
        """What it needs and can; a function that is none of ours needs gradients, and may search anywhere."""
        own = (kind for kind in ATTACKS.values() if kind.function is self.function)
        return next(own, Kind(self.function, threats=KINDS))

    def check(self, threat: Threat) -> None:
        """BadInput where it cannot search in the threat."""
        if threat.kind not in self.kind.threats:
            able = [name for name, kind in ATTACKS.items() if threat.kind in kind.threats]
            advice = f"choose one of {', '.join(able)}" if able else "attack its parts one by one"
            raise BadInput(f"attack: {self.name!r} does not search in {threat}; {advice}")

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        generator: torch.Generator,
        trial: Trial | None = None,
    ) -> Tensor:
        self.check(threat)
        parameters = dict(self.parameters)
        if isinstance(threat, Ball) and isinstance(parameters.get("step_size"), str):
            parameters["step_size"] = step_length(parameters["step_size"], threat)
        return self.function(model, x, y, threat, generator=generator, trial=trial, **parameters)


def step_length(text: str, threat: Ball) -> float:
    """The step that `2/255` or `0.01`, or by the radius `eps/4`, stands for; BadInput for others."""
    if not text.startswith("eps/"):
        return parse_eps(text)
    parts = parse_eps(text.removeprefix("eps/"))
    if parts <= 0:
        raise BadInput(f"step size: {text!r} is no step; write a number, a fraction such as 2/255, or eps/4")
    return threat.eps / parts
