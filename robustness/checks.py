"""Reasons to disbelieve an evaluation: whatever makes attacks fail although the model does not resist.

Each check says when it is raised, why it was, and what to do. Most look at one thing that an honest model does not do
(Carlini et al. 2019, "On evaluating adversarial robustness", section 5; the flags of Croce & Hein's AutoAttack; Pintor
et al. 2022, "Indicators of attack failures"). The others compare two attacks image by image: the weaker one must break
significantly more (exact one-sided McNemar test) and clearly more; or count what should hardly happen (exact binomial
test). The level of a single comparison is such that all of them together raise a check by chance in fewer than one run
in 200 (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dfmcl.common.progress import Track, silent
from dfmcl.robustness.asking import (
    SPREAD,
    answers_change,
    batch_dependent,
    grad_mode_matters,
    largest,
    outputs_differ,
    state_changes,
)
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.diagnosis import BEYOND, FEW_STEPS, QUERYING, STEPS, Background, Examination
from dfmcl.robustness.evaluate import Decide
from dfmcl.robustness.finding import Check, Figures, Found, surplus, too_many
from dfmcl.robustness.memorisation import FRAGILE, MOVED, only_exact_images, only_these_images, seen_images
from dfmcl.robustness.models import frozen
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.statistics import Flags, lower_bound
from dfmcl.robustness.threats.threat import Threat

PROBABILITY = 1e-4  # float32 sums a thousand probabilities to 1 within 1e-5
NO_GRADIENT = 0.05  # of the images: float32 has a gradient while the margin is below 88; of trained logits it is ~20
EXPLODED = 1e5  # nats that one grey level would cost by the gradient: undefended ImageNet networks reach some 1e2
MISLED = 0.5  # of the predicted change: ReLUs that change sides in between cost an honest gradient a few hundredths
# Of a change, left unexplained by gradients: honest networks leave at most 0.1 on any way, a switch 0.4 to 1.
UNEXPLAINED = 0.25
# Of the images may show one that is more: none of an honest network does.
UNACCOUNTED = 0.05
# Of the way from an even guess to certainty: hard adversarial training on few images ends at 0.04, a thousandth of
# ordinary logits at 0.0006. Accuracy goes at least FAR at the same time.
FLAT = 0.01
FAR = 0.25
UNLIMITED = 0.10  # of the images may survive an attack without limits: 20 steps are few
RISING = 0.15  # of the gain in the last quarter of the steps: a steady rise brings 0.25, one that ends 0.02 to 0.06
ENOUGH = 8  # images below which a median says nothing
# Of the images that white-box attacks left may fall to black-box ones and to PGD at another scale. APGD, Square: < 0.01
TOLERATED = 0.05
ROUNDED = 0.05  # of the images may be lost at the border where floats become bytes, and never be found again
DISAGREE = 0.01  # one rounding can tip a label at the border; a wrong export disagrees on far more

# They do without the model's gradients, or keep to where the data lie.
OTHERWISE = ("square", "rays", "subspace")
# It breaks what a score-based search breaks, and more, at every scale of the logits; PGD alone need not.
STRONG = ("apgd-t",)
BALL_FREE = ("cw-l2",)  # it looks for the nearest adversarial image, wherever that lies


@dataclass(frozen=True)
class Result:
    """A check and its finding, as the report keeps it."""

    check: str
    outcome: Literal["clear", "raised", "not_run"]
    when: str
    why: str
    do: str
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "outcome": self.outcome,
            "when": self.when,
            "why": self.why,
            "do": self.do,
            # JSON knows no infinity, and a gradient may be one.
            "figures": {name: value if _finite(value) else str(value) for name, value in self.figures.items()},
        }


def diagnose(
    model: nn.Module | None,
    decide: Decide,
    images: Bytes,
    labels: Labels,
    threat: Threat,
    *,
    grid: bool,
    seed: int,
    evaluation: Evaluation | None = None,
    transfer: Sequence[Evaluation] = (),
    about: Mapping[str, Any] | None = None,
    background: Background | None = None,
    batch_size: int = 64,
    track: Track = silent,
) -> list[Result]:
    """Run every check on the first 128 of uint8 images `(n, H, W, C)`, and on the record of all of them.

    model: gives gradients; None: what needs them is not run. decide: whose answers count. grid: as bytes. evaluation,
    transfer: what was found on these images, by the suite and by attacks crafted on other models.
    about: what is known of the data, for the check that the model has not seen the images: run["data"], the digest of
    the data set it was trained on; run["parts"], which of its parts (train); data["sha256"] and data["part"] of the
    images; data["in_training"], how many of them are among the training images as well; data["copies"], how many
    repeat another of them. What is missing is not checked. background: whom else to ask, and how.
    Costs at most 160 gradient passes and 450 other passes for each of the 128 images, less where they fall.
    """
    examination = Examination(
        model,
        decide,
        images,
        labels,
        threat,
        grid=grid,
        seed=seed,
        evaluation=evaluation,
        transfer=transfer,
        about=about,
        background=background,
        batch_size=batch_size,
    )
    with frozen(model) if model is not None else nullcontext():
        return [_result(check, examination) for check in track(CHECKS.values(), "checks", len(CHECKS))]


def _result(check: Check, examination: Examination) -> Result:
    lacking = {
        "gradients": "there are no gradients: the model can only be queried" if examination.model is None else "",
        "images": "" if examination.right else f"the model is right on none of {len(examination.y)} images",
        "record": "there is no record of an evaluation" if examination.evaluation is None else "",
    }
    why = next((lacking[need] for need in check.needs if lacking[need]), "")
    found = Found("not_run", why) if why else check.run(examination)
    return Result(check.name, found.outcome, check.when, found.why, check.do, found.figures)


def probabilities(e: Examination) -> Found:
    """Nonnegative outputs that add up to 1."""
    lowest = float(e.finite.min())
    off = largest(e.finite.sum(dim=1) - 1)
    figures = {"smallest_output": lowest, "largest_distance_of_sum_from_1": off}
    if lowest >= 0 and off <= PROBABILITY:
        return Found("raised", "all outputs lie in [0, 1] and add up to 1: they are probabilities, not logits", figures)
    return Found("clear", f"outputs are no probabilities: the smallest is {lowest:.3g}", figures)


def flat_outputs(e: Examination) -> Found:
    """Right far more often than its softmax believes, which is hardly anything."""
    chance = 1 / e.logits.shape[1]
    believed = (float(e.finite.softmax(dim=1).amax(dim=1).mean()) - chance) / (1 - chance)
    right = (lower_bound(e.right, len(e.y), 0.999) - chance) / (1 - chance)
    figures = {"mean_confidence_above_chance": believed, "accuracy_above_chance_lower_bound": right}
    said = f"the softmax goes {100 * believed:.2g} % of the way from an even guess to certainty, accuracy at least"
    flat = believed < FLAT and right > FAR
    return Found("raised" if flat else "clear", f"{said} {100 * max(right, 0):.3g} %", figures)


def bad_gradients(e: Examination) -> Found:
    """Zero, not finite, or absurdly large."""
    size = e.slopes.loss
    finite = size.isfinite()
    none, broken = int((size == 0).sum()), int((~finite).sum())
    largest = float(size[finite].max()) / 255 if finite.any() else float("inf")
    figures: dict[str, float | str] = {"images": e.right, "zero": none, "not_finite": broken, "largest": largest}
    if broken:
        return Found("raised", f"the gradient is not finite on {broken} of {e.right} images", figures)
    if none > NO_GRADIENT * e.right:
        why = f"the gradient of the cross-entropy is exactly zero on {none} of {e.right} images: gradient attacks stand"
        return Found("raised", f"{why} still there", figures)
    if largest > EXPLODED:
        return Found("raised", f"by the gradient, one grey level would cost {largest:.2g} nats", figures)
    return Found("clear", f"the gradient is zero on {none} of {e.right} images, and finite everywhere", figures)


def gradients_mislead(e: Examination) -> Found:
    """What half a grey level along the gradient does, against what the gradient promises."""
    usable = (e.slopes.predicted > 0) & e.slopes.predicted.isfinite()
    if not usable.any():
        return Found("not_run", "no image has a gradient")
    ratio = float((e.slopes.happened / e.slopes.predicted)[usable].median())
    figures = {"images": int(usable.sum()), "median_happened_over_predicted": ratio}
    said = f"half a grey level along the gradient moves the margin by {ratio:.3g} of what the gradient promises"
    return Found("clear" if MISLED <= ratio <= 1 / MISLED else "raised", f"{said} (median)", figures)


def unaccounted(e: Examination) -> Found:
    """Along segments to noise, to attacked images, to other images, and to points that fool other networks."""
    ways = {way: (int((share > UNEXPLAINED).sum()), len(share)) for way, share in e.unexplained.items()}
    return too_many(ways, f"gradients leave more than {UNEXPLAINED:g} of the change unexplained", UNACCOUNTED)


def fgsm_beats_pgd(e: Examination) -> Found:
    return surplus("FGSM", e.fgsm, f"PGD-{STEPS}", e.pgd)


def weaker_with_steps(e: Examination) -> Found:
    return surplus(f"PGD-{FEW_STEPS}", e.few_steps, f"PGD-{STEPS}", e.pgd)


def weaker_with_eps(e: Examination) -> Found:
    return surplus(f"eps {e.threat.label}", e.pgd, "twice that", e.wider)


def unlimited_fails(e: Examination) -> Found:
    """Without a limit the images can become anything, and the attack must find something."""
    held, allowed = int((~e.unlimited).sum()), UNLIMITED * e.right
    why = f"{held} of {e.right} images hold against PGD-{STEPS} at {e.everything}, which allows any change"
    return Found("raised" if held > allowed else "clear", why, {"held": held, "images": e.right})


def scale_hides(e: Examination) -> Found:
    """The same attack on a tenth and on ten times the logits, which give the same answers.

    Cross-entropy is weaker on the logits of an honest network that is unsure of everything: nothing is hidden where an
    attack of the suite that no scale misleads has seen it.
    """
    found = []
    for factor in (0.1, 10.0):
        way, fell = f"PGD-{STEPS} on logits x {factor:g}", e.rescaled(factor)
        more = surplus(way, fell, "the same on the logits", e.pgd, shares=2)
        if more.outcome == "raised" and e.evaluation is not None and _has_strong(e.evaluation):
            left = _left_by(e.evaluation, e)
            missed = int((fell & ~e.pgd & left).sum())
            hidden = too_many(
                {f"{way} alone": (missed, int(left.sum()))}, "breaks images that the suite left", TOLERATED
            )
            seen = Found("clear", f"{more.why}; {missed} of them held against the suite", more.figures)
            more = hidden if hidden.outcome == "raised" else seen
        found.append(more)
    return max(found, key=lambda one: (one.outcome == "raised", one.figures.get("only_weaker", 0)))


def loss_still_rising(e: Examination) -> Found:
    """How much of what PGD gained on the margin came in the last quarter of its steps, on the images that held."""
    best = torch.from_numpy(np.fmax.accumulate(e.trace.numpy(), axis=0))[:, ~torch.from_numpy(e.pgd)]
    gain = best[-1] - best[0]
    usable = (gain > 0) & gain.isfinite()
    count = int(usable.sum())
    if count < ENOUGH:
        return Found("clear", f"too few images held while their loss rose: {count}", {"images": count})
    late = float(((best[-1] - best[3 * STEPS // 4]) / gain)[usable].median())
    said = (
        f"the last quarter of PGD-{STEPS}'s steps brought {100 * late:.3g} % of what it gained on the margin (median)"
    )
    figures = {"images": count, "median_share_in_last_quarter": late}
    return Found("raised" if late > RISING else "clear", said, figures)


def black_box_stronger(e: Examination) -> Found:
    """Square on what PGD left; Square in the suite and attacks from other models on what the suite's white box left."""
    queried = QUERYING if e.model is not None else {}
    ways = {f"{queries} queries of {name} (PGD-{STEPS})": e.queried[name] for name, queries in queried.items()}
    ways |= _black_box_in(e.evaluation) if e.evaluation is not None else {}
    ways |= {
        f"transfer from {other.about.get('surrogate', 'another model')} (the suite)": _flipped_by_transfer(
            e.evaluation, other
        )
        for other in e.transfer
        if e.evaluation is not None and _has_strong(e.evaluation)
    }
    return too_many(ways, "break images that white-box attacks left", TOLERATED)


