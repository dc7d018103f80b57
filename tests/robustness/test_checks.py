"""Reasons to disbelieve: every check has been seen to fail, and none fails where there is nothing to see."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from torch import nn

from dfmcl.common.batch import most_asked, most_served
from dfmcl.gating.foreign import kept
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import SUITES
from dfmcl.robustness.background import Background
from dfmcl.robustness.checks import CHECKS, Result, diagnose
from dfmcl.robustness.data import Bytes, Dataset, load_dataset
from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.evaluate import Outcome, evaluate
from dfmcl.robustness.finding import Found, first_look, hopeless, surplus, too_many
from dfmcl.robustness.losses import right
from dfmcl.robustness.memorisation import copies, lightly, only_exact_images, repeated
from dfmcl.robustness.models import Classifier, exactly, frozen, to_bytes, to_float
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.rules import CLEARLY, LEVEL, Figures, resist_here_alone
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.segments import unexplained
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import threat_of
from tests.networks import Networks
from tests.robustness.traps import TRAPS, Corners, Neighbourhood, sprung

THREAT = threat_of("linf", "8/255")
N = 64
EVERY = (True,) * N
BY_RECORD = {"cr_is_blind", "found_and_dropped", "outside_ball", "seen_images", "artefact_disagrees"}
# They compare with what was answered before, or look into a module.
BY_BACKGROUND = {"answers_change", "state_changes", "resists_only_here"}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def fragile(standard_run: Path) -> Classifier:
    """Nearly all of its images fall at 8/255: whatever a trap around it seems to hold is deceit."""
    return load_run(standard_run).model


@pytest.fixture(scope="module")
def robust(networks: Networks) -> Classifier:
    """What the traps of two networks hide behind."""
    return load_run(networks("hardened")).model


@pytest.fixture(scope="module")
def other(other_run: Path) -> Classifier:
    return load_run(other_run).model


def examine(model: nn.Module | None, digits: Dataset, decider: nn.Module | None = None, **facts: Any) -> Examination:
    decide = exactly(decider or model)  # type: ignore[arg-type]  # one of the two is there
    return Examination(model, decide, digits.x_test[:N], digits.y_test[:N], THREAT, grid=True, seed=0, **facts)


def run(check: str, model: nn.Module, digits: Dataset, decider: nn.Module | None = None, **facts: Any) -> Found:
    with frozen(model):
        return CHECKS[check].run(examine(model, digits, decider, **facts))


def attacked(model: nn.Module | None, digits: Dataset, *names: str, **how: Any) -> Outcome:
    suite = [Attack.parse(name) for name in names]
    return evaluate(model, digits.x_test[:N], digits.y_test[:N], THREAT, suite, grid=True, batch_size=N, **how)


def recorded(*records: AttackRecord) -> Evaluation:
    return Evaluation(THREAT, True, 0, EVERY, records, 1.0)


def record(name: str, held: tuple[bool, ...] = EVERY, **facts: Any) -> AttackRecord:
    return AttackRecord(name, {}, held, EVERY, **{"outside": 0, "seconds": 1.0, "unconfirmed": 0, **facts})


# benchmarks/checks.py springs all of them; of the six switches one that looks at one thing and one that looks at two.
SPRUNG = {
    name: trap
    for name, trap in TRAPS.items()
    if not name.startswith("switch on") or name in ("switch on grey", "switch on grey and low frequency")
}


@pytest.mark.parametrize(("trap", "check"), [(name, check) for name, trap in SPRUNG.items() for check in trap.caught])
def test_a_trap_is_caught(
    fragile: Classifier, robust: Classifier, other: Classifier, digits: Dataset, trap: str, check: str
) -> None:
    """What looks robust and is not raises the check that is about it."""
    deceit = sprung(trap, fragile, digits.x_test[:N], digits.y_test[:N], robust)
    training = (digits.x_train[:N], digits.y_train[:N]) if check == "resists_only_here" else None
    background = Background(others={"another network": other}, state=lambda: kept(deceit), training=training)
    found = run(check, deceit, digits, background=background)
    assert found.outcome == "raised", found.why


def test_the_honest_twin_raises_nothing(fragile: Classifier, digits: Dataset) -> None:
    """The network inside the traps, without a trap: no check is raised, and all that need no record run."""
    how: dict[str, Any] = {"grid": True, "seed": 0}
    results = diagnose(fragile, exactly(fragile), digits.x_test[:N], digits.y_test[:N], THREAT, **how)
    assert {result.check: result.why for result in results if result.outcome == "raised"} == {}
    assert [result.check for result in results] == list(CHECKS)
    assert all(result.when and result.why and result.do for result in results)
    assert {result.check for result in results if result.outcome == "not_run"} <= BY_RECORD | BY_BACKGROUND | {
        "black_box_stronger"
    }


@pytest.mark.parametrize(("elsewhere", "raised"), [(0, True), (8, True), (28, False), (64, False)])
def test_as_robust_elsewhere_is_honest(elsewhere: int, raised: bool) -> None:
    """40 of 64 hold: a fifth less of training images, and surely less, is no honest model's; less by chance may be."""
    figures: Figures = {"held": 40, "images": N, "held_elsewhere": elsewhere, "elsewhere": N}
    assert resist_here_alone(figures) is raised


