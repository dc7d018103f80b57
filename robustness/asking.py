"""The same answer however one asks: again, in other company, in large batches, for gradients, late, in a new process.

The gate asks in its own way, and users ask in theirs. A model that knows the difference can resist the one and fall to
the other, so that any difference beyond rounding makes the evidence one about another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dfmcl.common.batch import most_asked, most_served
from dfmcl.robustness.diagnosis import LONE, REPEATS, Examination
from dfmcl.robustness.finding import Found
from dfmcl.robustness.models import frozen, to_float
from dfmcl.robustness.rules import differs, keeps_another
from dfmcl.robustness.seeds import generator

# Images in a batch beyond the served ones: where a cache or a script cuts, as far as the largest one goes.
LARGER = (65, 128, 129, 256, 257, 513, 1025)
MIXED = 16  # images: as far as every size is asked with strangers among them, and then the largest that is served
FLAT = {"black": 0, "grey": 128, "white": 255}  # levels of images of one colour
FRAMES = (1, 2, 4, 8)  # levels of noise between an image and one that is nearly the same, as in a video


def outputs_differ(e: Examination) -> Found:
    """The same images again, of the one that decides and of the model that gives gradients."""
    change = max(_change(e.answers(e.x), e.logits) for _ in range(REPEATS - 1))
    if e.model is not None:
        own = e.own_answers(e.x)
        change = max(change, *(_change(e.own_answers(e.x), own) for _ in range(REPEATS - 1)))
    return _changed(e, change, f"asked {REPEATS} times, the model gives the same image logits that differ by")


def batch_dependent(e: Examination) -> Found:
    """The same images in reverse order, some of them alone, in batches of every size that is served and of larger ones,
    and in the company of strangers."""
    backwards = torch.cat([e.answers(part.flip(0)) for part in reversed(e.batches(e.x))])
    change = {"in reverse order": _change(backwards.flip(0), e.logits)}
    alone = torch.cat([e.answers(e.x[i : i + 1]) for i in range(min(LONE, len(e.x)))])
    change["alone"] = _change(alone, e.logits[:LONE])
    image = e.x[0].numel()
    most = min(most_asked(image), e.background.largest)
    sizes = [size for size in (*range(1, most_served(image) + 1), *LARGER) if size <= most]
    for size in sizes:
        change[f"in a batch of {size}"] = _among(e, torch.arange(size) % len(e.x))
    for company, (places, others) in _companies(e, sizes).items():
        change[f"beside {company}"] = _among(e, places, others)
    worst = max(change, key=lambda way: change[way])
    found = _changed(e, change[worst], f"{worst}, the model gives the same image logits that differ by")
    return replace(found, figures={**found.figures, "largest_batch": max(sizes, default=1)})


def _companies(e: Examination, sizes: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Batches with strangers among the images, by kind: one of a kind behind a few images, many of it around one,
    all kinds mixed. As `_among` takes them."""
    strangers, most = _strangers(e), max(sizes, default=1)
    if most < 2:
        return {}
    few = torch.arange(min(LONE, len(e.x), most - 1))
    labels = e.y.cpu()
    alike = torch.nonzero(e.correct & (labels == labels[e.correct].mode().values)).squeeze(1) if e.right else few[:0]
    found = {
        "copies of it": (torch.zeros(min(LONE, most), dtype=torch.int64), e.x[:0]),
        "images of its class alone": (alike[: min(LONE, most)], e.x[:0]),
    }
    for kind, images in strangers.items():
        found[f"one image that is {kind}"] = (torch.cat([few, torch.tensor([-1])]), images[:1])
        crowd = images[torch.arange(min(LONE, most - 1)) % len(images)]
        around = torch.full((len(crowd) + 1,), -1)
        around[len(crowd) // 2] = 0
        found[f"images that are {kind}"] = (around, crowd)
    mixed = torch.cat([*strangers.values()])
    served = [size for size in sizes if 1 < size < LARGER[0]]
    for size in dict.fromkeys((*served[: MIXED - 1], *served[-1:])):
        places = torch.arange(size) // 2 % len(e.x)
        places[1::2] = -1
        found[f"strangers in a batch of {size}"] = (places, mixed[(torch.arange(size // 2) + size) % len(mixed)])
    return found


def _strangers(e: Examination) -> dict[str, Tensor]:
    """Images `(n, C, H, W)` that users send beside others, by their kind; attacked ones where gradients are."""
    shape = (LONE, *e.x.shape[1:])
    stream = generator(e.seed, "checks", "company")
    bytes_ = torch.randint(0, 256, shape, generator=stream)
    flat = {kind: torch.full((1, *shape[1:]), level / 255) for kind, level in FLAT.items()}
    ours = (255 * e.x[:LONE].cpu()).round()
    up = 2 * torch.randint(0, 2, ours.shape, generator=stream) - 1
    levels = torch.tensor(FRAMES).repeat(LONE)[: len(ours)].view(-1, 1, 1, 1)
    found = {**flat, "noise": bytes_ / 255, "nearly one of them": (ours + levels * up).clamp(0, 255) / 255}
    if e.background.training is not None:
        found["of the training part"] = to_float(torch.from_numpy(e.background.training[0][:LONE]))
    if e.model is not None and e.right:
        found["attacked"] = to_float(torch.from_numpy(e.adversarial[:LONE]))
    return {kind: images.to(e.x) for kind, images in found.items()}


def _among(e: Examination, places: Tensor, others: Tensor | None = None) -> float:
    """The change of images in one batch: places `(B,)` of them among the examined ones, -1 for each of the others by
    turns."""
    ours = places >= 0
    batch = e.x[places.clamp_min(0).to(e.x.device)]
    if others is not None:
        batch[~ours.to(e.x.device)] = others
    return _change(e.answers_together(batch)[ours], e.logits[places[ours]])


def grad_mode_matters(e: Examination) -> Found:
    """The model that gives gradients, with autograd recording, for its weights too, without, and in inference mode."""
    assert e.model is not None, "needs gradients"
    expected = e.own_answers(e.x)
    with torch.enable_grad(), frozen(e.model):
        for parameter in e.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        recorded = torch.cat([e.model(part.detach().requires_grad_()).detach().float().cpu() for part in e.parts(e.x)])
    with torch.inference_mode():
        inferred = torch.cat([e.model(part.clone()).float().cpu() for part in e.parts(e.x)]).clone()
    change = max(_change(recorded, expected), _change(inferred, expected))
    return _changed(e, change, "with autograd on and off, the model gives the same image logits that differ by")


def answers_change(e: Examination) -> Found:
    """At the end of all calls, and in a process of its own: clean and attacked images mixed, in another order."""
    recalled = e.background.recalled
    if recalled is None:
        return Found("not_run", "nobody kept the answers of the attacks to compare with")
    images, logits = recalled
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(e.seed))
    expected, asked = torch.from_numpy(logits)[mixed], images[mixed.numpy()]
    again = torch.cat([e.answers(part) for part in e.floats(asked)])
    change = {"asked again at the end": _change(again, expected)}
    if e.background.afresh is not None:
        change["asked in a new process"] = _change(torch.from_numpy(e.background.afresh(asked)), expected)
    worst = max(change, key=lambda way: change[way])
    return _changed(e, change[worst], f"{worst}, the model gives the same image logits that differ by")


def state_changes(e: Examination) -> Found:
    """The state of a module, before and after one more question that it was asked already."""
    state = e.background.state
    if state is None:
        return Found("not_run", "nobody can see what the model keeps from one question to the next")
    few = e.x[:LONE]
    e.answers(few)  # what fills a cache at the first question of its kind has filled it
    before = state()
    e.answers(few)
    after = state()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    figures = {"changed": len(changed), "places": len(before.keys() | after.keys())}
    why = f"asked once more, it keeps what it kept, in {len(before)} places"
    if changed:
        why = f"asked the same once more, it keeps another {', '.join(changed[:5])}"
    return Found.by(keeps_another, why, figures)


def _changed(e: Examination, change: float, said: str) -> Found:
    spread = float(e.finite.std())
    relative = change / spread if spread else (float("inf") if change else 0.0)
    figures = {"largest_difference": change, "relative_to_spread": relative}
    return Found.by(differs, f"{said} {relative:.2g} of their spread", figures)


def _change(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits `(N, K)`; an image whose logits are finite on neither side shows none."""
    either = found.isfinite().all(dim=1) | expected.isfinite().all(dim=1)
    return largest((found - expected)[either]) if either.any() else 0.0


def largest(difference: Tensor) -> float:
    """The largest absolute value; inf where one is no number."""
    value = float(difference.abs().max())
    return value if math.isfinite(value) else float("inf")
