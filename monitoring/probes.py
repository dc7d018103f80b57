"""What can be asked of a live endpoint: one function type, one dict. The asker owns time and counting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.monitoring.asker import Logits
from dfmcl.monitoring.threatened import threat_of
from dfmcl.robustness.attacks.registry import ATTACKS, Attack, Model
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.models import to_bytes, to_float
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.ball import Ball

Ask = Callable[[Bytes], Logits]
"""uint8 images (N, H, W, C) to the logits (N, K) that the endpoint gives them."""


@dataclass(frozen=True)
class Scene:
    """What a probe works with. images: uint8 (N, H, W, C); labels: (N,); adversarial: crafted before, by attack."""

    images: Bytes
    labels: Labels
    threat: Ball
    seed: int
    number: int
    adversarial: Mapping[str, Bytes]

    def only(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Scene:
        """The scene with the chosen images."""
        crafted = {name: images[chosen] for name, images in self.adversarial.items()}
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], adversarial=crafted)


@dataclass(frozen=True)
class Seen:
    """What a probe saw, of N images: answers (N,), the bytes (N, H, W, C) they are about, and how often it asked."""

    answers: Labels
    images: Bytes
    queries: int


Probe = Callable[[Scene, Attack, Ask], Seen]
"""Ask the endpoint about a scene's images, changed by an attack or not."""

NO_ATTACK = Attack("none", lambda model, x, y, threat, generator, trial: x)


def clean(scene: Scene, attack: Attack, ask: Ask) -> Seen:
    """The images as they are."""
    return Seen(_labels(ask(scene.images)), scene.images, len(scene.images))


def transfer(scene: Scene, attack: Attack, ask: Ask) -> Seen:
    """Adversarial images that were crafted on the surrogates, each asked about once."""
    images = scene.adversarial[attack.name]
    return Seen(_labels(ask(images)), images, len(images))


def query(scene: Scene, attack: Attack, ask: Ask) -> Seen:
    """Search by asking: one question per image and step while it holds, within the attack's own budget.

    The bytes that were asked about count, and only inside the ball; attacks look outside of it too.
    """
    if not len(scene.images):
        return Seen(scene.labels, scene.images, 0)
    x, y = to_float(torch.from_numpy(scene.images)), torch.from_numpy(scene.labels)
    answers, shown = scene.labels.copy(), scene.images.copy()

    def model(points: Tensor) -> Tensor:
        return torch.from_numpy(ask(_bytes(points)))

    def confirm(rows: Tensor, points: Tensor) -> Tensor:
        asked = torch.from_numpy(_bytes(points)).permute(0, 3, 1, 2)
        originals = (x[rows] * 255).round().to(torch.uint8)
        inside: Tensor = scene.threat.contains_uint8(asked, originals)
        shown[rows[inside].numpy()] = _bytes(points[inside])
        return inside

    trial = Trial(y, confirm)
    stream = generator(scene.seed, attack.name, scene.number)
    attack(model, x, y, scene.threat, generator=stream, trial=trial)
    answers[trial.fooled.numpy()] = -1  # some other class: which one, nobody kept
    return Seen(answers, shown, int(trial.forward.sum()))


PROBES: dict[str, Probe] = {"clean": clean, "transfer": transfer, "query": query}


def craft(source: Model, scene: Scene, attack: Attack, *, part: int = 0) -> Bytes:
    """Adversarial bytes (N, H, W, C) inside the ball, by the gradients of `source` (logits of [0, 1] images); or inside
    the threat that the attack brings along.

    What an attack leaves outside is sent as the image it was. part: of a scene that is crafted in several, each with
    chances of its own.
    """
    x, y = to_float(torch.from_numpy(scene.images)), torch.from_numpy(scene.labels)
    stream = generator(scene.seed, attack.name, scene.number, part)
    threat = threat_of(attack, scene.threat)
    x_adv = attack(source, x, y, threat, generator=stream).detach().clamp(0, 1)
    adversarial = threat.to_uint8(x_adv, x)
    inside = threat.contains_uint8(adversarial, (x * 255).round().to(torch.uint8)).numpy()
    return np.where(inside[:, None, None, None], to_bytes(adversarial).numpy(), scene.images)


def query_attack(name: str) -> Attack:
    """An attack by name, as it is used through answers alone, with its budget: `square-100`, `rays-200`."""
    attack = Attack.parse(name)
    if not attack.kind.live:
        known = [kind for kind, found in ATTACKS.items() if found.live]
        raise BadInput(f"attack: {name!r} is no search by queries; choose one of {', '.join(known)}")
    if "queries" not in attack.parameters:
        raise BadInput(f"attack: {name!r}: a live endpoint needs a budget; write {name}-100 for 100 queries an image")
    return attack


def _labels(logits: Logits) -> Labels:
    labels: Labels = logits.argmax(axis=1).astype(np.int64)
    return labels


def _bytes(points: Tensor) -> Bytes:
    """What of points (N, C, H, W) in [0, 1] goes over the wire: (N, H, W, C)."""
    sent: Bytes = to_bytes(points.clamp(0, 1)).numpy()
    return sent