def test_every_check_has_been_seen_to_fail() -> None:
    """Each check is caught by a trap above or by a test below."""
    assert set(CHECKS) == {check for trap in TRAPS.values() for check in trap.caught} | BY_RECORD | {"answers_change"}


def test_a_query_only_model_is_asked_what_needs_no_gradient(fragile: Classifier, digits: Dataset) -> None:
    """Without gradients the checks that need them say so, and the others catch a softmax."""
    softmax = sprung("softmax", fragile, digits.x_test[:N], digits.y_test[:N])
    results = diagnose(
        None, exactly(softmax), digits.x_test[:N], digits.y_test[:N], THREAT, grid=True, seed=0, evaluation=recorded()
    )
    outcomes = {result.check: result for result in results}
    raised = {name for name, result in outcomes.items() if result.outcome == "raised"}
    assert {"probabilities"} <= raised <= {"probabilities", "flat_outputs"}  # probabilities taken for logits are flat
    assert "gradients" in outcomes["bad_gradients"].why
    assert outcomes["outputs_differ"].outcome == outcomes["only_exact_images"].outcome == "clear"


def test_a_model_that_is_never_right_is_no_finding(fragile: Classifier, digits: Dataset) -> None:
    """Where no image is right there is nothing to attack, and the checks that attack say so."""
    wrong = (digits.y_test[:8] + 1) % 10
    with torch.no_grad():
        answers = fragile(to_float(torch.from_numpy(digits.x_test[:8]))).argmax(dim=1).numpy()
    images = digits.x_test[:8][answers != wrong]
    results = diagnose(fragile, exactly(fragile), images, wrong[answers != wrong], THREAT, grid=True, seed=0)
    assert [result.check for result in results if result.outcome == "raised"] == []
    assert {"right on none" in result.why for result in results if "images" in CHECKS[result.check].needs} == {True}


def test_an_l2_threat_is_examined_as_well(fragile: Classifier, digits: Dataset) -> None:
    """Every check runs on it; what is asked of black boxes leaves out the one that knows Linf only."""
    about = fragile, exactly(fragile), digits.x_test[:16], digits.y_test[:16], L2(0.3)
    assert Examination(*about, grid=True, seed=0).querying == ("square", "square-subspace")
    assert len(diagnose(*about, grid=True, seed=0)) == len(CHECKS)


def test_no_number_is_no_randomness(fragile: Classifier, digits: Dataset) -> None:
    """An image whose logits are never finite differs from itself in nothing; one that sometimes is, in everything."""
    answer, asked = exactly(fragile), [0]

    def steady(x: torch.Tensor) -> torch.Tensor:
        return torch.where((x.mean(dim=(1, 2, 3)) > 0.36)[:, None], torch.nan, answer(x))

    def shaky(x: torch.Tensor) -> torch.Tensor:
        asked[0] += 1
        return steady(x) if asked[0] == 1 else answer(x)

    for decide, outcome in ((steady, "clear"), (shaky, "raised")):
        e = Examination(None, decide, digits.x_test[:64], digits.y_test[:64], Linf(8 / 255), grid=True, seed=0)
        assert not e.logits.isfinite().all()
        assert CHECKS["outputs_differ"].run(e).outcome == outcome
        if outcome == "clear":
            assert CHECKS["batch_dependent"].run(e).outcome == "clear"
            assert CHECKS["probabilities"].run(e).outcome == "clear"
            assert not e.correct[~e.logits.isfinite().all(dim=1)].any()


