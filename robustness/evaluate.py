"""The frame around attacks: it looks at what they return, checks the ball, classifies again, and counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustness.attacks import Attack
from robustness.data import Bytes, Labels
from robustness.errors import BadInput
from robustness.geometry import contains, contains_uint8, project, steepest, to_uint8
from robustness.models import Classifier, exactly, frozen, to_bytes, to_float
from robustness.progress import Track, silent
from robustness.records import AttackRecord, Evaluation
from robustness.seeds import generator
from robustness.threat import Threat

Decide = Callable[[Tensor], Tensor]
"""Float images `(N, C, H, W)` in [0, 1] to logits `(N, K)`: the artefact whose answer counts."""


@dataclass(frozen=True)
class Outcome:
    """An evaluation and the bytes behind it.

    adversarial: uint8 `(N, H, W, C)`, per image the one that flipped it, else the last one tried, else the image.
    """

    evaluation: Evaluation
    adversarial: Bytes
    clean_logits: np.ndarray[Any, np.dtype[np.float32]]
    adversarial_logits: np.ndarray[Any, np.dtype[np.float32]]


def evaluate(
    model: Classifier,
    images: Bytes,
    labels: Labels,
    threat: Threat,
    attacks: Sequence[Attack],
    *,
    decide: Decide | None = None,
    source: Classifier | None = None,
    grid: bool = False,
    cascade: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    about: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Outcome:
    """Attack `model` on uint8 images `(N, H, W, C)` and count, per image, what still holds.

    decide: whose answers count (default: the model itself, in float32). source: where gradients come from (default:
    the model; a surrogate for a transfer attack). grid: count only bytes inside the ball, eps rounded down to the
    uint8 grid. cascade: an attack sees only what earlier ones left, which is the worst case at less cost.
    A result outside the ball is counted as `outside`, never as a success; on the grid it is first brought to the
    nearest bytes inside the ball, which in Linf always exist.
    """
    if not len(images):
        raise BadInput("evaluate: no images; ask for at least one")
    started = time.perf_counter()
    threat = threat.on_grid() if grid else threat
    device = next(model.parameters()).device
    x_all, y_all = torch.from_numpy(images), torch.from_numpy(labels)
    decide = decide or exactly(model)
    source = source or model
    adversarial = images.copy()
    records: list[AttackRecord] = []
    with frozen(model), frozen(source):
        clean_logits = torch.cat([_answer(decide, to_float(x).to(device)) for x in _batches(batch_size, x_all)])
        correct = clean_logits.argmax(dim=1) == y_all
        adversarial_logits = clean_logits.clone()
        left = correct.clone()
        for attack in attacks:
            begun = time.perf_counter()
            tried = (left if cascade else correct).clone()
            held, outside = tried.clone(), 0
            where = torch.nonzero(tried).squeeze(1)
            chunks = list(_batches(batch_size, where))
            for number, index in enumerate(track(chunks, f"{attack.name} at {threat}", len(chunks))):
                x = to_float(x_all[index]).to(device)
                y = y_all[index].to(device)
                stream = generator(seed, attack.name, number, device=device)
                candidates = attack(source, x, y, threat, generator=stream)
                x_adv, logits, fooled, outside_ball = _judge(decide, candidates, x, y, threat, grid)
                outside += int(outside_ball.sum())
                newest = index[fooled | (~outside_ball & left[index])]
                chosen = torch.isin(index, newest)
                as_bytes = to_bytes(x_adv if grid else to_uint8(x_adv, x, threat)).cpu().numpy()
                adversarial[newest.numpy()] = as_bytes[chosen.numpy()]
                adversarial_logits[newest] = logits[chosen]
                held[index[fooled]] = False
                left[index[fooled]] = False
            seconds = time.perf_counter() - begun
            # In a cascade "held" means held so far, so that every record is an accuracy on all images.
            records.append(_record(attack, held if not cascade else left, tried, outside, seconds))
    evaluation = Evaluation(
        threat=threat,
        grid=grid,
        seed=seed,
        correct=tuple(correct.tolist()),
        attacks=tuple(records),
        seconds=time.perf_counter() - started,
        about=about or {},
    )
    return Outcome(evaluation, adversarial, clean_logits.numpy(), adversarial_logits.numpy())


def _judge(
    decide: Decide, candidates: Tensor, x: Tensor, y: Tensor, threat: Threat, grid: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What counts of an attack's result: images, logits, whether each fools and whether each is outside (on the CPU).

    Results are clipped to [0, 1] and, on the grid, brought to bytes inside the ball. An L2 attack that seeks the least
    perturbation ends at the border, where rounding to bytes flips it back half of the time; so there the same direction
    at the whole radius, which is the attacker's too, counts as well.
    """
    finite = candidates.detach().isfinite().flatten(1).all(dim=1)
    x_adv = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), candidates.detach(), x).clamp(0, 1)
    if not grid:
        return _decided(decide, x_adv, y, finite & contains(x_adv, x, threat))
    x_adv, logits, fooled, outside = _decided(decide, *_as_bytes(x_adv, x, y, threat, finite))
    if threat.norm == "l2":
        whole = project(x + threat.eps * steepest(candidates.detach() - x, "l2"), x, threat)
        other, other_logits, other_fooled, _ = _decided(decide, *_as_bytes(whole, x, y, threat, finite))
        better = other_fooled & ~fooled
        x_adv[better.to(x.device)], logits[better] = other[better.to(x.device)], other_logits[better]
        fooled, outside = fooled | better, outside & ~better
    return x_adv, logits, fooled, outside


def _as_bytes(x_adv: Tensor, x: Tensor, y: Tensor, threat: Threat, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    as_bytes = to_uint8(x_adv, x, threat)
    inside = contains_uint8(as_bytes, (x * 255).round().to(torch.uint8), threat)
    return as_bytes.to(torch.float32) / 255, y, finite & inside


def _decided(decide: Decide, x_adv: Tensor, y: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, inside = _answer(decide, x_adv), inside.cpu()
    return x_adv, logits, (logits.argmax(dim=1) != y.cpu()) & inside, ~inside


def _answer(decide: Decide, x: Tensor) -> Tensor:
    with torch.no_grad():
        return decide(x).detach().float().cpu()


def _batches(size: int, tensor: Tensor) -> Iterator[Tensor]:
    for begin in range(0, len(tensor), size):
        yield tensor[begin : begin + size]


def _record(attack: Attack, held: Tensor, tried: Tensor, outside: int, seconds: float) -> AttackRecord:
    return AttackRecord(
        attack.name, dict(attack.parameters), tuple(held.tolist()), tuple(tried.tolist()), outside, seconds
    )
