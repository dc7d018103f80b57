"""Honest networks of many kinds, trained in seconds by a plain loop: other layers, images and numbers of classes.

None of them comes from the project's own trainer, whose networks `benchmarks/checks.py` looks at as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dfmcl.robustness.attacks.registry import pgd
from dfmcl.robustness.data import Bytes, Dataset, Labels
from dfmcl.robustness.models import frozen, to_float
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.linf import Linf

EPOCHS, BATCH, LEARNING_RATE = 6, 64, 3e-3
HARD = Linf(16 / 255)
FEW = {"two": 2, "three": 3}  # classes


def plain(channels: int, classes: int, activation: Callable[[], nn.Module], norm: bool, pool: bool) -> nn.Module:
    """Four convolutions, the second and fourth halve the sides; a linear layer on top."""

    def layer(inputs: int, maps: int, halved: bool) -> list[nn.Module]:
        stride = 2 if halved and not pool else 1
        parts: list[nn.Module] = [nn.Conv2d(inputs, maps, 3, stride, 1, bias=not norm)]
        parts += [nn.BatchNorm2d(maps)] if norm else []
        return [*parts, activation(), *([nn.MaxPool2d(2)] if halved and pool else [])]

    body = [*layer(channels, 12, False), *layer(12, 24, True), *layer(24, 24, False), *layer(24, 48, True)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, classes))


@dataclass(frozen=True)
class Kind:
    """activation, norm, pool: of the network; images: what becomes of the digits; hardened: by two steps of PGD.

    radius: in 255ths, at which it is looked at.
    """

    activation: Callable[[], nn.Module] = nn.ReLU
    norm: bool = True
    pool: bool = False
    images: str = "digits"
    hardened: bool = False
    radius: int = 4


KINDS: dict[str, Kind] = {
    "ReLU": Kind(),
    "SiLU": Kind(nn.SiLU),
    "GELU": Kind(nn.GELU),
    "hard swish": Kind(nn.Hardswish),
    "max-pooling": Kind(pool=True),
    "no batch norm": Kind(norm=False),
    "one channel": Kind(images="grey"),
    "2 classes": Kind(images="two"),
    "3 classes": Kind(images="three"),
    "100 classes": Kind(images="pairs"),
}
KINDS |= {f"{name}, hardened": replace(kind, hardened=True, radius=16) for name, kind in KINDS.items()}


def seen_as(kind: str, digits: Dataset) -> Dataset:
    """The digits as they are, in one channel, two or three classes of them, or two beside each other as 100 classes."""
    if kind == "grey":
        return replace(digits, x_train=digits.x_train[..., :1].copy(), x_test=digits.x_test[..., :1].copy())
    if kind in FEW:
        train, test = digits.y_train < FEW[kind], digits.y_test < FEW[kind]
        return replace(
            digits,
            x_train=digits.x_train[train],
            y_train=digits.y_train[train],
            x_test=digits.x_test[test],
            y_test=digits.y_test[test],
            classes=digits.classes[: FEW[kind]],
        )
    if kind == "pairs":
        x_train, y_train = _paired(np.asarray(digits.x_train), digits.y_train, 6000)
        x_test, y_test = _paired(np.asarray(digits.x_test), digits.y_test, 400)
        names = tuple(f"{first} {second}" for first in digits.classes for second in digits.classes)
        return replace(digits, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=names)
    return digits


def _paired(images: Bytes, labels: Labels, count: int) -> tuple[Bytes, Labels]:
    left, right = np.random.default_rng(0).integers(len(images), size=(2, count))
    return np.concatenate([images[left], images[right]], axis=2), 10 * labels[left] + labels[right]


def learnt(kind: Kind, data: Dataset, seed: int) -> nn.Module:
    """A network of that kind, trained on the data's training part; float images in [0, 1] to logits."""
    stream = generator(seed, "honest")
    torch.manual_seed(seed)
    network = plain(data.x_train.shape[-1], len(data.classes), kind.activation, kind.norm, kind.pool)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    x, y = to_float(torch.from_numpy(data.x_train)), torch.from_numpy(data.y_train)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=stream).split(BATCH):
            if len(index) > 1:
                _step(network, optimizer, x[index], y[index], kind.hardened, stream)
    return network.eval().requires_grad_(False)


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, hardened: bool, stream: torch.Generator
) -> None:
    if hardened:
        with frozen(network):
            x = pgd(network, x, y, HARD, generator=stream, steps=2, keep="last")
    network.train()
    optimizer.zero_grad()
    functional.cross_entropy(network(x), y).backward()
    optimizer.step()
