"""Conventions of preprocessing: what networks are used to being sent instead of floats in [0, 1].

A network behind another convention than its contract names still answers, and is wrong: no attack tells that from a
bad model, but the same images under the convention that it was trained with do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.losses import right
from dfmcl.robustness.models import to_float
from dfmcl.robustness.statistics import Flags, PairedCounts

Answer = Callable[[Tensor], Tensor]
"""Floats `(N, C, H, W)`, which under a convention may lie outside [0, 1], to logits `(N, K)`."""
Convention = Callable[[Tensor], Tensor]

IMAGES = 128  # one half chooses the convention, the other half judges it
FINAL = 3  # conventions that a quarter of the images leaves in the choice
BATCH = 16
RIGHT = 0.75  # of the images: a model that is right on so many is not asked further
LEVEL = 1e-4  # of the exact test that the model is no more often right under the convention than without it
# Of the odds of being right: 25 honest networks after one to eight epochs gained at most 1.7 on the images that judge,
# in three draws each; the one that is right on 98 % behind its own convention gained 87 and more.
GAIN = 4.0
# Of the way from always the commonest label to all right: where three numbers tell six classes apart, of 150 untrained
# linear maps one came as far as 0.46 under the best of all conventions.
USEFUL = 0.5

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MNIST = ((0.1307,), (0.3081,))
CAFFE = tuple(value / 255 for value in (123.68, 116.779, 103.939))  # in the order R, G, B


@dataclass(frozen=True)
class Mismatch:
    """On `right` of `images` the model is right as its contract says, on `would` if they follow `convention`."""

    images: int
    right: int
    would: int
    convention: str

    def __str__(self) -> str:
        shares = (f"{100 * count / self.images:.0f} %" for count in (self.right, self.would))
        now, then = shares
        return (
            f"the model is right on {now} of {self.images} images as its contract says, and on {then} if they are"
            f" {self.convention}: unless it was hardly trained, its preprocessing differs from the contract; make it a"
            " first layer of the model, which takes pixels in [0, 1] as RGB"
        )


def conventions(images: Bytes) -> dict[str, Convention]:
    """Every convention for images such as these uint8 `(N, H, W, C)`, as the end of a sentence: they are ..."""
    channels = images.shape[3]
    flat = images.reshape(-1, channels) / 255
    own = (tuple(flat.mean(axis=0).tolist()), tuple(np.maximum(flat.std(axis=0), 1e-3).tolist()))
    scales = {
        "ImageNet's mean and std": IMAGENET,
        "a mean and std of 0.5": ((0.5,), (0.5,)),
        "CIFAR-10's mean and std": CIFAR10,
        "MNIST's mean and std": MNIST,
        "CLIP's mean and std": CLIP,
        "their own mean and std": own,
    }
    kept = {name: scale for name, scale in scales.items() if len(scale[0]) in (1, channels)}
    plain: dict[str, Convention] = {
        **{f"normalised with {name}": normalised(*scale) for name, scale in kept.items()},
        "given as numbers from 0 to 255": lambda x: 255 * x,
        "standardised one by one": standardised,
        "inverted": lambda x: 1 - x,
    }
    if channels != 3 or (images == images[..., ::-1]).all():
        return plain
    caffe = normalised(CAFFE, (1 / 255,) * 3)
    plain |= {"given as numbers from 0 to 255 less ImageNet's mean": caffe}
    turned: dict[str, Convention] = {"given in the order blue, green, red": lambda x: x.flip(1)}
    turned |= {f"{name}, in the order blue, green, red": _turned(convention) for name, convention in plain.items()}
    return plain | turned


def mismatch(
    answer: Answer, images: Bytes, labels: Labels, *, device: torch.device, bytes_only: bool
) -> Mismatch | None:
    """The convention under which a model is right where it is wrong by its contract; None where nothing speaks for one.

    On the first IMAGES of uint8 images `(N, H, W, C)`. bytes_only: the model can be sent no floats outside [0, 1].
    Half of them choose the convention, the others judge it: the odds of being right must be GAIN times as high,
    more so than chance allows (exact paired test, McNemar 1947, at LEVEL), and the accuracy of some use (USEFUL).
    """
    x, y = to_float(torch.from_numpy(images[:IMAGES])).to(device), torch.from_numpy(labels[:IMAGES])
    as_is = _right(answer, x, y)
    tried = {name: made for name, made in conventions(images[:IMAGES]).items() if not bytes_only or _in_bytes(made(x))}
    if as_is.mean() >= RIGHT or not tried:
        return None
    half = len(y) // 2
    final = dict(islice(_best(answer, tried, x[: half // 2], y[: half // 2]).items(), FINAL))
    chosen = next(iter(_best(answer, final, x[:half], y[:half])))
    before, after, labelled = as_is[half:], _right(answer, tried[chosen](x[half:]), y[half:]), y[half:].numpy()
    n, now, then = len(labelled), int(before.sum()), int(after.sum())
    sure = PairedCounts.of(after, before).p_more_lost <= LEVEL
    gained = _odds(then, n) >= GAIN * _odds(now, n)
    commonest = int(np.bincount(labelled).max())
    useful = then - commonest >= USEFUL * (n - commonest)
    return Mismatch(n, now, then, chosen) if sure and gained and useful else None


def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Convention:
    """(x - mean) / std for each channel."""

    def convention(x: Tensor) -> Tensor:
        centre, scale = (x.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return (x - centre) / scale

    return convention


def standardised(x: Tensor) -> Tensor:
    """Each image less its own mean, over its own deviation. tf.image.per_image_standardization."""
    flat = x.flatten(1)
    scale = flat.std(dim=1).clamp_min(flat.shape[1] ** -0.5)
    return (x - flat.mean(dim=1).view(-1, 1, 1, 1)) / scale.view(-1, 1, 1, 1)


def _turned(convention: Convention) -> Convention:
    return lambda x: convention(x).flip(1)


def _in_bytes(x: Tensor) -> bool:
    return bool((x >= 0).all() and (x <= 1).all())


def _odds(k: int, n: int) -> float:
    """Of being right after k of n, half an image to either side: at 0 and at n they stay finite."""
    return (k + 0.5) / (n - k + 0.5)


def _best(answer: Answer, tried: Mapping[str, Convention], x: Tensor, y: Tensor) -> dict[str, Convention]:
    """The conventions, the one with the most images right first."""
    counted = {name: int(_right(answer, made(x), y).sum()) for name, made in tried.items()} if len(y) else {}
    return {name: tried[name] for name in sorted(tried, key=lambda name: -counted.get(name, 0))}


def _right(answer: Answer, x: Tensor, y: Tensor) -> Flags:
    with torch.no_grad():
        logits = torch.cat([answer(part).detach().float().cpu() for part in x.split(BATCH)])
    flags: NDArray[np.bool_] = right(logits, y).numpy()
    return flags
