"""The same answer however one asks: again, in other company, in large batches, for gradients, late, in a new process.

The gate asks in its own way, and users ask in theirs. A model that knows the difference can resist the one and fall to
the other, so that any difference beyond rounding makes the evidence one about another model.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dfmcl.common.batch import most_asked, most_served
from dfmcl.robustness.diagnosis import LONE, REPEATS, Examination
from dfmcl.robustness.finding import Found
from dfmcl.robustness.models import frozen
from dfmcl.robustness.rules import differs, keeps_another

# Images in a batch: around each size at which a server, a cache or a script cuts, as far as the largest one goes.
BATCHES = (*range(2, 9), 16, 32, 33, 64, 65, 128, 129, 256, 257, 513, 1025)


def outputs_differ(e: Examination) -> Found:
    """The same images again, of the one that decides and of the model that gives gradients."""
    change = max(_change(e.answers(e.x), e.logits) for _ in range(REPEATS - 1))
    if e.model is not None:
        own = e.own_answers(e.x)
        change = max(change, *(_change(e.own_answers(e.x), own) for _ in range(REPEATS - 1)))
    return _changed(e, change, f"asked {REPEATS} times, the model gives the same image logits that differ by")


def batch_dependent(e: Examination) -> Found:
    """The same images in reverse order, some of them alone, and in batches of other sizes."""
    backwards = torch.cat([e.answers(part.flip(0)) for part in reversed(e.batches(e.x))])
    change = {"in reverse order": _change(backwards.flip(0), e.logits)}
    alone = torch.cat([e.answers(e.x[i : i + 1]) for i in range(min(LONE, len(e.x)))])
    change["alone"] = _change(alone, e.logits[:LONE])
    image = e.x[0].numel()
    sizes = {size for size in {*BATCHES, most_served(image)} if size <= min(most_asked(image), e.background.largest)}
    for size in sorted(sizes):
        copies = e.x[torch.arange(size, device=e.x.device) % len(e.x)]
        together = e.answers_together(copies)[: len(e.x)]
        change[f"in a batch of {size}"] = _change(together, e.logits[: len(together)])
    worst = max(change, key=lambda way: change[way])
    found = _changed(e, change[worst], f"{worst}, the model gives the same image logits that differ by")
    return replace(found, figures={**found.figures, "largest_batch": max(sizes, default=1)})


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
