"""Attacks against a linear model, where the best possible perturbation is known in closed form."""

from __future__ import annotations

import pytest
import torch

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.registry import ATTACKS, Attack, climb
from dfmcl.robustness.attacks.suites import WITHOUT_GRADIENTS
from dfmcl.robustness.losses import cross_entropy, margin
from dfmcl.robustness.models import frozen
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import threat_of
from tests.linear import Linear, images
from tests.robustness.test_apgd import network

SHAPE = (3, 6, 6)
GRADIENT_ATTACKS = ["fgsm", "pgd-20", "margin-pgd-20", "mi-fgsm-10", "pgd-10x3", "apgd-ce-20"]


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(name: str, model: Linear, x: torch.Tensor, threat: Ball) -> torch.Tensor:
    y = model(x).argmax(dim=1)
    with frozen(model):
        return Attack.parse(name)(model, x, y, threat, generator=stream())


def test_the_oracle_is_right() -> None:
    """Moving by the closed-form distance lands exactly on the border, in both norms."""
    model, x = Linear(SHAPE), images(5, SHAPE)
    linf = x - model.least(x, "linf").view(-1, 1, 1, 1) * model.weight.sign()
    l2 = x - model.least(x, "l2").view(-1, 1, 1, 1) * model.weight / model.weight.norm()
    assert model.score(linf).abs().max() < 1e-4
    assert model.score(l2).abs().max() < 1e-4


@pytest.mark.parametrize("count", [0, 1, 3, 8])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_attack_crosses_just_beyond_the_optimum_and_never_before(name: str, norm: str, count: int) -> None:
    """2 % beyond the closed-form distance every image falls; 2 % short of it none can."""
    model, x = Linear(SHAPE), images(count, SHAPE)
    y = model(x).argmax(dim=1)
    least = model.least(x, norm)
    for factor, fooled in ((1.02, True), (0.98, False)):
        for i in range(count):
            threat = threat_of(norm, factor * least[i].item())
            x_adv = run(name, model, x[i : i + 1], threat)
            assert threat.contains(x_adv, x[i : i + 1]).all()
            assert (model(x_adv).argmax(dim=1) != y[i]).item() is fooled
    assert run(name, model, x, threat_of(norm, 0.01)).shape == x.shape


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_attack_reaches_the_best_loss_where_nothing_falls(name: str, norm: str) -> None:
    """On a linear model the highest loss in the ball is known; every gradient attack gets there."""
    model, x = Linear(SHAPE), images(4, SHAPE)
    y = model(x).argmax(dim=1)
    eps = 0.5 * model.least(x, norm).min().item()
    dual = model.weight.abs().sum() if norm == "linf" else model.weight.norm()
    before = margin(model(x), y)
    gained = (margin(model(run(name, model, x, threat_of(norm, eps))), y) - before) / (eps * dual)
    assert (gained <= 1.001).all()
    # L2 with a fixed step and a random start closes the angle by e^-2.5 a run: cos is then 0.97 to 0.99.
    assert (gained >= (0.999 if norm == "linf" else 0.95)).all()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_cw_finds_the_least_l2_perturbation(count: int) -> None:
    """C&W lands beyond the border, at most 5 % farther away than the closed-form optimum."""
    model, x = Linear(SHAPE), images(count, SHAPE)
    y = model(x).argmax(dim=1)
    x_adv = run("cw-l2-200", model, x, L2(10.0))
    assert (model(x_adv).argmax(dim=1) != y).all()
    ratio = L2.lengths(x_adv - x) / model.least(x, "l2")
    assert (ratio >= 0.999).all()
    assert (ratio <= 1.05).all()


@pytest.mark.parametrize("name", [*GRADIENT_ATTACKS, "cw-l2-5", "square-30", "subspace-3x2", "square-subspace-30"])
def test_attack_is_repeatable_and_changes_nothing(name: str) -> None:
    """Same seed, same bytes; inputs, weights and training mode are as before."""
    model, x = Linear(SHAPE).train(), images(3, SHAPE)
    before, weight = x.clone(), model.weight.detach().clone()
    threat = Linf(0.01)
    assert torch.equal(run(name, model, x, threat), run(name, model, x, threat))
    assert torch.equal(x, before)
    assert torch.equal(model.weight, weight)
    assert model.training
    assert model.weight.requires_grad
    assert model.weight.grad is None


def test_a_fooled_image_leaves_the_batch() -> None:
    """Once everything is fooled no further pass is paid for."""
    model, x = Linear(SHAPE), images(4, SHAPE)
    y = model(x).argmax(dim=1)
    passes = []

    def counted(point: torch.Tensor) -> torch.Tensor:
        passes.append(len(point))
        return model(point)

    easy = Linf(3 * model.least(x, "linf").max().item())
    climb(counted, x, y, easy, generator=stream(), steps=50, step_size=easy.eps, random_start=False)
    assert passes == [4, 4]


