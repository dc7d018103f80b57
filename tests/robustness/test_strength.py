"""As strong as the field's own: the same images, the same network, the same budgets, image by image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import foolbox
import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor

from robustness.attacks import SUITES, Attack
from robustness.evaluate import evaluate
from robustness.geometry import contains
from robustness.models import Classifier, to_bytes
from robustness.threat import Threat

# Radii at which between 20 and 60 % of the images hold; a test says so first.
THREATS = {"linf": Threat.parse("linf", "22/255"), "l2": Threat("l2", 1.3)}
NORMS = {"linf": "Linf", "l2": "L2"}
ALLOWED = 1  # of 200 images: half a point

# Ours, at a budget, and its twin at the same one. torchattacks' Square counts its first query apart.
TWINS: dict[str, Callable[..., Any]] = {
    "apgd-ce-20": lambda model, **told: torchattacks.APGD(model, steps=20, **told),
    "apgd-t-12": lambda model, **told: torchattacks.APGDT(model, steps=12, n_classes=10, **told),
    "fab-t-6": lambda model, **told: torchattacks.FAB(model, steps=6, n_classes=10, multi_targeted=True, **told),
    "square-150": lambda model, **told: torchattacks.Square(model, n_queries=149, **told),
}
# Compared one by one, by means over so many seeds: FAB draws nothing, and a seed of APGD-T is nine runs. Square is
# compared below, over more: torchattacks' spreads by 6 images, as all of them get the same patch.
SEEDS = {"apgd-ce-20": 2, "apgd-t-12": 1, "fab-t-6": 1}

# foolbox's by norm. A step of 2.5 eps / steps is the default of ours; its C&W takes ours' defaults.
PEERS: dict[str, dict[str, Callable[[float], Any]]] = {
    "fgsm": {
        "linf": lambda eps: foolbox.attacks.LinfFastGradientAttack(),
        "l2": lambda eps: foolbox.attacks.L2FastGradientAttack(),
    },
    "pgd-10": {
        "linf": lambda eps: foolbox.attacks.LinfPGD(steps=10, abs_stepsize=0.25 * eps),
        "l2": lambda eps: foolbox.attacks.L2PGD(steps=10, abs_stepsize=0.25 * eps),
    },
    "cw-l2-10": {
        "l2": lambda eps: foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=6, steps=10, stepsize=0.05, initial_const=1.0, abort_early=False
        ),
    },
}


def ours(model: Classifier, digits: tuple[Tensor, Tensor], threat: Threat, name: str, seed: int = 0) -> Any:
    """Per image whether it holds, in float32."""
    x, y = digits
    found = evaluate(model, to_bytes(x).numpy(), y.numpy(), threat, [Attack.parse(name)], seed=seed)
    return np.array(found.evaluation.robust_images)


def theirs(model: Classifier, digits: tuple[Tensor, Tensor], threat: Threat, attack: Callable[..., Tensor]) -> Any:
    """The same of another library's attack: what it returns outside the ball does not count."""
    x, y = digits
    x_adv = attack(x, y)
    with torch.no_grad():
        fooled = (model(x_adv).argmax(dim=1) != y) & contains(x_adv, x, threat)
        return (~fooled & (model(x).argmax(dim=1) == y)).numpy()


@pytest.fixture(scope="module")
def held(hardened: Classifier, digits: tuple[Tensor, Tensor]) -> Callable[[str, str, int], Any]:
    """Attack, norm and seed to which images hold, `(2, N)`: under ours and under its twin; each asked once."""

    @cache
    def asked(name: str, norm: str, seed: int) -> Any:
        threat = THREATS[norm]
        twin = TWINS[name](hardened, norm=NORMS[norm], eps=threat.eps, seed=seed)
        return np.stack([ours(hardened, digits, threat, name, seed), theirs(hardened, digits, threat, twin)])

    return asked


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", SEEDS)
def test_no_attack_is_weaker_than_its_twin(held: Callable[[str, str, int], Any], name: str, norm: str) -> None:
    """At the same budget no more images hold under ours, up to half a point."""
    counts = np.array([held(name, norm, seed).sum(axis=1) for seed in range(SEEDS[name])])
    mine, twin = counts.mean(axis=0)
    assert mine <= twin + ALLOWED, counts
    assert twin < 200 * 0.95, "an attack that finds next to nothing proves nothing"


@pytest.mark.parametrize("norm", THREATS)
def test_a_short_square_is_stronger_than_its_twin(
    hardened: Classifier, digits: tuple[Tensor, Tensor], norm: str
) -> None:
    """Few queries are spent on large patches: 40 break more images than torchattacks' 40, by means of four seeds."""
    threat, counts = THREATS[norm], list[tuple[int, int]]()
    for seed in range(4):
        twin = torchattacks.Square(hardened, norm=NORMS[norm], eps=threat.eps, n_queries=39, seed=seed)
        mine = ours(hardened, digits, threat, "square-40", seed)
        counts.append((int(mine.sum()), int(theirs(hardened, digits, threat, twin).sum())))
    mine, peer = np.mean(counts, axis=0)
    assert mine < peer, counts


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, norms in PEERS.items() for norm in norms])
def test_no_simple_attack_is_weaker_than_foolbox(
    hardened: Classifier, digits: tuple[Tensor, Tensor], name: str, norm: str
) -> None:
    """At the same steps and step size no more images hold under ours, up to half a point."""
    threat, network = THREATS[norm], foolbox.PyTorchModel(hardened, bounds=(0, 1))
    torch.manual_seed(0)  # foolbox draws from the global stream
    attack = PEERS[name][norm](threat.eps)
    peer = theirs(hardened, digits, threat, lambda x, y: attack(network, x, y, epsilons=threat.eps)[1])
    mine = ours(hardened, digits, threat, name)
    assert mine.sum() <= peer.sum() + ALLOWED
    assert peer.sum() < 200 * 0.9, "an attack that finds next to nothing proves nothing"


@pytest.mark.parametrize("norm", THREATS)
def test_our_standard_suite_is_as_strong_as_autoattack(held: Callable[[str, str, int], Any], norm: str) -> None:
    """Per image the worst case of the four attacks, beside that of torchattacks' four at the same budgets."""
    assert [name.rpartition("-")[0] for name in TWINS] == list(SUITES["standard"])
    mine, reference = np.all([held(name, norm, 0) for name in TWINS], axis=0)
    assert 0.2 <= reference.mean() <= 0.6, "no test asset: almost all images hold, or almost none"
    assert mine.sum() <= reference.sum() + ALLOWED