@pytest.mark.parametrize("side", [32, 224])
def test_every_batch_that_is_served_was_asked(side: int) -> None:
    """Large images are asked and served in small batches: every size up to the largest is asked, and one that is
    answered otherwise is noticed."""
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    labels, most, seen = np.arange(3), most_served(side * side * 3), set()

    def crowded(x: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        logits = x.flatten(1)[:, :3]
        return -logits if len(x) == most else logits

    e = Examination(None, crowded, images, labels, Linf(8 / 255), grid=True, seed=0)
    found = CHECKS["batch_dependent"].run(e)
    assert (found.outcome, seen >= {*range(1, most + 1)}) == ("raised", True)
    assert most <= float(found.figures["largest_batch"]) <= most_asked(side * side * 3)


@pytest.mark.parametrize("stranger", ["black", "white", "grey", "noise", "attacked", "a copy"])
def test_company_that_changes_an_answer_is_noticed(fragile: Classifier, digits: Dataset, stranger: str) -> None:
    """Minus the answer beside one image of a kind that the data do not have, among the other images or by itself."""
    known = to_float(torch.from_numpy(digits.x_test[:N]))

    def startled(x: torch.Tensor) -> torch.Tensor:
        spread = x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3))
        own = torch.cdist(x.flatten(1), known.flatten(1), p=torch.inf).amin(dim=1) < 1e-3
        there = {
            "black": x.amax(dim=(1, 2, 3)) == 0,
            "white": x.amin(dim=(1, 2, 3)) == 1,
            "grey": (spread == 0) & ~own & (x.mean(dim=(1, 2, 3)).sub(0.5).abs() < 0.1),
            "noise": (x[:, 0] - x[:, 1]).abs().mean(dim=(1, 2)) > 0.2,
            "attacked": ~own & (spread > 0) & ((x[:, 0] - x[:, 1]).abs().mean(dim=(1, 2)) < 0.1),
            "a copy": (len(x) > 1) & (x == x[:1]).flatten(1).all(dim=1).all().expand(len(x)),
        }[stranger]
        return exactly(fragile)(x) * (1 - 2 * there.any().float())

    e = Examination(fragile, startled, digits.x_test[:N], digits.y_test[:N], THREAT, grid=True, seed=0)
    with frozen(fragile):
        found = CHECKS["batch_dependent"].run(e)
    assert found.outcome == "raised"
    assert "beside" in found.why


def test_a_result_is_a_row_of_the_report() -> None:
    """Results are strict JSON, infinite figures too."""
    result = Result("a", "raised", "b", "c", "d", {"largest": float("inf"), "images": 3, "part": "test"})
    row = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert row["figures"] == {"largest": "inf", "images": 3, "part": "test"}
    assert set(row) == {"check", "outcome", "when", "why", "do", "figures"}


def test_log_probabilities_are_logits(fragile: Classifier, digits: Dataset) -> None:
    """A log-softmax changes neither the cross-entropy nor a margin, and is no reason to disbelieve."""
    assert run("probabilities", nn.Sequential(fragile, nn.LogSoftmax(dim=1)), digits).outcome == "clear"


def test_an_answer_that_changes_later_is_noticed(fragile: Classifier, other: Classifier, digits: Dataset) -> None:
    """The answers of the attacks are asked for again, here and in a new process; rounding is no change."""
    images = digits.x_test[:N]
    with torch.no_grad():
        truth, others = (model(to_float(torch.from_numpy(images))).numpy() for model in (fragile, other))
    index = {image.tobytes(): place for place, image in enumerate(images)}

    def afresh(logits: NDArray[np.float32]) -> Callable[[Bytes], NDArray[np.float32]]:
        return lambda asked: logits[[index[image.tobytes()] for image in asked]]

    for recalled, new, outcome in (
        (truth, truth * (1 + 1e-6), "clear"),
        (others, truth, "raised"),
        (truth, others, "raised"),
    ):
        background = Background(recalled=(images, recalled), afresh=afresh(new))
        assert run("answers_change", fragile, digits, background=background).outcome == outcome


