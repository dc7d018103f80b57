"""The questions behind the checks: each turns an examination into a finding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from dfmcl.robustness.asking import largest
from dfmcl.robustness.attacks.suites import RELAXED, WITHOUT_GRADIENTS
from dfmcl.robustness.diagnosis import QUERYING, Examination
from dfmcl.robustness.finding import Found, first_look, hopeless, surplus, too_many
from dfmcl.robustness.losses import right
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.rules import (
    DISAGREE,
    ENOUGH,
    FEW_STEPS,
    MISLED,
    ROUNDED,
    STEPS,
    TOLERATED,
    UNACCOUNTED,
    UNEXPLAINED,
    any_at_all,
    are_flat,
    are_hidden,
    are_probabilities,
    have_no_use,
    mislead,
    outlast,
    still_rises,
)
from dfmcl.robustness.statistics import Flags, lower_bound

ASTRAY = 0.2  # of the promise over the longer step, where the shorter one keeps it: waves between levels bring 0.01
# They do without the model's gradients, or keep to where the data lie.
OTHERWISE = (*WITHOUT_GRADIENTS, "subspace")
# It breaks what a score-based search breaks, and more, at every scale of the logits; PGD alone need not.
STRONG = ("apgd-t", RELAXED)
BALL_FREE = ("cw-l2",)  # it looks for the nearest adversarial image, wherever that lies


def probabilities(e: Examination) -> Found:
    """Nonnegative outputs that add up to 1."""
    lowest = float(e.finite.min())
    off = largest(e.finite.sum(dim=1) - 1)
    figures = {"smallest_output": lowest, "largest_distance_of_sum_from_1": off}
    why = f"outputs are no probabilities: the smallest is {lowest:.3g}"
    if are_probabilities(figures):
        why = "all outputs lie in [0, 1] and add up to 1: they are probabilities, not logits"
    return Found.by(are_probabilities, why, figures)


def flat_outputs(e: Examination) -> Found:
    """Right far more often than its softmax believes, which is hardly anything."""
    chance = 1 / e.logits.shape[1]
    believed = (float(e.finite.softmax(dim=1).amax(dim=1).mean()) - chance) / (1 - chance)
    right = (lower_bound(e.right, len(e.y), 0.999) - chance) / (1 - chance)
    figures = {"mean_confidence_above_chance": believed, "accuracy_above_chance_lower_bound": right}
    said = f"the softmax goes {100 * believed:.2g} % of the way from an even guess to certainty, accuracy at least"
    return Found.by(are_flat, f"{said} {100 * max(right, 0):.3g} %", figures)


def bad_gradients(e: Examination) -> Found:
    """Zero, not finite, or absurdly large."""
    size = e.slopes.loss
    finite = size.isfinite()
    none, broken = int((size == 0).sum()), int((~finite).sum())
    largest = float(size[finite].max()) / 255 if finite.any() else float("inf")
    figures: dict[str, float | str] = {"images": e.right, "zero": none, "not_finite": broken, "largest": largest}
    why = f"the gradient is zero on {none} of {e.right} images, and finite everywhere"
    if broken:
        why = f"the gradient is not finite on {broken} of {e.right} images"
    elif have_no_use({**figures, "largest": 0.0}):
        why = f"the gradient of the cross-entropy is exactly zero on {none} of {e.right} images: gradient attacks stand"
        why = f"{why} still there"
    elif have_no_use(figures):
        why = f"by the gradient, one grey level would cost {largest:.2g} nats"
    return Found.by(have_no_use, why, figures)


def gradients_mislead(e: Examination) -> Found:
    """A small step along the gradient, against the promise of the gradient; a deep network may need a shorter one."""
    usable = (e.slopes.predicted > 0) & e.slopes.predicted.isfinite()
    if not usable.any():
        return Found("not_run", "no image has a gradient")
    ratios = (e.slopes.happened / e.slopes.predicted[:, None])[usable].median(dim=0).values
    longer, shorter = ratios.tolist()
    ratio = shorter if ASTRAY <= longer <= 1 / ASTRAY else longer
    ratio = longer if MISLED <= longer <= 1 / MISLED else ratio
    figures = {"images": int(usable.sum()), "median_happened_over_predicted": ratio}
    said = f"a small step along the gradient moves the margin by {ratio:.3g} of what the gradient promises"
    return Found.by(mislead, f"{said} (median)", figures)


def unaccounted(e: Examination) -> Found:
    """Along segments to noise, to fewer grey levels, to attacked images, to other images, and to points that fool other
    networks."""
    ways: dict[str, tuple[int, int]] = {}

    def is_open(way: str) -> bool:
        return way not in ways or not hopeless(*ways[way], e.segments, UNACCOUNTED, len(ways))

    for shares in e.unexplained(UNEXPLAINED, is_open):
        for way, share in shares.items():
            k, n = ways.get(way, (0, 0))
            ways[way] = k + int((share > UNEXPLAINED).sum()), n + len(share)
    return too_many(ways, f"gradients leave more than {UNEXPLAINED:g} of the change unexplained", UNACCOUNTED)


def fgsm_beats_pgd(e: Examination) -> Found:
    return _beats_pgd("FGSM", e.fgsm, e)


def weaker_with_steps(e: Examination) -> Found:
    return _beats_pgd(f"PGD-{FEW_STEPS}", e.few_steps, e)


def weaker_with_eps(e: Examination) -> Found:
    missed = int((e.pgd & ~e.wider(e.pgd)).sum())
    return surplus(f"eps {e.threat.label}", "twice that", missed, lambda: int(e.wider(~e.pgd).sum()), e.right)


def unlimited_fails(e: Examination) -> Found:
    """Without a limit the images can become anything, and the attack must find something."""
    held = int((~e.unlimited).sum())
    why = f"{held} of {e.right} images hold against PGD-{STEPS} at {e.everything}, which allows any change"
    return Found.by(outlast, why, {"held": held, "images": e.right})


def scale_hides(e: Examination) -> Found:
    """The same attack on a tenth and on ten times the logits, which give the same answers.

    Cross-entropy is weaker on the logits of an honest network that is unsure of everything: nothing is hidden where an
    attack of the suite that no scale misleads has seen it.
    """
    found = []
    for factor in (0.1, 10.0):
        way, rescaled = f"PGD-{STEPS} on logits x {factor:g}", partial(e.rescaled, factor)
        fell = rescaled(~e.pgd)
        more = surplus(
            way, "the same on the logits", int(fell.sum()), partial(_only_pgd, rescaled, e), e.right, shares=2
        )
        if more.outcome == "raised" and e.evaluation is not None and _has_strong(e.evaluation):
            left = _left_by(e.evaluation, e)
            missed, figures = int((fell & left).sum()), {**more.figures, "left": int(left.sum())}
            figures["missed"] = missed
            more = Found.by(are_hidden, f"{more.why}; {missed} of {figures['left']} that the suite left", figures)
        found.append(more)
    return max(found, key=lambda one: (one.outcome == "raised", one.figures.get("only_weaker", 0)))


def loss_still_rising(e: Examination) -> Found:
    """How much of what PGD gained on the margin came in the last quarter of its steps, on the images that held."""
    best = torch.from_numpy(np.fmax.accumulate(e.trace.numpy(), axis=0))[:, ~torch.from_numpy(e.pgd)]
    gain = best[-1] - best[0]
    usable = (gain > 0) & gain.isfinite()
    count = int(usable.sum())
    if count < ENOUGH:
        return Found.by(still_rises, f"too few images held while their loss rose: {count}", {"images": count})
    late = float(((best[-1] - best[3 * STEPS // 4]) / gain)[usable].median())
    said = (
        f"the last quarter of PGD-{STEPS}'s steps brought {100 * late:.3g} % of what it gained on the margin (median)"
    )
    figures = {"images": count, "median_share_in_last_quarter": late}
    return Found.by(still_rises, said, figures)


def black_box_stronger(e: Examination) -> Found:
    """Square on what PGD left; Square in the suite and attacks from other models on what the suite's white box left."""
    querying = e.querying if e.model is not None else ()
    ways = {f"{QUERYING[name]} queries of {name} (PGD-{STEPS})": _queried(name, e) for name in querying}
    ways |= _black_box_in(e.evaluation) if e.evaluation is not None else {}
    ways |= {
        f"transfer from {other.about.get('surrogate', 'another model')} (the suite)": _flipped_by_transfer(
            e.evaluation, other
        )
        for other in e.transfer
        if e.evaluation is not None and _has_strong(e.evaluation)
    }
    return too_many(ways, "break images that white-box attacks left", TOLERATED)