def found_and_dropped(e: Examination) -> Found:
    """Points on which the model that gives gradients errs, and the answer that counts never did."""
    assert e.evaluation is not None, "needs a record"
    counted = [one for one in e.evaluation.attacks if one.unconfirmed is not None and not one.transferred]
    if not counted:
        return Found("not_run", "no attack of the record counts what it dropped")
    ways = {record.name: (record.unconfirmed or 0, sum(record.tried)) for record in counted}
    return too_many(ways, "found adversarial images that did not count", ROUNDED)


def artefact_disagrees(e: Examination) -> Found:
    """Labels of PGD's images by the model that gives gradients, and by the one whose answers count."""
    x = torch.from_numpy(e.adversarial).to(e.x.device).permute(0, 3, 1, 2).float() / 255
    apart = int((e.own_answers(x).argmax(dim=1) != e.adversarial_logits.argmax(dim=1)).sum())
    return too_many({"model and artefact": (apart, len(x))}, "give different labels to adversarial images", DISAGREE)


def outside_ball(e: Examination) -> Found:
    assert e.evaluation is not None, "needs a record"
    outside = {record.name: record.outside for record in e.evaluation.attacks if not record.name.startswith(BALL_FREE)}
    figures: dict[str, float | str] = {f"outside_{name}": count for name, count in outside.items()}
    guilty = [f"{name} ({count})" for name, count in outside.items() if count]
    if guilty:
        return Found("raised", f"attacks ended outside the ball, or nowhere: {', '.join(guilty)}", figures)
    return Found("clear", "every image that was tried lies in the ball, as it was counted", figures)


