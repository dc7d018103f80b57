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

from torch import nn

from dfmcl.common.progress import Track, silent
from dfmcl.robustness.asking import (
    SPREAD,
    answers_change,
    batch_dependent,
    grad_mode_matters,
    outputs_differ,
    state_changes,
)
from dfmcl.robustness.background import Background
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.diagnosis import BEYOND, FEW_STEPS, Examination
from dfmcl.robustness.doubts import (
    DISAGREE,
    FLAT,
    MISLED,
    NO_GRADIENT,
    RISING,
    ROUNDED,
    TOLERATED,
    UNACCOUNTED,
    UNEXPLAINED,
    UNLIMITED,
    artefact_disagrees,
    bad_gradients,
    black_box_stronger,
    cliff_beyond_ball,
    cr_is_blind,
    fgsm_beats_pgd,
    flat_outputs,
    found_and_dropped,
    gradients_mislead,
    is_finite,
    loss_still_rising,
    outside_ball,
    probabilities,
    scale_hides,
    unaccounted,
    unlimited_fails,
    weaker_with_eps,
    weaker_with_steps,
)
from dfmcl.robustness.evaluate import Decide
from dfmcl.robustness.finding import Check, Figures, Found
from dfmcl.robustness.memorisation import FRAGILE, MOVED, only_exact_images, only_these_images, seen_images
from dfmcl.robustness.models import frozen
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.threats.ball import as_ball
from dfmcl.robustness.threats.threat import Threat
from dfmcl.robustness.traces import STEPS


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
            "figures": {name: value if is_finite(value) else str(value) for name, value in self.figures.items()},
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
    track: Track = silent,
) -> list[Result]:
    """Run every check on the first 128 of uint8 images `(n, H, W, C)`, and on the record of all of them.

    model: gives gradients; None: what needs them is not run. decide: whose answers count. threat: a ball, else
    BadInput. grid: as bytes. evaluation, transfer: what was found on these images, by the suite and by attacks crafted
    on other models.
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
        as_ball(threat, "checks"),
        grid=grid,
        seed=seed,
        evaluation=evaluation,
        transfer=transfer,
        about=about,
        background=background,
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
        f" suite has cr or apgd-t, also significantly more than {100 * TOLERATED:g} % of those that it left",
        "put the logits on a scale that calibrates them, and attack with losses that do not care (cr, apgd-t)",
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
        "cr_is_blind",
        f"plain ascents break significantly more than {100 * TOLERATED:g} % of the images that cr left",
        "cr is misled, as after catastrophic overfitting: judge by suite 'standard', and train with more steps",
        cr_is_blind,
        ("gradients", "images", "record"),
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
        f"one grey level of noise breaks significantly more than {100 * FRAGILE:g} % of the images, without those that"
        " were right by less than noise ordinarily moves",
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