def cr_is_blind(e: Examination) -> Found:
    """Attacks along the gradient of the suite, and PGD here, on what constraint relaxation left."""
    assert e.evaluation is not None, "needs a record"
    names = [record.name for record in e.evaluation.attacks]
    place = next((place for place, name in enumerate(names) if name.startswith(RELAXED)), None)
    if place is None:
        return Found("not_run", f"the suite has no {RELAXED}")
    relaxed, *later = e.evaluation.attacks[place:]
    left = np.array(relaxed.held) & np.array(e.evaluation.correct)
    ways = {f"PGD-{STEPS}": _broken_of(_of_those_right(left, e), e.pgd)}
    for record in later:
        if not _otherwise(record):
            seen = left & np.array(record.tried)
            ways[f"{record.name} (the suite)"] = _broken_of(seen, ~np.array(record.held))
    return too_many(ways, f"breaks images that {relaxed.name} left", TOLERATED)


def found_and_dropped(e: Examination) -> Found:
    """Points on which the model that gives gradients errs, and the answer that counts never did."""
    assert e.evaluation is not None, "needs a record"
    counted = [one for one in e.evaluation.attacks if one.unconfirmed is not None and not one.transferred]
    if not counted:
        return Found("not_run", "no attack of the record counts what it dropped")
    ways = {record.name: (record.unconfirmed or 0, sum(record.tried)) for record in counted}
    return too_many(ways, "found adversarial images that did not count", ROUNDED)


