"""A network that answers as the judged one does near its images, learnt from answers alone: Papernot et al. 2017.

Whatever the judged model's gradients say, the borders between its answers are where they are, and a network that has
learnt them has gradients that lead there. It is asked about training images, about noise of several kinds around them
(alike in all channels, coarse, both), and about images that fool what was learnt so far.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dfmcl.common.progress import Track, silent
from dfmcl.robustness.attacks.registry import mi_fgsm
from dfmcl.robustness.image_set import Images
from dfmcl.robustness.models import ResNet18, frozen, to_float
from dfmcl.robustness.portions import ASKED, answered, portion
from dfmcl.robustness.seeds import derived_seed, generator
from dfmcl.robustness.threats.ball import Ball

SIDE = 32  # larger images are looked at in this size: the substitute is small, and transfer cares for coarse patterns
WIDTH = 8
ROUNDS = 3
PARTS = 2 * ROUNDS  # of the answers: clean, noise in each round, fooling images in all but the first
EPOCHS = 2  # over all that was asked so far, in each round
BATCH = 64
LEARNING_RATE = 2e-3
COARSE = 8  # patches on a side of coarse noise
STEPS = 5


class Substitute(nn.Module):
    """Float images `(N, C, H, W)` in [0, 1] to logits `(N, K)`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.net = ResNet18(WIDTH, classes, channels, blocks=1)

    def forward(self, x: Tensor) -> Tensor:
        # Not in channels_last, as images of bytes come: see `layout_of` of training.
        logits: Tensor = self.net(2 * _seen(x).contiguous() - 1)
        return logits


@dataclass(frozen=True)
class Learnt:
    """A substitute, how many answers it was learnt from, and how often it then agrees with them."""

    model: Substitute
    answers: int
    agreement: float

    def to_bytes(self) -> bytes:
        """As an .npz file."""
        buffer = io.BytesIO()
        weights = {f"weight {name}": value.cpu().numpy() for name, value in self.model.state_dict().items()}
        np.savez(buffer, answers=self.answers, agreement=self.agreement, **weights)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes, device: torch.device) -> Learnt:
        """The inverse of `to_bytes`, frozen."""
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            weights = {
                name.removeprefix("weight "): torch.from_numpy(archive[name])
                for name in archive.files
                if name.startswith("weight ")
            }
            answers, agreement = int(archive["answers"]), float(archive["agreement"])
        model = Substitute(weights["net.conv1.weight"].shape[1], len(weights["net.fc.bias"]))
        model.load_state_dict(weights)
        return Learnt(model.to(device).eval().requires_grad_(False), answers, agreement)


def learnt(
    decide: Callable[[Tensor], Tensor],
    images: Images,
    threat: Ball,
    *,
    answers: int,
    seed: int,
    device: torch.device,
    track: Track = silent,
) -> Learnt:
    """Train a substitute on at most `answers` of the labels that `decide` gives.

    decide: float images `(N, C, H, W)` to logits `(N, K)`. images: uint8 `(n, H, W, C)`, other than the judged ones.
    threat: how far around them it is asked, as bytes.
    Its randomness comes from `seed` alone.
    """
    stream = generator(seed, "substitute", device=device)
    count = min(len(images), max(1, answers // PARTS))
    chosen = torch.randperm(len(images), generator=generator(seed, "substitute", "images"))[:count].numpy()
    # As bytes, and what was asked in the substitute's own size: whole and in floats they would take gigabytes.
    together = min(BATCH, portion(math.prod(images.shape[1:]), ASKED))
    parts = [part.to(device) for part in torch.from_numpy(images[chosen]).split(together)]
    asked = _Asked(decide, PARTS * count)
    truth = [asked.about(to_float(part)) for part in parts]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(seed, "substitute", "weights"))
        model = Substitute(images.shape[3], asked.classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for number in track(range(ROUNDS), "substitute", ROUNDS):
        for part in parts:
            asked.about(_around(to_float(part), threat, stream))
        if number:
            with frozen(model):
                for part, labels in zip(parts, truth, strict=True):
                    asked.about(_fooling(model, to_float(part), labels, threat, stream))
        _train(model, optimizer, asked, stream)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(dim=1) for part in asked.points.split(BATCH)])
    return Learnt(model, len(found), float((found == asked.labels).float().mean()))


class _Asked:
    """What was asked so far: images as the substitute sees them `(N, C, H, W)`, the labels that were given `(N,)`.

    Both lie in one place for `most` images, made once: kept apart, they would pin the memory of whole images between
    them, which is hundreds of megabytes at 224 pixels. classes: K, after the first question.
    """

    def __init__(self, decide: Callable[[Tensor], Tensor], most: int) -> None:
        self._decide, self._most, self._count = decide, most, 0
        self._points = self._labels = torch.zeros(0)
        self.classes = 0

    def about(self, x: Tensor) -> Tensor:
        """Ask about images `(n, C, H, W)`; their labels `(n,)`."""
        seen, logits = _seen(x), answered(self._decide, x)
        if not self._count:
            self._points = seen.new_empty(self._most, *seen.shape[1:])
            self._labels = torch.empty(self._most, dtype=torch.int64, device=x.device)
            self.classes = logits.shape[1]
        rows = slice(self._count, self._count + len(x))
        self._points[rows], self._labels[rows] = seen, logits.argmax(dim=1).to(x.device)
        self._count += len(x)
        return self._labels[rows]

    @property
    def points(self) -> Tensor:
        return self._points[: self._count]

    @property
    def labels(self) -> Tensor:
        return self._labels[: self._count]


def _seen(x: Tensor) -> Tensor:
    """Images in the size that the substitute looks at."""
    return functional.interpolate(x, size=(SIDE, SIDE), mode="area") if max(x.shape[2:]) > SIDE else x


def _fooling(model: nn.Module, x: Tensor, labels: Tensor, threat: Ball, stream: torch.Generator) -> Tensor:
    found = mi_fgsm(model, x, labels, threat, generator=stream, steps=STEPS)
    return threat.to_uint8(found, x).float() / 255


def _around(x: Tensor, threat: Ball, stream: torch.Generator) -> Tensor:
    """Noise of one of four kinds around each image: fine or coarse, in each channel or alike in all."""
    size, device = x.shape, x.device
    coarse = (min(COARSE, size[2]), min(COARSE, size[3]))
    kinds = []
    for channels in (size[1], 1):
        kinds.append(torch.randn((size[0], channels, *size[2:]), generator=stream, device=device).expand(size))
        drawn = torch.randn((size[0], channels, *coarse), generator=stream, device=device)
        kinds.append(functional.interpolate(drawn, size=size[2:]).expand(size))
    which = torch.randint(len(kinds), (size[0],), generator=stream, device=device)
    noise = torch.stack(kinds)[which, torch.arange(size[0], device=device)]
    length = threat.eps * torch.rand((size[0], 1, 1, 1), generator=stream, device=device)
    return threat.to_uint8(threat.project(x + length * threat.steepest(noise), x), x).float() / 255


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, asked: _Asked, stream: torch.Generator) -> None:
    model.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(asked.labels), generator=stream, device=asked.labels.device).split(BATCH):
            if len(index) > 1:  # a batch norm needs two
                optimizer.zero_grad()
                functional.cross_entropy(model(asked.points[index]), asked.labels[index]).backward()
                optimizer.step()
    model.eval()