def test_a_model_that_knows_the_test_images_only_is_noticed(
    fragile: Classifier, robust: Classifier, digits: Dataset
) -> None:
    """Far less often right on training images than on these: the judged images are known. Honest ones are as good."""
    known = sprung("neighbourhood", fragile, digits.x_test[:N], digits.y_test[:N])
    training = Background(training=(digits.x_train[:256], digits.y_train[:256]))
    assert run("only_these_images", known, digits, background=training).outcome == "raised"
    unmoved = replace_lightly(known, digits)
    assert run("only_these_images", unmoved, digits).outcome == "clear"  # by shifts alone it would not be seen
    assert run("only_these_images", unmoved, digits, background=training).outcome == "raised"
    for honest in (fragile, robust):
        assert run("only_these_images", honest, digits, background=training).outcome == "clear"


@pytest.mark.parametrize("side", [8, 12, 16, 32, 70])
def test_light_changes_are_light_at_every_size(side: int) -> None:
    """A ramp over the image moves by a tenth of its height at most, and stays bytes."""
    x = (torch.linspace(0, 1, side).mul(255).round() / 255).expand(1, 1, side, side)
    for moved in lightly(x).values():
        assert moved.shape == x.shape
        assert torch.equal((255 * moved).round() / 255, moved)
        assert (moved - x).abs().max() <= 0.1 + 1 / 255


def replace_lightly(known: nn.Module, digits: Dataset) -> nn.Module:
    """The same memory, also of each image after the light changes that the check makes."""
    x = to_float(torch.from_numpy(digits.x_test[:N]))
    remembered = [x, *lightly(x).values()]
    assert isinstance(known, Neighbourhood)
    wider = copy.deepcopy(known)
    wider.known = torch.cat([part.flatten(1) for part in remembered])
    wider.labels = torch.from_numpy(digits.y_test[:N]).repeat(len(remembered))
    return wider


def test_gradients_account_for_what_they_are_the_gradients_of() -> None:
    """A piecewise linear function with one step: the share without it is 0, with it the step's part of the change."""

    class Stepped(nn.Module):
        def __init__(self, step: float) -> None:
            super().__init__()
            self.step = step

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            way = x.flatten(1).sum(dim=1)
            return torch.stack([-way - self.step * (way > 1).float(), way], dim=1)

    begin, end = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    y = torch.zeros(3, dtype=torch.int64)
    for step in (0.0, 2.0, 8.0):
        share = unexplained(Stepped(step), Stepped(step), begin, end, y, enough=0.0)
        assert torch.allclose(share, torch.full((3,), step / (8 + step), dtype=torch.float64), atol=1e-6)
    nowhere = unexplained(Stepped(2.0), Stepped(2.0), end, end, y, enough=0.0)
    assert torch.equal(nowhere, torch.zeros(3, dtype=torch.float64))


def test_an_artefact_of_another_model_disagrees(fragile: Classifier, other: Classifier, digits: Dataset) -> None:
    """Gradients of one model and answers of another are noticed by their labels; one model agrees with itself."""
    assert run("artefact_disagrees", fragile, digits, other).outcome == "raised"
    assert run("artefact_disagrees", fragile, digits).outcome == "clear"


def test_what_was_found_and_dropped_is_noticed(fragile: Classifier, digits: Dataset) -> None:
    """Where the model errs at points and the answer that counts never does, the record says so."""
    memory = sprung("lookup table", fragile, digits.x_test[:N], digits.y_test[:N])
    dropped = attacked(fragile, digits, "pgd-5", decide=exactly(memory)).evaluation
    assert run("found_and_dropped", fragile, digits, evaluation=dropped).outcome == "raised"
    honest = attacked(fragile, digits, "pgd-5").evaluation
    assert run("found_and_dropped", fragile, digits, evaluation=honest).outcome == "clear"
    uncounted = recorded(record("pgd-5", unconfirmed=None))
    assert run("found_and_dropped", fragile, digits, evaluation=uncounted).outcome == "not_run"


