"""Reasons to disbelieve an evaluation: whatever makes attacks fail although the model does not resist.

Each check says when it is raised, why it was, and what to do. Most look at one thing that an honest model does not do
(Carlini et al. 2019, "On evaluating adversarial robustness", section 5; the flags of Croce & Hein's AutoAttack; Pintor
et al. 2022, "Indicators of attack failures"). The others compare two attacks image by image: the weaker one must break
significantly more (exact one-sided McNemar test) and clearly more; or count what should hardly happen (exact binomial
test). The level of a single comparison is such that all of them together raise a check by chance in fewer than one run
in 200 (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dfmcl.common.progress import Track, silent
from dfmcl.robustness.asking import answers_change, batch_dependent, grad_mode_matters, outputs_differ, state_changes
from dfmcl.robustness.background import Background
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.doubts import (
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
from dfmcl.robustness.finding import Check, Found
from dfmcl.robustness.memorisation import only_exact_images, only_these_images, resists_only_here, seen_images
from dfmcl.robustness.models import frozen
from dfmcl.robustness.reasons import REASONS
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.rules import Figures
from dfmcl.robustness.threats.ball import as_ball
from dfmcl.robustness.threats.threat import Threat


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
    Costs at most 170 gradient passes and 450 other passes for each of the 128 images, less where they fall.
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


# In the order of the table.
_RUNS: tuple[Callable[[Examination], Found], ...] = (
    outputs_differ,
    batch_dependent,
    grad_mode_matters,
    probabilities,
    flat_outputs,
    bad_gradients,
    gradients_mislead,
    unaccounted,
    fgsm_beats_pgd,
    weaker_with_steps,
    weaker_with_eps,
    unlimited_fails,
    scale_hides,
    loss_still_rising,
    black_box_stronger,
    cr_is_blind,
    found_and_dropped,
    artefact_disagrees,
    outside_ball,
    seen_images,
    only_exact_images,
    only_these_images,
    resists_only_here,
    cliff_beyond_ball,
    state_changes,
    answers_change,
)
CHECKS: dict[str, Check] = {
    name: Check(**vars(reason), run=run) for (name, reason), run in zip(REASONS.items(), _RUNS, strict=True)
}
