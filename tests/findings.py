"""What a check writes down when it is clear and when it is raised, for reports without a gate."""

from __future__ import annotations

from collections.abc import Mapping

from dfmcl.gating.signing.report import CheckEntry
from dfmcl.robustness.reasons import REASONS
from dfmcl.robustness.rules import Figures, Ruling

Pair = tuple[Figures, Figures]


def differing(**more: float) -> Pair:
    return {"largest_difference": 1e-6, "relative_to_spread": 2e-7, **more}, {
        "largest_difference": 9.0,
        "relative_to_spread": 2.7,
        **more,
    }


COMPARED: Pair = (
    {"only_weaker": 0, "images": 30},
    {"only_weaker": 20, "images": 30, "only_stronger": 0},
)
COUNTED: Pair = (
    {"broken": 0, "images": 30, "way": "noise", "ways": 1},
    {"broken": 30, "images": 30, "way": "noise", "ways": 1},
)
# Of each check: clear, raised; without the chances, which follow.
FIGURES: Mapping[str, Pair] = {
    "outputs_differ": differing(),
    "batch_dependent": differing(largest_batch=64),
    "grad_mode_matters": differing(),
    "probabilities": (
        {"smallest_output": -4.5, "largest_distance_of_sum_from_1": 1.0},
        {"smallest_output": 0.0, "largest_distance_of_sum_from_1": 1e-6},
    ),
    "flat_outputs": (
        {"mean_confidence_above_chance": 0.41, "accuracy_above_chance_lower_bound": 0.6},
        {"mean_confidence_above_chance": 0.001, "accuracy_above_chance_lower_bound": 0.6},
    ),
    "bad_gradients": (
        {"images": 30, "zero": 0, "not_finite": 0, "largest": 0.1},
        {"images": 30, "zero": 30, "not_finite": 0, "largest": 0.0},
    ),
    "gradients_mislead": (
        {"images": 30, "median_happened_over_predicted": 0.99},
        {"images": 30, "median_happened_over_predicted": 0.01},
    ),
    "unaccounted": COUNTED,
    "fgsm_beats_pgd": COMPARED,
    "weaker_with_steps": COMPARED,
    "weaker_with_eps": COMPARED,
    "unlimited_fails": ({"held": 0, "images": 30}, {"held": 30, "images": 30}),
    "scale_hides": COMPARED,
    "loss_still_rising": (
        {"images": 30, "median_share_in_last_quarter": 0.01},
        {"images": 30, "median_share_in_last_quarter": 0.25},
    ),
    "black_box_stronger": COUNTED,
    "cr_is_blind": COUNTED,
    "found_and_dropped": COUNTED,
    "artefact_disagrees": COUNTED,
    "outside_ball": ({"outside_fgsm": 0}, {"outside_fgsm": 1}),
    "seen_images": (
        {"part": "test", "trained_on": "train", "in_training": 0, "images": 30},
        {"part": "test", "trained_on": "train, test", "in_training": 0, "images": 30},
    ),
    "only_exact_images": COUNTED,
    "only_these_images": (
        {"right": 30, "images": 30, "right_in_training": 30, "training": 30},
        {"right": 30, "images": 30, "right_in_training": 3, "training": 30},
    ),
    "resists_only_here": (
        {"held": 20, "images": 30, "held_elsewhere": 18, "elsewhere": 30},
        {"held": 29, "images": 30, "held_elsewhere": 0, "elsewhere": 30},
    ),
    "cliff_beyond_ball": COMPARED,
    "state_changes": ({"changed": 0, "places": 9}, {"changed": 1, "places": 9}),
    "answers_change": differing(),
}


def finding(name: str, outcome: str) -> CheckEntry:
    """A check's row in a report."""
    reason = REASONS[name]
    figures = {} if outcome == "not_run" else {**FIGURES[name][outcome == "raised"]}
    why = {"raised": reason.when, "clear": "", "not_run": "nobody says on which data the model was trained"}[outcome]
    return CheckEntry(
        check=name,
        outcome=outcome,
        when=reason.when,
        why=why,
        do=reason.do,
        figures={**figures, **chance_of(reason.rule, figures)},
    )


def chance_of(rule: Ruling, figures: Figures) -> Figures:
    """p where the counts have one."""
    p = rule.chance(figures)
    return {} if p is None else {"p": p}
