"""What can be asked of a live endpoint: one function type, one dict. The round owns time, counting and judgement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from robustness.attacks import ATTACKS, Attack, Model
from robustness.data import Bytes, Labels
from robustness.errors import BadInput
from robustness.geometry import contains_uint8, to_uint8
from robustness.models import to_bytes, to_float
from robustness.seeds import generator
from robustness.threat import Threat

# What an attack needs to transfer: its last iterate; one that fools the surrogate early says little about the target.
TRANSFERABLE: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "pgd": {"steps": 10, "keep": "last"},
    "margin-pgd": {"steps": 10, "keep": "last"},
    "mi-fgsm": {"steps": 10, "keep": "last"},
    "di-fgsm": {"steps": 10, "keep": "last"},
    "ti-fgsm": {"steps": 10, "keep": "last"},
    "vmi-fgsm": {"steps": 10, "keep": "last"},  # 190 passes of the surrogates an image, the others 10
}
CRAFT_IMAGES = 64  # one backward pass of a wide ResNet-18 on 64 small images stays below 1 GB

Ask = Callable[[Bytes], Labels]
"""uint8 images (N, H, W, C) to the labels (N,) that the endpoint gives them."""


@dataclass(frozen=True)
class Scene:
    """What a probe works with. images: uint8 (N, H, W, C); labels: (N,); source: the surrogate's logits."""

    images: Bytes
    labels: Labels
    source: Model
    threat: Threat
    seed: int
    number: int

    def only(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Scene:
        """The scene with the chosen images."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


Probe = Callable[[Scene, Attack, Ask], Labels]
"""Ask the endpoint about a scene's images, changed by an attack or not; returns its labels (N,)."""

NO_ATTACK = Attack("none", lambda model, x, y, threat, generator, trial: x)


def clean(scene: Scene, attack: Attack, ask: Ask) -> Labels:
    """The images as they are."""
    return ask(scene.images)


def transfer(scene: Scene, attack: Attack, ask: Ask) -> Labels:
    """Adversarial images crafted on the surrogates, each asked about once."""
    return ask(craft(scene, attack))


PROBES: dict[str, Probe] = {"clean": clean, "transfer": transfer}


def craft(scene: Scene, attack: Attack) -> Bytes:
    """Adversarial bytes (N, H, W, C) inside the ball; what an attack leaves outside is sent as the image it was."""
    crafted = scene.images.copy()
    for chunk, begin in enumerate(range(0, len(crafted), CRAFT_IMAGES)):
        part = slice(begin, begin + CRAFT_IMAGES)
        x, y = to_float(torch.from_numpy(scene.images[part])), torch.from_numpy(scene.labels[part])
        stream = generator(scene.seed, attack.name, scene.number, chunk)
        x_adv = attack(scene.source, x, y, scene.threat, generator=stream).detach().clamp(0, 1)
        adversarial = to_uint8(x_adv, x, scene.threat)
        inside = contains_uint8(adversarial, (x * 255).round().to(torch.uint8), scene.threat).numpy()
        crafted[part][inside] = to_bytes(adversarial).numpy()[inside]
    return crafted


def transfer_attack(name: str) -> Attack:
    """An attack by name, as it is used for transfer: `mi-fgsm-10`, `pgd-10`, `fgsm`; BadInput for others."""
    attack = Attack.parse(name)
    kind = next(kind for kind, function in ATTACKS.items() if function is attack.function)
    if kind not in TRANSFERABLE:
        raise BadInput(f"attack: {name!r} does not transfer; choose one of {', '.join(TRANSFERABLE)}")
    if "restarts" in attack.parameters:
        raise BadInput(f"attack: {name!r}: restarts are chosen by looking at the target; leave them out")
    return replace(attack, parameters=TRANSFERABLE[kind] | dict(attack.parameters))