def test_an_image_outside_the_ball_is_noticed(fragile: Classifier, digits: Dataset) -> None:
    """One is enough; an attack that looks for the nearest adversarial image may look outside."""
    for name, outcome in (("pgd-5", "raised"), ("cw-l2-9", "clear")):
        found = run("outside_ball", fragile, digits, evaluation=recorded(record("fgsm"), record(name, outside=1)))
        assert found.outcome == outcome
    assert run("outside_ball", fragile, digits, evaluation=recorded(record("pgd-5"))).outcome == "clear"


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        ({"run": {"data": "a"}, "data": {"sha256": "a", "part": "train"}}, "raised"),
        ({"run": {"data": "a", "parts": ["train", "test"]}, "data": {"sha256": "a", "part": "test"}}, "raised"),
        ({"run": {"data": "a"}, "data": {"sha256": "a", "part": "test", "in_training": N}}, "raised"),
        ({"run": {"data": "a"}, "data": {"sha256": "a", "part": "test", "in_training": 0}}, "clear"),
        ({"run": {}, "data": {"sha256": "a", "part": "test", "copies": N}}, "raised"),
        ({"run": {"data": "a"}, "data": {"sha256": "a", "part": "test", "copies": 0}}, "clear"),
        ({"run": {"data": "b"}, "data": {"sha256": "a", "part": "train"}}, "not_run"),
        ({"run": {}, "data": {"sha256": "a", "part": "test"}}, "not_run"),
        ({}, "not_run"),
    ],
)
def test_images_that_were_seen_are_noticed(
    fragile: Classifier, digits: Dataset, facts: dict[str, Any], outcome: str
) -> None:
    """The manifest says which part of which data was trained on; what nobody says is not checked."""
    assert run("seen_images", fragile, digits, about=facts).outcome == outcome


def test_repeated_images_are_counted(digits: Dataset) -> None:
    """Byte for byte: three training images among the tests are three, and one changed value makes another image."""
    mixed = np.concatenate([digits.x_test[:5], digits.x_train[:3]])
    assert repeated(mixed, np.asarray(digits.x_train)) == 3
    mixed[-1, 0, 0, 0] ^= 1
    assert repeated(mixed, np.asarray(digits.x_train)) == 2
    assert copies(mixed, np.arange(len(mixed))) == 0
    assert copies(np.concatenate([mixed, mixed[:3]]), np.arange(len(mixed) + 3)) == 3


def test_square_in_the_suite_may_not_beat_its_white_box(fragile: Classifier, digits: Dataset) -> None:
    """APGD-T against three-bit inputs leaves what Square breaks; on the honest twin nothing is left to break."""
    deceit = sprung("3-bit input", fragile, digits.x_test[:N], digits.y_test[:N])
    suite = ("apgd-t-5", "square-60")
    for model, outcomes in ((deceit, ("raised",)), (fragile, ("clear", "not_run"))):
        evaluation = attacked(model, digits, *suite, cascade=True).evaluation
        found = CHECKS["black_box_stronger"].run(examine(None, digits, fragile, evaluation=evaluation))
        assert found.outcome in outcomes


def test_plain_ascents_may_not_beat_constraint_relaxation(fragile: Classifier, digits: Dataset) -> None:
    """By the guard in the suite, and by PGD in the check where the suite has none; the honest twin raises nothing."""
    known = to_float(torch.from_numpy(digits.x_test[:N])), torch.from_numpy(digits.y_test[:N])
    deceit = Corners(copy.deepcopy(fragile).eval(), *known)
    for suite in (SUITES["fast"], ("cr",)):
        for model, outcomes in ((deceit, ("raised",)), (fragile, ("clear", "not_run"))):
            evaluation = attacked(model, digits, *suite, cascade=True).evaluation
            found = run("cr_is_blind", model, digits, evaluation=evaluation)
            assert found.outcome in outcomes, (suite, found.why)
    without = attacked(deceit, digits, "pgd-5").evaluation
    assert run("cr_is_blind", deceit, digits, evaluation=without).outcome == "not_run"