def cliff_beyond_ball(e: Examination) -> Found:
    noisy = ~e.right_under_noise(e.beyond)[e.correct].numpy()
    return surplus(f"random noise of {e.beyond / e.threat.eps:.3g} eps", noisy, f"PGD-{STEPS} at eps", e.pgd)


_ALL = (
    Check(
        "outputs_differ",
        f"the same image gets logits that differ by more than {SPREAD:g} of their spread",
        "take randomness (dropout, masks, noise, random resizing) out of inference, or attack its expectation",
        outputs_differ,
    ),
    Check(
        "batch_dependent",
        f"an image's logits depend on the rest of its batch by more than {SPREAD:g} of their spread",
        "let batch norm use its running statistics, and compute nothing across images",
        batch_dependent,
    ),
    Check(
        "grad_mode_matters",
        f"with autograd on and off, the same image gets logits that differ by more than {SPREAD:g} of their spread",
        "let the model compute the same whether or not gradients are wanted: users ask without them",
        grad_mode_matters,
        ("gradients",),
    ),
    Check(
        "probabilities",
        "the outputs are nonnegative and add up to 1",
        "export logits: a softmax at the end flattens the loss that attacks climb",
        probabilities,
    ),
    Check(
        "flat_outputs",
        f"accuracy is far above chance, but the softmax of the outputs stays within {FLAT:g} of an even guess",
        "multiply the logits by a number that calibrates them: now an attack on the cross-entropy sees no margin",
        flat_outputs,
    ),
    Check(
        "bad_gradients",
        f"gradients are exactly zero on more than {100 * NO_GRADIENT:g} % of the images, not finite, or exploding",
        "take out rounding, thresholds, lookups and saturated scales, or attack through a smooth stand-in for them",
        bad_gradients,
        ("gradients", "images"),
    ),
    Check(
        "gradients_mislead",
        f"a small step along the gradient does less than {MISLED:g} or more than {1 / MISLED:g} times what it promises",
        "look for operations with a backward pass of their own, and for noise in the loss at the scale of a grey level",
        gradients_mislead,
        ("gradients", "images"),
    ),
    Check(
        "unaccounted",
        f"on significantly more than {100 * UNACCOUNTED:g} % of the segments between images, gradients leave more than"
        f" {UNEXPLAINED:g} of the margin's change unexplained",
        "look for thresholds, comparisons, lookups and gradients of another network: attacks that follow these"
        " gradients do not attack the answers",
        unaccounted,
        ("gradients", "images"),
    ),
    Check(
        "fgsm_beats_pgd",
        f"one step breaks significantly more images than {STEPS} steps",
        "the loss is jagged on the way, as after catastrophic overfitting: train with more steps, and attack with"
        " restarts and without gradients",
        fgsm_beats_pgd,
        ("gradients", "images"),
    ),
    Check(
        "weaker_with_steps",
        f"{FEW_STEPS} steps break significantly more images than {STEPS}",
        "the loss is jagged: attack with smaller steps, restarts and without gradients",
        weaker_with_steps,
        ("gradients", "images"),
    ),
    Check(
        "weaker_with_eps",
        "significantly more images hold at twice the eps",
        "a larger ball holds the smaller one: the attack is being misled, so look for what hides the gradient",
        weaker_with_eps,
        ("gradients", "images"),
    ),
    Check(
        "unlimited_fails",
        f"more than {100 * UNLIMITED:g} % of the images hold when any change is allowed",
        "the attack follows gradients that lead nowhere: look for what hides them",
        unlimited_fails,
        ("gradients", "images"),
    ),
    Check(
        "scale_hides",
        "the same attack breaks significantly more images when the logits are divided or multiplied by ten; where the"
        f" suite has apgd-t, also significantly more than {100 * TOLERATED:g} % of those that it left",
        "put the logits on a scale that calibrates them, and attack with losses that do not care (apgd-t)",
        scale_hides,
        ("gradients", "images"),
    ),
    Check(
        "loss_still_rising",
        f"more than {100 * RISING:g} % of what an attack gained came in the last quarter of its steps",
        "give the attacks more steps until it stops, and look for what makes the ascent so slow",
        loss_still_rising,
        ("gradients", "images"),
    ),
    Check(
        "black_box_stronger",
        "attacks by queries, from other networks or within the data's subspace break significantly more than"
        f" {100 * TOLERATED:g} % of the images that those along the gradients left",
        "gradients are worth less than none: look for what hides them; do not believe the white-box figure",
        black_box_stronger,
        ("images",),
    ),
    Check(
        "found_and_dropped",
        f"on significantly more than {100 * ROUNDED:g} % of the images an attack was right and it did not count",
        "the model that gives gradients is not the one that decides: check the export, its rounding and its input",
        found_and_dropped,
        ("record",),
    ),
    Check(
        "artefact_disagrees",
        f"model and artefact label significantly more than {100 * DISAGREE:g} % of adversarial images differently",
        "export the run again and gate the new candidate",
        artefact_disagrees,
        ("gradients", "images"),
    ),
    Check(
        "outside_ball",
        "an attack's result lies outside the ball as it was counted, or is not a number",
        "look at the attack, and for outputs that are not finite; what lay outside was not counted",
        outside_ball,
        ("record",),
    ),
    Check(
        "seen_images",
        "the images are of a part that the model was trained on, training images as well, or copies of one another",
        "evaluate on images that training never saw, each of which stands there once",
        seen_images,
    ),
    Check(
        "only_exact_images",
        f"one grey level of noise breaks significantly more than {100 * FRAGILE:g} % of the images",
        "the model knows these very images: evaluate on others",
        only_exact_images,
        ("images",),
    ),
    Check(
        "only_these_images",
        f"the model is right on these images and, far less often, on training images, or loses significantly more than"
        f" {100 * MOVED:g} % of them to a shift or to less light",
        "the model knows these very images: evaluate on others",
        only_these_images,
        ("images",),
    ),
    Check(
        "cliff_beyond_ball",
        f"random noise of {BEYOND:g} eps breaks significantly more images than an attack inside eps",
        "the model is made for this very ball around these very images: evaluate on other images and at other eps",
        cliff_beyond_ball,
        ("gradients", "images"),
    ),
    Check(
        "state_changes",
        "a module keeps something else after it was asked the same once more",
        "take out what counts or remembers: a model that knows how often it was asked can answer tomorrow as it likes",
        state_changes,
    ),
    # Last, so that as many calls as possible lie before it.
    Check(
        "answers_change",
        f"asked again at the end, or in a new process, the model gives the same image logits that differ by more than"
        f" {SPREAD:g} of their spread",
        "take out what depends on time, on the number of calls or on the process",
        answers_change,
    ),
)
CHECKS: dict[str, Check] = {check.name: check for check in _ALL}


def _black_box_in(evaluation: Evaluation) -> dict[str, tuple[int, int]]:
    """For each attack of the suite without the model's gradients, or within a subspace: broken, of those images that
    the others tried and left.

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
    left = np.array(evaluation.robust_images)
    return int((left & ~np.array(transfer.robust_images)).sum()), int(left.sum())


def _left_by(evaluation: Evaluation, e: Examination) -> Flags:
    """Which of the images that are right the suite left `(M,)`; images that it never saw do not count."""
    left = np.zeros(len(e.y), bool)
    held = evaluation.robust_images[: len(e.y)]
    left[: len(held)] = held
    of_those_right: Flags = left[e.correct.numpy()]
    return of_those_right


def _has_strong(evaluation: Evaluation) -> bool:
    return any(_is_strong(record) for record in evaluation.attacks)


def _is_strong(record: AttackRecord) -> bool:
    return record.name.startswith(STRONG)


def _finite(value: float | str) -> bool:
    return isinstance(value, str) or bool(np.isfinite(value))