def test_training_keeps_the_last_iterate() -> None:
    """keep="last" goes on to the strongest point although the image fell on the way."""
    model, x = Linear(SHAPE), images(4, SHAPE)
    y = model(x).argmax(dim=1)
    threat = Linf(3 * model.least(x, "linf").max().item())
    first = climb(model, x, y, threat, generator=stream(), steps=10, random_start=False)
    last = climb(model, x, y, threat, generator=stream(), steps=10, random_start=False, keep="last")
    assert (cross_entropy(model(last), y) > cross_entropy(model(first), y)).all()


def test_restarts_only_help() -> None:
    """The worst case over three restarts is at least as bad as that of the first one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x = images(32, SHAPE)
    y = model(x).argmax(dim=1)
    threat = Linf(0.004)
    with frozen(model):
        once = climb(model, x, y, threat, generator=stream(), steps=2)
        thrice = climb(model, x, y, threat, generator=stream(), steps=2, restarts=3)
    value = lambda point: margin(model(point), y).detach()  # noqa: E731  # one line reads better than three here
    assert ((value(thrice) >= value(once) - 1e-6) | (value(thrice) > 0)).all()


@pytest.mark.parametrize(
    "text",
    [
        *("pgd-0", "pdg-20", "fgsm-3", "pgd-20x0", "cw-l2-10x2", "square-9x2", "rays-9x2", "apgd", "", "pgd 20"),
        *("vmi-fgsm-10x2", "square-subspace-9x2", "subspace-0", "subspace-9@1/255"),
        *("fgsm@1/255", "apgd-t@eps/4", "square-9@1/255", "pgd-9@0", "pgd-9@-1/255"),
    ],
)
def test_unknown_attack_is_refused(text: str) -> None:
    """A misspelt attack is bad input, never silently another one."""
    with pytest.raises(BadInput, match="attack"):
        Attack.parse(text)


@pytest.mark.parametrize("text", ["pgd-9@", "pgd-9@eps", "pgd-9@eps/0", "pgd-9@eps/-4", "pgd-9@1/255@2/255"])
def test_a_step_that_is_no_length_is_refused(text: str) -> None:
    """A misspelt step is bad input, never the default."""
    with pytest.raises(BadInput, match=r"eps|step"):
        Attack.parse(text)


@pytest.mark.parametrize(
    ("text", "step"), [("@2/255", 2 / 255), ("@eps/4", 0.01), ("@0.003", 0.003), ("", 2.5 * 0.004)]
)
def test_a_name_can_say_how_long_a_step_is(text: str, step: float) -> None:
    """In pixel units or by the radius; the record keeps what was written."""
    model, x = network(), images(30, SHAPE)  # a curved loss: where an image comes to rest depends on the step
    y, threat = model(x).argmax(dim=1), Linf(0.04)
    attack = Attack.parse(f"pgd-10x2{text}")
    by_name = attack(model, x, y, threat, generator=stream())
    by_number = climb(model, x, y, threat, generator=stream(), steps=10, restarts=2, step_size=step)
    assert torch.equal(by_name, by_number)
    assert attack.parameters == {"steps": 10, "restarts": 2} | ({"step_size": text[1:]} if text else {})


def test_a_suite_is_a_name_or_a_list() -> None:
    """`standard` is AutoAttack's four and the subspaces; what is misspelt, empty or doubled is refused."""
    standard = ["apgd-ce", "apgd-t", "fab-t", "square", "subspace-10"]
    assert [attack.name for attack in Attack.parse_suite("standard")] == standard
    assert [attack.name for attack in Attack.parse_suite("fast")] == ["cr", "apgd-ce-20", "subspace-10"]
    assert [attack.name for attack in Attack.parse_suite(["pgd-20", "rays-9"])] == ["pgd-20", "rays-9"]
    for suite in ("strong", [], ["fgsm", "fgsm"], ["pdg-20"]):
        with pytest.raises(BadInput, match="attack"):
            Attack.parse_suite(suite)


def test_a_reader_without_torch_knows_which_attacks_are_blind() -> None:
    """Two lists of one fact, as policies are read where there is no torch."""
    assert {name for name, kind in ATTACKS.items() if not kind.gradients} == set(WITHOUT_GRADIENTS)


def test_every_attack_has_a_name() -> None:
    """Each entry of the dict can be asked for by name, whatever letters it ends in."""
    assert {name: Attack.parse(name).kind for name in ATTACKS} == ATTACKS
