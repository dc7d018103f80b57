"""A model whose answers are known: grey images, bright or dark, and what an attack of 20 grey levels does to each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dfmcl.monitoring.asker import Latencies, Manners, Stopped
from dfmcl.monitoring.crafting import ImagePool, draw, scenes
from dfmcl.monitoring.probes import Scene
from dfmcl.monitoring.releases import Release
from dfmcl.monitoring.results import Round, RoundFailure, RoundResult, RoundSkipped
from dfmcl.monitoring.rounds import RoundPlan, run_round
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.threats.linf import Linf
from dfmcl.serving.clients.triton import Answer
from tests.monitoring.clocks import Ticking

GREYS = np.array([10, 100, 110, 120, 135, 145, 155, 250], np.uint8)
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 0], np.int64)  # the last one is wrong: bright is class 1
EPS = 20  # flips greys within 20 of 127.5: 110, 120, 135, 145
BALL = Linf(EPS / 255)


def brightness(x: torch.Tensor) -> torch.Tensor:
    """Logits of a linear model: class 1 where the mean is above one half."""
    mean = x.flatten(1).mean(dim=1)
    return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def served(images: np.ndarray, version: str = "1") -> Answer:
    """The same model behind the endpoint."""
    return Answer(brightness(torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255).numpy(), version)


def pool(greys: np.ndarray = GREYS, labels: np.ndarray = LABELS) -> ImagePool:
    """Images of 4 x 4 pixels, each of one grey."""
    return ImagePool(np.broadcast_to(greys[:, None, None, None], (len(greys), 4, 4, 3)).copy(), labels, 2)


def pictures(greys: np.ndarray = GREYS) -> np.ndarray:
    """The images of such a pool."""
    return np.asarray(pool(greys, np.zeros(len(greys), np.int64)).images)


def plan(attacks: tuple[str, ...] = ("fgsm",), **changes: Any) -> RoundPlan:
    """Rounds of eight images, without replay."""
    named = tuple(Attack.parse_transfer(name) for name in attacks)
    usual: dict[str, Any] = {"model": "bright", "classes": 2, "threat": BALL, "attacks": named, "images": 8}
    return RoundPlan(**usual | changes)


def crafted(settings: RoundPlan, number: int = 1, images: ImagePool | None = None, seed: int = 0) -> Scene:
    """The scene of a round, with its adversarial images."""
    made = scenes(images or pool(), brightness, BALL, settings.attacks, seed=seed, count=settings.images, first=number)
    return next(made)


def manners(**changes: Any) -> Manners:
    """Asks without rest."""
    usual: dict[str, Any] = {"wait": lambda seconds: None, "paused": lambda: False, "latencies": Latencies(1e9)}
    return Manners(**usual | changes)


def one_round(
    settings: RoundPlan | None = None, predict: Callable[[np.ndarray], Answer] = served, number: int = 1, **options: Any
) -> Round:
    """A round of the settings. scene, find, clock, manners: instead of the usual ones."""
    settings = settings or plan()
    scene = options.pop("scene", None) or crafted(settings, number)
    find = options.pop("find", lambda version: Release())
    clock, how = options.pop("clock", Ticking()), options.pop("manners", manners())
    assert not options
    return run_round(settings, number, scene, predict, find, clock, how)


def order(number: int = 1, images: int = 8) -> np.ndarray:
    """Greys in the order in which a round draws them."""
    return GREYS[draw(len(GREYS), images, 0, number)]


def measured(outcome: Round) -> RoundResult:
    assert isinstance(outcome, RoundResult), outcome
    return outcome


def failed(outcome: Round) -> RoundFailure:
    assert isinstance(outcome, RoundFailure), outcome
    return outcome


def skipped(outcome: Round) -> RoundSkipped:
    assert isinstance(outcome, RoundSkipped), outcome
    return outcome


def stopping(after: int) -> Callable[[float], None]:
    """A `wait` that says Stopped after so many requests."""
    left, lock = [after], threading.Lock()

    def wait(seconds: float) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

    return wait
