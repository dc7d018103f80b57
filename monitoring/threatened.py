"""Threats of another kind than the watch's ball, as rounds ask about them: one member for each image, one question."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.patch import patch
from dfmcl.robustness.attacks.registry import Attack, Model
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.attacks.universal import universal_patch
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.robustness.threats.threat import Threat, as_levels
from dfmcl.robustness.threats.transforms import Transforms

# Of a patch, which is crafted on the surrogates: 39 forward and 13 backward passes an image.
PATCH = {"steps": 10, "restarts": 1, "targets": 3}
UNIVERSAL = "universal-"  # before a patch: one for all images of a round, 44 forward and 40 backward passes each
ONE_FOR_ALL = {"steps": 40}


@dataclass(frozen=True)
class Threatened(Attack):
    """An attack with a threat of its own, whatever the scene's is; it has the threat's name.

    Of transforms (moves, corruptions) it draws one for each image, so that accuracy is that under a random one, and an
    upper bound of that under the worst. A patch is the surrogates' worst, for each image or for all of a round.
    """

    threat: Threat = field(kw_only=True)

    @staticmethod
    def parse(text: str) -> Threatened:
        """From a spelling such as `fog@3`, `corruptions`, `rotation:15`, `patch:2%`, `universal-patch:2%`.

        BadInput for balls and unions.
        """
        if text.startswith(f"{UNIVERSAL}{Patch.kind}:"):
            square = Patch.parse(text.removeprefix(UNIVERSAL))
            return Threatened(f"{UNIVERSAL}{square}", universal_patch, ONE_FOR_ALL, threat=square)
        threat = parse_threat(text)
        if isinstance(threat, Patch):
            return Threatened(str(threat), patch, PATCH, threat=threat)
        if all(isinstance(part, Transforms) for part in threat.parts):
            return Threatened(str(threat), drawn, threat=threat)
        balls = [part for part in threat.parts if isinstance(part, Ball)]
        advice = f"{balls[0]} is a ball, and [threat] names the watch's" if balls else "name each part by itself"
        raise BadInput(f"threat {text}: {advice}")

    @property
    def crafted(self) -> bool:
        """Whether the surrogates are asked."""
        return isinstance(self.threat, Patch)

    def check(self, threat: Threat) -> None:
        """It was made for its threat."""


def drawn(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator, trial: Trial | None = None
) -> Tensor:
    """Each image `(N, C, H, W)` under one of a threat's transforms, all alike likely; the model is not asked."""
    parts, images = threat.parts, as_levels(x)
    found = []
    for row, place in enumerate(torch.randint(len(parts), (len(x),), generator=generator).tolist()):
        part = parts[place]
        assert isinstance(part, Transforms)
        number = torch.randint(part.count(tuple(x.shape[1:])), (1,), generator=generator)
        found.append(part.transformed(images[row : row + 1], number))
    return torch.cat([images[:0], *found]).to(x.dtype) / 255


def threat_of(attack: Attack, ball: Ball) -> Threat:
    """Where an attack's images lie: in its own threat, or in the watch's ball."""
    return attack.threat if isinstance(attack, Threatened) else ball
