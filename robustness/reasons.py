"""The words of each check, its needs, and the rule by which its figures raise it; for a reader without torch, too.

A gate runs the checks by this table, and every reader of its evidence asks the table again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfmcl.robustness.rules import (
    BEYOND,
    DISAGREE,
    FEW_STEPS,
    FLAT,
    FRAGILE,
    MISLED,
    MOVED,
    NO_GRADIENT,
    RISING,
    ROUNDED,
    SPREAD,
    STEPS,
    TOLERATED,
    UNACCOUNTED,
    UNEXPLAINED,
    UNLIMITED,
    WORSE,
    Ruling,
    any_at_all,
    are_flat,
    are_hidden,
    are_known_alone,
    are_probabilities,
    comparing,
    counting,
    differs,
    have_no_use,
    keeps_another,
    mislead,
    outlast,
    resist_here_alone,
    still_rises,
    were_seen,
)

Need = Literal["gradients", "images", "record"]


@dataclass(frozen=True)
class Reason:
    """One reason to disbelieve an evaluation.

    when: it is raised, as a sentence's end.
    do: what helps.
    rule: whether its figures raise it.
    needs: the facts without which its check does not run.
    """

    name: str
    when: str
    do: str
    rule: Ruling
    needs: tuple[Need, ...] = ()


_ALL = (
    Reason(
        "outputs_differ",
        f"the same image gets logits that differ by more than {SPREAD:g} of their spread",
        "take randomness (dropout, masks, noise, random resizing) out of inference, or attack its expectation",
        Ruling(differs),
    ),
    Reason(
        "batch_dependent",
        f"an image's logits depend on the rest of its batch by more than {SPREAD:g} of their spread",
        "let batch norm use its running statistics, and compute nothing across images",
        Ruling(differs),
    ),
    Reason(
        "grad_mode_matters",
        f"with autograd on and off, the same image gets logits that differ by more than {SPREAD:g} of their spread",
        "let the model compute the same whether or not gradients are wanted: users ask without them",
        Ruling(differs),
        ("gradients",),
    ),
    Reason(
        "probabilities",
        "the outputs are nonnegative and add up to 1",
        "export logits: a softmax at the end flattens the loss that attacks climb",
        Ruling(are_probabilities),
    ),
    Reason(
        "flat_outputs",
        f"accuracy is far above chance, but the softmax of the outputs stays within {FLAT:g} of an even guess",
        "multiply the logits by a number that calibrates them: now an attack on the cross-entropy sees no margin",
        Ruling(are_flat),
    ),
    Reason(
        "bad_gradients",
        f"gradients are exactly zero on more than {100 * NO_GRADIENT:g} % of the images, not finite, or exploding",
        "take out rounding, thresholds, lookups and saturated scales, or attack through a smooth stand-in for them",
        Ruling(have_no_use),
        ("gradients", "images"),
    ),
    Reason(
        "gradients_mislead",
        f"a small step along the gradient does less than {MISLED:g} or more than {1 / MISLED:g} times what it promises",
        "look for operations with a backward pass of their own, and for noise in the loss at the scale of a grey level",
        Ruling(mislead),
        ("gradients", "images"),
    ),
    Reason(
        "unaccounted",
        f"on significantly more than {100 * UNACCOUNTED:g} % of the segments between images, gradients leave more than"
        f" {UNEXPLAINED:g} of the margin's change unexplained",
        "look for thresholds, comparisons, lookups and gradients of another network: attacks that follow these"
        " gradients do not attack the answers",
        counting(UNACCOUNTED),
        ("gradients", "images"),
    ),
    Reason(
        "fgsm_beats_pgd",
        f"one step breaks significantly more images than {STEPS} steps",
        "the loss is jagged on the way, as after catastrophic overfitting: train with more steps, and attack with"
        " restarts and without gradients",
        comparing(),
        ("gradients", "images"),
    ),
    Reason(
        "weaker_with_steps",
        f"{FEW_STEPS} steps break significantly more images than {STEPS}",
        "the loss is jagged: attack with smaller steps, restarts and without gradients",
        comparing(),
        ("gradients", "images"),
    ),
    Reason(
        "weaker_with_eps",
        "significantly more images hold at twice the eps",
        "a larger ball holds the smaller one: the attack is being misled, so look for what hides the gradient",
        comparing(),
        ("gradients", "images"),
    ),
    Reason(
        "unlimited_fails",
        f"more than {100 * UNLIMITED:g} % of the images hold when any change is allowed",
        "the attack follows gradients that lead nowhere: look for what hides them",
        Ruling(outlast),
        ("gradients", "images"),
    ),
    Reason(
        "scale_hides",
        "the same attack breaks significantly more images when the logits are divided or multiplied by ten; where the"
        f" suite has cr or apgd-t, also significantly more than {100 * TOLERATED:g} % of those that it left",
        "put the logits on a scale that calibrates them, and attack with losses that do not care (cr, apgd-t)",
        Ruling(are_hidden, comparing(shares=2).chance),
        ("gradients", "images"),
    ),
    Reason(
        "loss_still_rising",
        f"more than {100 * RISING:g} % of what an attack gained came in the last quarter of its steps",
        "give the attacks more steps until it stops, and look for what makes the ascent so slow",
        Ruling(still_rises),
        ("gradients", "images"),
    ),
    Reason(
        "black_box_stronger",
        "attacks by queries, from other networks or within the data's subspace break significantly more than"
        f" {100 * TOLERATED:g} % of the images that those along the gradients left",
        "gradients are worth less than none: look for what hides them; do not believe the white-box figure",
        counting(TOLERATED),
        ("images",),
    ),
    Reason(
        "cr_is_blind",
        f"plain ascents break significantly more than {100 * TOLERATED:g} % of the images that cr left",
        "cr is misled, as after catastrophic overfitting: judge by suite 'standard', and train with more steps",
        counting(TOLERATED),
        ("gradients", "images", "record"),
    ),
    Reason(
        "found_and_dropped",
        f"on significantly more than {100 * ROUNDED:g} % of the images an attack was right and it did not count",
        "the model that gives gradients is not the one that decides: check the export, its rounding and its input",
        counting(ROUNDED),
        ("record",),
    ),
    Reason(
        "artefact_disagrees",
        f"model and artefact label significantly more than {100 * DISAGREE:g} % of adversarial images differently",
        "export the run again and gate the new candidate",
        counting(DISAGREE),
        ("gradients", "images"),
    ),
    Reason(
        "outside_ball",
        "an attack's result lies outside the ball as it was counted, or is not a number",
        "look at the attack, and for outputs that are not finite; what lay outside was not counted",
        Ruling(any_at_all),
        ("record",),
    ),
    Reason(
        "seen_images",
        "the images are of a part that the model was trained on, training images as well, or copies of one another",
        "evaluate on images that training never saw, each of which stands there once",
        Ruling(were_seen),
    ),
    Reason(
        "only_exact_images",
        f"one grey level of noise breaks significantly more than {100 * FRAGILE:g} % of the images, without those that"
        " were right by less than noise ordinarily moves",
        "the model knows these very images: evaluate on others",
        counting(FRAGILE),
        ("images",),
    ),
    Reason(
        "only_these_images",
        f"the model is right on these images and, far less often, on training images, or loses significantly more than"
        f" {100 * MOVED:g} % of them to a shift or to less light",
        "the model knows these very images: evaluate on others",
        Ruling(are_known_alone, counting(MOVED).chance),
        ("images",),
    ),
    Reason(
        "resists_only_here",
        f"an attack leaves surely fewer training images than these (at least {100 * WORSE:g} points of those that are"
        " right)",
        "the model resists around these very images, and users send others: evaluate on others",
        Ruling(resist_here_alone),
        ("gradients", "images"),
    ),
    Reason(
        "cliff_beyond_ball",
        f"random noise of {BEYOND:g} eps breaks significantly more images than an attack inside eps",
        "the model is made for this very ball around these very images: evaluate on other images and at other eps",
        comparing(),
        ("gradients", "images"),
    ),
    Reason(
        "state_changes",
        "a module keeps something else after it was asked the same once more",
        "take out what counts or remembers: a model that knows how often it was asked can answer tomorrow as it likes",
        Ruling(keeps_another),
    ),
    # Last, so that as many calls as possible lie before it.
    Reason(
        "answers_change",
        f"asked again at the end, or in a new process, the model gives the same image logits that differ by more than"
        f" {SPREAD:g} of their spread",
        "take out what depends on time, on the number of calls or on the process",
        Ruling(differs),
    ),
)
REASONS: dict[str, Reason] = {reason.name: reason for reason in _ALL}
