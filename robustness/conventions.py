"""Conventions of preprocessing: what networks are used to being sent instead of what their contract says.

A network behind another convention than its contract names still answers, and is wrong: no attack tells that from a
bad model, but the same images under the convention that it was trained with do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.losses import right
from dfmcl.robustness.models import to_float
from dfmcl.robustness.portions import answered
from dfmcl.robustness.scale import PLAIN, PRESETS, Scale
from dfmcl.robustness.statistics import Flags, PairedCounts

Answer = Callable[[Tensor], Tensor]
"""Floats `(N, C, H, W)`, which under a convention may lie outside [0, 1], to logits `(N, K)`."""
Apply = Callable[[Tensor], Tensor]

IMAGES = 128  # one half chooses the convention, the other half judges it
FEW = 16  # of them at a time
FINAL = 3  # conventions that a quarter of the images leaves in the choice
RIGHT = 0.75  # of the images: a model that is right on so many is not asked further
LEVEL = 1e-4  # of the exact test that the model is no more often right under the convention than without it
# Of the odds of being right: 25 honest networks after one to eight epochs gained at most 1.7 on the images that judge,
# in three draws each; the one that is right on 98 % behind its own convention gained 87 and more.
GAIN = 4.0
# Of the way from always the commonest label to all right: where three numbers tell six classes apart, of 150 untrained
# linear maps one came as far as 0.46 under the best of all conventions.
USEFUL = 0.5

CIFAR10 = Scale(1, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MNIST = Scale(1, (0.1307,), (0.3081,))
INVERTED = Scale(1, (1,), (-1,))
# Images by which one that `--input` cannot say must be ahead: two that fit equally well differ by as many by chance.
AHEAD = 3
DIGITS = 4  # of the images' own mean and std, as `--input` will say them


@dataclass(frozen=True)
class Standardised:
    """Each image less its own mean, over its own deviation. tf.image.per_image_standardization."""

    order: str = "RGB"

    def __str__(self) -> str:
        return " ".join(["standardised one by one", *([self.order] if self.order != "RGB" else [])])

    def applied(self, x: Tensor) -> Tensor:
        """Pixels `(N, C, H, W)` as the network takes them."""
        flat = x.flatten(1)
        scale = flat.std(dim=1).clamp_min(flat.shape[1] ** -0.5)
        y = (x - flat.mean(dim=1).view(-1, 1, 1, 1)) / scale.view(-1, 1, 1, 1)
        return y if self.order == "RGB" else y.flip(1)


Convention = Scale | Standardised


@dataclass(frozen=True)
class Mismatch:
    """On `right` of `images` the model is right as its contract says, on `would` if they follow `convention`."""

    images: int
    right: int
    would: int
    convention: Convention

    def __str__(self) -> str:
        now, then = (f"{100 * count / self.images:.0f} %" for count in (self.right, self.would))
        return f"as `{self.words}` it is right on {then} of {self.images} images, as declared on {now}"

    @property
    def words(self) -> str:
        """The convention, as `--input` takes it where that can say it."""
        return str(self.convention) or "plain"


def conventions(images: Bytes) -> list[Convention]:
    """Every convention for images such as these uint8 `(N, H, W, C)`."""
    channels = images.shape[3]
    flat = images.reshape(-1, channels) / 255
    mean, std = flat.mean(axis=0).round(DIGITS), np.maximum(flat.std(axis=0).round(DIGITS), 1e-3)
    found: list[Convention] = [PRESETS["imagenet"], PRESETS["inception"], CIFAR10, MNIST, PRESETS["clip"]]
    found += [Scale(1, tuple(mean.tolist()), tuple(std.tolist())), Scale(255), Standardised(), INVERTED]
    fitting = [one for one in found if isinstance(one, Standardised) or {len(one.mean), len(one.std)} <= {1, channels}]
    if channels != 3 or (images == images[..., ::-1]).all():
        return [PLAIN, *fitting]
    fitting += [PLAIN, PRESETS["caffe"].turned()]
    return fitting + [Standardised("BGR") if isinstance(one, Standardised) else one.turned() for one in fitting]


def mismatch(
    answer: Answer, images: Bytes, labels: Labels, declared: InputContract, *, device: torch.device, bytes_only: bool
) -> Mismatch | None:
    """The convention under which a model is right where it is wrong by its contract; None where nothing speaks for one.

    On the first IMAGES of uint8 images `(N, H, W, C)`. Half of them choose the convention, the others judge it: the
    odds of being right must be GAIN times as high, more so than chance allows (exact paired test, McNemar 1947, at
    LEVEL), and the accuracy of some use (USEFUL).

    answer: the model behind its contract.
    declared: the contract; what its scale does is undone before another convention is tried.
    bytes_only: the model can be sent no floats outside [0, 1].
    """
    x, y = to_float(torch.from_numpy(images[:IMAGES])).to(device), torch.from_numpy(labels[:IMAGES])
    as_is = _right(answer, x, y)
    if as_is.mean() >= RIGHT:
        return None
    tried: dict[Convention, Apply] = {}
    for one in conventions(images[:IMAGES]):
        sent = partial(_through, one, declared.scale)
        if one != declared.scale and not (bytes_only and not all(_in_bytes(sent(part)) for part in x.split(FEW))):
            tried[one] = sent
    if not tried:
        return None
    half = len(y) // 2
    final = dict(islice(_best(answer, tried, x[: half // 2], y[: half // 2]).items(), FINAL))
    chosen = next(iter(_best(answer, final, x[:half], y[:half])))
    before, after = as_is[half:], _right(answer, x[half:], y[half:], tried[chosen])
    labelled = y[half:].numpy()
    n, now, then = len(labelled), int(before.sum()), int(after.sum())
    sure = PairedCounts.of(after, before).p_more_lost <= LEVEL
    gained = _odds(then, n) >= GAIN * _odds(now, n)
    commonest = int(np.bincount(labelled).max())
    useful = then - commonest >= USEFUL * (n - commonest)
    return Mismatch(n, now, then, chosen) if sure and gained and useful else None


def _through(convention: Convention, declared: Scale, x: Tensor) -> Tensor:
    """Images `(N, C, H, W)` that become under the declared scale what x becomes under the convention."""
    made = convention.applied(x)
    return made if declared == PLAIN else declared.undone(made)


def _in_bytes(x: Tensor) -> bool:
    return bool((x >= 0).all() and (x <= 1).all())


def _odds(k: int, n: int) -> float:
    """Of being right after k of n, half an image to either side: at 0 and at n they stay finite."""
    return (k + 0.5) / (n - k + 0.5)


def _best(answer: Answer, tried: Mapping[Convention, Apply], x: Tensor, y: Tensor) -> dict[Convention, Apply]:
    """The conventions, the one with the most images right first; of equals one to be declared."""
    counted = {one: int(_right(answer, x, y, sent).sum()) for one, sent in tried.items()} if len(y) else {}
    ahead = {one: AHEAD if isinstance(one, Standardised) else 0 for one in tried}
    return {one: tried[one] for one in sorted(tried, key=lambda one: ahead[one] - counted.get(one, 0))}


def _right(answer: Answer, x: Tensor, y: Tensor, sent: Apply = lambda x: x) -> Flags:
    flags: NDArray[np.bool_] = right(answered(lambda part: answer(sent(part)), x), y).numpy()
    return flags