def artefact_disagrees(e: Examination) -> Found:
    """Labels of PGD's images by the model that gives gradients, and by the one whose answers count.

    Where roundings lie between the two, only labels that the model prefers by more than these may cost.
    """
    own = torch.cat([e.own_answers(part) for part in e.floats(e.adversarial)])
    counted = e.adversarial_logits.argmax(dim=1, keepdim=True)
    apart = int((own.amax(dim=1) - own.gather(1, counted).squeeze(1) > e.rounding).sum())
    return too_many({"model and artefact": (apart, len(own))}, "give different labels to adversarial images", DISAGREE)


def outside_ball(e: Examination) -> Found:
    assert e.evaluation is not None, "needs a record"
    outside = {record.name: record.outside for record in e.evaluation.attacks if not record.name.startswith(BALL_FREE)}
    figures = {f"outside_{name}": count for name, count in outside.items()}
    guilty = [f"{name} ({count})" for name, count in outside.items() if count]
    why = "every image that was tried lies in the ball, as it was counted"
    if guilty:
        why = f"attacks ended outside the ball, or nowhere: {', '.join(guilty)}"
    return Found.by(any_at_all, why, figures)


def cliff_beyond_ball(e: Examination) -> Found:
    noisy = ~right(e.under_noise(e.beyond), e.y.cpu())[e.correct].numpy()
    alone = int((noisy & ~e.pgd).sum())
    way = f"random noise of {e.beyond / e.threat.eps:.3g} eps"
    return surplus(way, f"PGD-{STEPS} at eps", alone, lambda: int((e.pgd & ~noisy).sum()), e.right)


def _beats_pgd(name: str, attack: Callable[[Flags], Flags], e: Examination) -> Found:
    """An attack beside PGD: first on the images that PGD left, because only what falls there can raise the check."""
    return surplus(name, f"PGD-{STEPS}", int(attack(~e.pgd).sum()), partial(_only_pgd, attack, e), e.right)


def _only_pgd(attack: Callable[[Flags], Flags], e: Examination) -> int:
    """How many of the images that PGD broke another attack leaves."""
    return int((e.pgd & ~attack(e.pgd)).sum())


def _queried(name: str, e: Examination) -> tuple[int, int]:
    """Of how many images that PGD left (second) a few black-box queries broke how many (first)."""
    k, n, left = 0, 0, int((~e.pgd).sum())
    if not left:
        return 0, 0
    for fell in e.queried(name, first_look(left, TOLERATED, len(e.querying))):
        k, n = k + int(fell.sum()), n + len(fell)
        if hopeless(k, n, left, TOLERATED, len(e.querying)):
            break
    return k, n


def _black_box_in(evaluation: Evaluation) -> dict[str, tuple[int, int]]:
    """For each attack of the suite without the model's gradients, or within a subspace: how many it broke of
    the images that the others tried and left.

    Only where a strong one was among them.
    """
    white = [record for record in evaluation.attacks if not _otherwise(record)]
    fell, tried = (np.zeros(len(evaluation.correct), bool) for _ in range(2))
    for record in white:
        fell |= np.array(record.tried) & ~np.array(record.held)
        if _is_strong(record):
            tried |= np.array(record.tried)
    found = {}
    for record in evaluation.attacks:
        if _otherwise(record):
            left = np.array(record.tried) & tried & ~fell
            found[f"{record.name} (the suite)"] = (int((left & ~np.array(record.held)).sum()), int(left.sum()))
    return found


def _otherwise(record: AttackRecord) -> bool:
    return record.transferred or record.name.startswith(OTHERWISE)


def _flipped_by_transfer(evaluation: Evaluation | None, transfer: Evaluation) -> tuple[int, int]:
    assert evaluation is not None, "compared with a record"
    return _broken_of(np.array(evaluation.robust_images), ~np.array(transfer.robust_images))


def _left_by(evaluation: Evaluation, e: Examination) -> Flags:
    """Which of the images that are right the suite left `(M,)`; images that it never saw do not count."""
    return _of_those_right(np.array(evaluation.robust_images), e)


def _of_those_right(flags: Flags, e: Examination) -> Flags:
    """Of the record's flags `(N,)` those of the examined images that are right `(M,)`; False where it has none."""
    known = np.zeros(len(e.y), bool)
    known[: len(flags)] = flags[: len(e.y)]
    chosen: Flags = known[e.correct.numpy()]
    return chosen


def _broken_of(left: Flags, fell: Flags) -> tuple[int, int]:
    return int((left & fell).sum()), int(left.sum())


def _has_strong(evaluation: Evaluation) -> bool:
    return any(_is_strong(record) for record in evaluation.attacks)


def _is_strong(record: AttackRecord) -> bool:
    return record.name.startswith(STRONG)


def is_finite(value: float | str) -> bool:
    return isinstance(value, str) or bool(np.isfinite(value))
