"""A network that answers as the judged one does near its images, learnt from answers alone: Papernot et al. 2017.

Whatever the judged model's gradients say, the borders between its answers are where they are, and a network that has
learnt them has gradients that lead there. It is asked about training images, about noise of several kinds around them
(alike in all channels, coarse, both), and about images that fool what was learnt so far.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustness.attacks import mi_fgsm
from robustness.data import Bytes
from robustness.geometry import project, steepest, to_uint8
from robustness.models import ResNet18, frozen, to_float
from robustness.progress import Track, silent
from robustness.seeds import derived_seed, generator
from robustness.threat import Threat

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
        if max(x.shape[2:]) > SIDE:
            x = functional.interpolate(x, size=(SIDE, SIDE), mode="area")
        logits: Tensor = self.net(2 * x - 1)
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
    images: Bytes,
    threat: Threat,
    *,
    answers: int,
    seed: int,
    device: torch.device,
    track: Track = silent,
) -> Learnt:
    """Train a substitute on at most `answers` of the labels that `decide` gives.

    decide: float images `(N, C, H, W)` to logits `(N, K)`. images: uint8 `(n, H, W, C)`, not those that are judged.
    threat: how far around them it is asked, as bytes.
    Its randomness comes from `seed` alone.
    """
    stream = generator(seed, "substitute", device=device)
    count = min(len(images), max(1, answers // PARTS))
    chosen = torch.randperm(len(images), generator=generator(seed, "substitute", "images"))[:count]
    x = to_float(torch.from_numpy(images)[chosen]).to(device)
    first = _labels(decide, x)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(seed, "substitute", "weights"))
        model = Substitute(x.shape[1], int(first[1])).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    asked, labels = [x], [first[0]]
    for number in track(range(ROUNDS), "substitute", ROUNDS):
        new = [_around(x, threat, stream)]
        if number:
            with frozen(model):
                fooling = mi_fgsm(model, x, labels[0], threat, generator=stream, steps=STEPS)
            new.append(to_uint8(fooling, x, threat).float() / 255)
        asked += new
        labels += [_labels(decide, part)[0] for part in new]
        _train(model, optimizer, torch.cat(asked), torch.cat(labels), stream)
    model.eval().requires_grad_(False)
    everything, truth = torch.cat(asked), torch.cat(labels)
    agreement = float((_labels(model, everything)[0] == truth).float().mean())
    return Learnt(model, len(truth), agreement)


def _labels(decide: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, int]:
    """The labels `(N,)` that it gives, and K."""
    with torch.no_grad():
        logits = torch.cat([decide(part) for part in x.split(BATCH)])
    return logits.argmax(dim=1).to(x.device), logits.shape[1]


def _around(x: Tensor, threat: Threat, stream: torch.Generator) -> Tensor:
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
    return to_uint8(project(x + length * steepest(noise, threat.norm), x, threat), x, threat).float() / 255


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, stream: torch.Generator
) -> None:
    model.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=stream, device=x.device).split(BATCH):
            if len(index) > 1:  # a batch norm needs two
                optimizer.zero_grad()
                functional.cross_entropy(model(x[index]), labels[index]).backward()
                optimizer.step()
    model.eval()