def test_transfer_may_not_beat_the_white_box(fragile: Classifier, digits: Dataset) -> None:
    """What the honest twin gave away breaks what APGD-T left of three-bit inputs: raised; not after PGD alone."""
    deceit = sprung("3-bit input", fragile, digits.x_test[:N], digits.y_test[:N])
    transfer = attacked(deceit, digits, "mi-fgsm-10", source=fragile).evaluation
    for attack, outcome in (("apgd-t-5", "raised"), ("pgd-5", "not_run")):
        white = attacked(deceit, digits, attack).evaluation
        e = examine(None, digits, fragile, evaluation=white, transfer=[transfer])
        assert CHECKS["black_box_stronger"].run(e).outcome == outcome


@pytest.mark.parametrize(
    ("suite", "outcome"),
    [
        (("pgd-5",), "raised"),
        (("pgd-5", "apgd-t-5"), "clear"),
    ],
)
def test_a_scale_hides_only_what_nobody_saw(
    fragile: Classifier, digits: Dataset, suite: tuple[str, ...], outcome: str
) -> None:
    """Logits times 100 saturate PGD and not APGD-T, whose loss is a ratio: with it in the suite nothing is hidden."""
    deceit = sprung("logits x 100", fragile, digits.x_test[:N], digits.y_test[:N])
    evaluation = attacked(deceit, digits, *suite).evaluation
    found = run("scale_hides", deceit, digits, evaluation=evaluation)
    assert found.outcome == outcome
    p = found.figures["p"]
    assert isinstance(p, float)
    assert p <= LEVEL / 2  # said all the same


