"""Does the model know these very images? What it remembers proves nothing about the images of tomorrow."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dfmcl.robustness.data import Bytes
from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.finding import Found, too_many
from dfmcl.robustness.image_set import Images, held_at_once
from dfmcl.robustness.losses import margin, right
from dfmcl.robustness.rules import (
    FRAGILE,
    MOVED,
    REPEATED,
    STEPS,
    WORSE,
    Figures,
    are_known_alone,
    resist_here_alone,
    were_seen,
)

# An image hangs by a thread where it is right by less than so many ordinary moves of noise, which in a network without
# a step all images that it loses are, and by less than this share of the median.
MOVES, THREAD = 4.0, 0.5
SIDE = 32  # a shift is one pixel for each so many of the side, at least one
# Smaller images are shifted by a part of one: honest networks on digits of 8 x 8 lose half of them to a whole one.
SMALL = 16
DIMMED = 0.9
ELSEWHERE = 64  # training images that are attacked beside the judged ones


def seen_images(e: Examination) -> Found:
    """By what training says of its data, and by copies among the images."""
    run, data = e.about.get("run", {}), e.about.get("data", {})
    trained, judged = run.get("data"), data.get("sha256")
    count = len(e.y) if e.evaluation is None else len(e.evaluation.correct)
    copies = int(data.get("copies", 0))
    if copies > REPEATED * count:
        twice = {"copies": copies, "images": count}
        return Found.by(were_seen, f"{copies} of {count} images are copies of others among them", twice)
    if not trained or not judged:
        return Found("not_run", "nobody says on which data the model was trained")
    part, parts = data.get("part", "test"), tuple(run.get("parts", ("train",)))
    repeated = int(data.get("in_training", 0))
    if trained != judged:
        return Found("not_run", "the model was trained on other data, which nobody compared with these images")
    figures: Figures = {"part": part, "trained_on": ", ".join(parts), "in_training": repeated, "images": count}
    why = f"the model was trained on other images than these {count}"
    if part in parts:
        why = f"the images are of the part {part!r} of the data that the model was trained on"
    elif were_seen(figures):
        why = f"{repeated} of {count} images are training images as well"
    return Found.by(were_seen, why, figures)


def only_exact_images(e: Examination) -> Found:
    """One grey level of random noise, up or down in every value; images that were right by a thread do not count."""
    y = e.y.cpu()
    noisy = e.under_noise(e.threat.diameter(e.x[0].numel()) / 255)
    lost = e.correct & ~right(noisy, y)
    counted = lost & ~by_a_thread(-margin(e.logits, y), -margin(noisy, y), e.correct, lost)
    return too_many(
        {"a grey level of random noise": (int(counted.sum()), e.right)}, "breaks images that are right", FRAGILE
    )


def by_a_thread(clean: Tensor, noisy: Tensor, correct: Tensor, lost: Tensor) -> Tensor:
    """Which images `(n,)` were right by less than noise ordinarily moves: a fact of labels, not of a memory.

    clean, noisy: by how much each is right, without and with noise. Ordinary is the median move of the images that
    hold. Of a memory the images that fall were as far from the border as the others, so that at most THREAD of the
    median on all images that are right is a thread.
    """
    held = correct & ~lost
    if not held.any():
        return torch.zeros_like(lost)
    ordinary = (noisy - clean)[held].abs().median()
    return clean < torch.minimum(MOVES * ordinary, THREAD * clean[correct].median())


def only_these_images(e: Examination) -> Found:
    """Images of the training part, and these images shifted and dimmed: light changes that keep the class."""
    answers = [{way: e.answers(x) for way, x in lightly(part).items()} for part in e.batches(e.x)]
    moved = {
        way: (int((e.correct & ~right(torch.cat([part[way] for part in answers]), e.y.cpu())).sum()), e.right)
        for way in answers[0]
    }
    found = too_many(moved, "breaks images that are right", MOVED)
    if found.outcome == "raised" or e.background.training is None:
        return found
    images, labels = e.background.training
    known = right(torch.cat([e.answers(part) for part in e.floats(images)]), torch.from_numpy(labels))
    figures = {"right": e.right, "images": len(e.y), "right_in_training": int(known.sum()), "training": len(known)}
    why = f"it is right on {e.right} of these {len(e.y)} images, and on {int(known.sum())} of {len(known)} of training"
    return Found.by(are_known_alone, why, figures)


def resists_only_here(e: Examination) -> Found:
    """PGD on training images too: an attacker meets users' images, not the judged ones.

    A model whose resistance lies around the judged images is right on others as well, so that only an attack tells.
    The judged images after a shift tell nothing: honest networks of many classes lose their margins there.
    """
    if e.background.training is None:
        return Found("not_run", "there are no training images to compare with")
    kept = int((~e.pgd).sum())
    here: Figures = {"held": kept, "images": e.right}
    said = f"PGD-{STEPS} leaves {kept} of {e.right} images"
    if kept < WORSE * e.right:
        return Found.by(resist_here_alone, f"{said}, too few to tell", {**here, "held_elsewhere": 0, "elsewhere": 0})
    images, labels = e.background.training
    chosen = np.linspace(0, len(images) - 1, min(len(images), ELSEWHERE)).round().astype(np.int64)
    held, others = e.held_of(images[chosen], labels[chosen])
    figures: Figures = {**here, "held_elsewhere": held, "elsewhere": others}
    return Found.by(resist_here_alone, f"{said}, and {held} of {others} of training", figures)


def lightly(x: Tensor) -> dict[str, Tensor]:
    """By name, images `(N, C, H, W)` after changes that no classifier should mind, on the uint8 grid."""
    height, width = x.shape[2:]
    pixels, part = max(1, min(height, width) // SIDE), min(1.0, min(height, width) / SMALL)
    wide = functional.pad(x, (pixels, pixels, pixels, pixels), mode="replicate")
    named = f"a shift by {pixels * part:g} pixel{'s' * (pixels > 1)}"
    left = wide[:, :, pixels : pixels + height, 2 * pixels : 2 * pixels + width]
    down = wide[:, :, :height, pixels : pixels + width]
    return {
        f"{named} to the left": _bytes(x + part * (left - x)),
        f"{named} downwards": _bytes(x + part * (down - x)),
        f"light times {DIMMED:g}": _bytes(x * DIMMED),
    }


def _bytes(x: Tensor) -> Tensor:
    return (x * 255).round() / 255


def repeated(images: Bytes, training: Images) -> int:
    """How many of the images `(n, H, W, C)` are among the training images, byte for byte; few are held at once."""
    parts = held_at_once(training, np.arange(len(training))) if len(training) else []
    known = {_digest(image) for part in parts for image in training[part]}
    return sum(_digest(image) in known for image in images)


def copies(images: Images, index: NDArray[np.int64]) -> int:
    """How many of the images at `index` repeat one before them, byte for byte; they count twice."""
    parts = held_at_once(images, index)
    return len(index) - len({_digest(image) for part in parts for image in images[part]})


def _digest(image: Bytes) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
