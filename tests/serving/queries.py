"""What attackers by queries send, in the order in which they send it; and what the detectors see in a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor
from torch.nn import functional

from dfmcl.robustness.attacks.rays import rays
from dfmcl.robustness.attacks.square import square
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.linf import Linf
from dfmcl.serving.detection.detector import Examiner
from dfmcl.serving.detection.fingerprints import DETECTORS
from dfmcl.serving.gateway.api_keys import Caller
from dfmcl.serving.gateway.config import Detection
from dfmcl.serving.gateway.metrics import DetectionMetrics

Images = npt.NDArray[np.uint8]
Predict = Callable[[Images], npt.NDArray[np.float32]]
Disguise = Callable[[Tensor, torch.Generator], Tensor]
THREAT = Linf(8 / 255)
VERIFIED = 5
SHOP = Caller("shop")
ATTACKS: dict[str, Callable[..., Tensor]] = {"square": square, "rays": rays}


def to_bytes(points: Tensor) -> Images:
    """Float (N, C, H, W) in [0, 1] as what goes over the wire, uint8 (N, H, W, C)."""
    return np.asarray((points * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous())


def attack(
    name: str,
    predict: Predict,
    images: Images,
    labels: npt.NDArray[Any],
    *,
    queries: int,
    seed: int = 0,
    disguise: Disguise | None = None,
) -> float:
    """Attack images (N, H, W, C) by so many queries each within THREAT; the share that ends up misclassified.

    disguise: changes each query before it is sent. The attacker believes in a success that VERIFIED more disguised
    queries confirm, and what counts in the end is the undisguised point.
    """
    generator = torch.Generator().manual_seed(seed)

    def model(points: Tensor) -> Tensor:
        sent = points if disguise is None else disguise(points, generator)
        return torch.from_numpy(predict(to_bytes(sent)))

    def confirm(rows: Tensor, points: Tensor) -> Tensor:
        wrong = [model(points).argmax(dim=1) != y[rows] for _ in range(VERIFIED)]
        return torch.stack(wrong).all(dim=0)

    y = torch.from_numpy(labels).long()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    found = ATTACKS[name](
        model, x, y, THREAT, generator=generator, queries=queries, trial=Trial(y, confirm if disguise else None)
    )
    return float((predict(to_bytes(found)).argmax(axis=1) != labels).mean())


def noisy(points: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh noise of +-8/255 on every value: no window of values survives, coarse brightness does."""
    return points + THREAT.eps * (2 * torch.randint(0, 2, points.shape, generator=generator) - 1)


def blinded(points: Tensor, generator: torch.Generator) -> Tensor:
    """The same after a random turn (20 degrees), size (0.8 to 1.2), place (an eighth) and mirror.

    Query blinding (Chen, Carlini & Wagner 2019) with the noise that keeps proposals far apart (OARS, Feng et al. 2023).
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(points), generator=generator)

    angle, size, mirror = uniform(-1, 1) * math.radians(20), uniform(0.8, 1.2), uniform(-1, 1).sign()
    cosine, sine = angle.cos() * size, angle.sin() * size
    across, down = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    affine = torch.stack([mirror * cosine, -sine, across, mirror * sine, cosine, down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, list(points.shape), align_corners=False)
    moved = functional.grid_sample(points, grid, padding_mode="reflection", align_corners=False)
    return noisy(moved, generator)


def photograph(seed: int, size: int = 32) -> Images:
    """A smooth random picture (size, size, 3): light and shade over some pixels, as photographs have."""
    coarse = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(seed))
    return np.asarray(to_bytes(functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1))[0])


@dataclass
class Stream:
    """Detectors before which images pass, ten a second. log: their words; alarms: images until a campaign began."""

    settings: Detection = field(default_factory=Detection)
    salt: bytes = b"a secret of 16 b"
    now: float = 0.0
    sent: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    alarms: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self.examiner = Examiner(self.settings, self.salt, DetectionMetrics(self.registry), self._hear)

    def send(self, images: Iterable[Images], caller: Caller = SHOP) -> Stream:
        """Pass images, each (H, W, C)."""
        for image in images:
            self.now, self.sent = self.now + 0.1, self.sent + 1
            self.examiner.examine(caller, image, self.now)
        return self

    def _hear(self, entry: dict[str, Any]) -> None:
        self.log.append(entry)
        self.alarms.setdefault(entry["detector"], self.sent)

    def value(self, name: str, **labels: str) -> float:
        """A metric's value, its name without gateway_detection_."""
        value = self.registry.get_sample_value(f"gateway_detection_{name}", labels)
        assert value is not None, name
        return value

    @property
    def different(self) -> float:
        """Images that were no exact repeats."""
        return self.value("images_total") - self.value("repeats_total")

    @property
    def shares(self) -> dict[str, float]:
        """By detector: which share of the different images was a near-duplicate."""
        return {name: self.value("matches_total", detector=name) / self.different for name in DETECTORS}