def test_a_scale_may_not_hide_from_the_suite(fragile: Classifier, digits: Dataset) -> None:
    """An APGD-T that broke nothing of what falls at another scale only is not believed, however many it tried."""
    deceit = sprung("logits x 100", fragile, digits.x_test[:N], digits.y_test[:N])
    for images in (N // 2, 2 * N):
        every = (True,) * images
        weak = Evaluation(THREAT, True, 0, every, (AttackRecord("apgd-t-5", {}, every, every, 0, 1.0),), 1.0)
        found = run("scale_hides", deceit, digits, evaluation=weak)
        assert found.outcome == "raised", found.why
        tried = found.figures["left"]
        assert isinstance(tried, int)
        assert tried <= images
        assert "the suite left" in found.why
        # What falls at every scale shows that the suite is weak, and nothing about scales.
        assert run("scale_hides", fragile, digits, evaluation=weak).outcome == "clear"


def test_a_square_that_came_first_has_beaten_nobody(fragile: Classifier, digits: Dataset) -> None:
    """In a cascade the first attack takes what the others would have taken as well: no comparison is made of that."""
    evaluation = attacked(fragile, digits, "square-60", "apgd-t-5", cascade=True).evaluation
    e = examine(None, digits, fragile, evaluation=evaluation)
    assert CHECKS["black_box_stronger"].run(e).outcome in ("clear", "not_run")


@given(st.integers(1, 128))
def test_chance_raises_a_comparison_at_its_level(differing: int) -> None:
    """If each attack is as likely to break an image alone, the weaker one is called stronger as often as allowed."""
    chance = 0.0
    for only in range(differing + 1):
        if surplus("a", "b", only, partial(int, differing - only), 128).outcome == "raised":
            chance += float(binom.pmf(only, differing, 0.5))
    assert chance <= LEVEL


def test_a_comparison_has_to_be_sure_and_clear() -> None:
    """Eleven that only the weaker attack broke are not sure, twelve are; of 1,000 images they are no clear surplus."""
    assert surplus("a", "b", 11, int, 128).outcome == "clear"
    assert surplus("a", "b", 12, int, 128).outcome == "raised"
    assert surplus("a", "b", int(1000 * CLEARLY) - 1, int, 1000).outcome == "clear"
    assert surplus("a", "b", int(1000 * CLEARLY), int, 1000).outcome == "raised"


def test_nothing_is_asked_that_cannot_tell(fragile: Classifier, digits: Dataset) -> None:
    """Where PGD breaks all images, no other attack is made for a comparison with it; where it leaves too few, they are
    not made on those that it broke."""

    def forbidden() -> int:
        raise AssertionError("asked")

    assert surplus("a", "b", 11, forbidden, 128).outcome == "clear"
    e = examine(fragile, digits)
    e.pgd = np.ones(e.right, bool)
    e._attack = None  # type: ignore[assignment, method-assign]  # an attack would fail
    for check in ("fgsm_beats_pgd", "weaker_with_steps", "scale_hides"):
        assert CHECKS[check].run(e).outcome == "clear"
    assert CHECKS["black_box_stronger"].run(e).outcome == "not_run"


@settings(max_examples=30)
@given(st.integers(8, 128), st.integers(1, 6), st.integers(1, 99))
def test_a_count_that_ends_early_finds_what_the_whole_would(of: int, ways: int, percent: int) -> None:
    """Looked at after every 5 images, at any rate: all of them are at most 3 % more often significant, and what ends
    early never is."""
    enough, rate = next(k for k in range(of + 1) if binom.sf(k - 1, of, 0.05) <= LEVEL / ways), percent / 100
    going, ended = np.zeros(of + 1), 0.0  # the chance of k so far, and that of a whole that was cut off
    going[0] = 1.0
    for begin in range(0, of, 5):
        more = min(5, of - begin)
        going = np.convolve(going, binom.pmf(np.arange(more + 1), more, rate))[: of + 1]
        for k in range(begin + more + 1):
            if begin + more < of and hopeless(k, begin + more, of, 0.05, ways):
                assert too_many({str(way): (k, begin + more) for way in range(ways)}, "", 0.05).outcome == "clear"
                ended += going[k] * binom.sf(enough - k - 1, of - begin - more, rate)
                going[k] = 0.0
    assert ended <= 0.03
    first = first_look(of, 0.05, ways)
    assert first == of or (hopeless(0, first, of, 0.05, ways) and not hopeless(0, first - 1, of, 0.05, ways))


@given(st.integers(1, 200), st.integers(1, 5))
def test_chance_raises_a_count_at_its_level(n: int, ways: int) -> None:
    """At the tolerated rate, in each of several ways, the chance of a finding is at most the level over all of them."""
    first = next((k for k in range(n + 1) if too_many({"a": (k, n)}, "", 0.05).outcome == "raised"), n + 1)
    assert binom.sf(first - 1, n, 0.05) <= LEVEL
    others = {str(number): (0, n) for number in range(ways - 1)}
    first = next((k for k in range(n + 1) if too_many({"a": (k, n), **others}, "", 0.05).outcome == "raised"), n + 1)
    assert ways * binom.sf(first - 1, n, 0.05) <= LEVEL


def test_labels_that_hang_by_a_thread_are_no_memory(fragile: Classifier, robust: Classifier, digits: Dataset) -> None:
    """Own answers as labels, half of them where the answer changes between two images: noise breaks many, and says
    nothing. A table of the same images, which breaks as many, is still found out."""
    x = to_float(torch.from_numpy(digits.x_test[:N]))
    decide = exactly(fragile)
    begin, end = x.clone(), x.flip(0)
    begin, end = (side[decide(x).argmax(1) != decide(x.flip(0)).argmax(1)] for side in (begin, end))
    first = decide(begin).argmax(1)
    for _ in range(7):  # down to less than a grey level
        middle = (begin + end) / 2
        same = (decide(middle).argmax(1) == first).view(-1, 1, 1, 1)
        begin, end = torch.where(same, middle, begin), torch.where(same, end, middle)
    images = to_bytes(torch.cat([begin, x])).numpy()
    labels = decide(to_float(torch.from_numpy(images))).argmax(1).numpy()

    def found(model: nn.Module) -> Found:
        with frozen(model), torch.no_grad():
            return only_exact_images(Examination(model, exactly(model), images, labels, THREAT, grid=True, seed=0))

    lost = Examination(fragile, decide, images, labels, THREAT, grid=True, seed=0)
    noisy = right(lost.under_noise(1 / 255), lost.y)
    assert int((~noisy).sum()) > 0.1 * len(labels)
    assert found(fragile).outcome == "clear", found(fragile).why
    memory = sprung("memory", fragile, images, labels, robust)
    assert found(memory).outcome == "raised", found(memory).why
