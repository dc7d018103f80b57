"""Updates against loops that anybody could write: the fast paths, the twins and the switches change no result."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dfmcl.robustness.data import Dataset
from dfmcl.robustness.models import Classifier, to_float
from dfmcl.robustness.seeds import generator
from dfmcl.training.augmentation import augment
from dfmcl.training.train import build
from tests.present import present
from tests.training.workshop import PLAIN, batch, learner

# In float64 no sign of a gradient hangs on rounding: the order of sums, and with it the processor, changes nothing.
EXACT = torch.float64
CLOSE = 1e-9  # measured: 1e-11, on every instruction set tried


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """All parameters and statistics alike."""
    for (key, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=CLOSE), key


def test_golden_losses_of_the_plain_loop(digits: Dataset) -> None:
    """Five PGD updates equal those of the loop that everybody writes: mode switches, weight gradients, NCHW."""
    changes = [*PLAIN, "curriculum.attacks=['pgd']", "optimization.optimizer=sgd", "optimization.lr=0.05"]
    fast = learner(digits, *changes, "optimization.weight_decay=5e-4", dtype=EXACT)
    model = build(fast.config, digits).to(EXACT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(1, 6):
        images, y = batch(digits, step)
        loss = fast.update(images, y, step)

        stream = generator(0, "step", step)
        x = to_float(augment(images, stream, "crop")).to(EXACT)
        x_adv = x + 8 / 255 * (2 * torch.rand(x.shape, generator=stream) - 1)
        x_adv = x_adv.clamp(0, 1)
        for _ in range(2):
            model.eval()
            x_adv = x_adv.detach().requires_grad_(True)
            functional.cross_entropy(model(x_adv), y, reduction="sum").backward()
            moved = x_adv + 2.5 * 8 / 255 / 2 * present(x_adv.grad).sign()
            x_adv = torch.min(torch.max(moved, x - 8 / 255), x + 8 / 255).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        expected = functional.cross_entropy(model(x_adv.detach()), y)
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=CLOSE)
    assert_same_weights(fast.model, model)


EPS = 8 / 255
SMOOTHING = 10 / 64  # exact in the float32 of ours' target
EVERYTHING = [
    *PLAIN,
    "curriculum.attacks=['kl']",
    f"objective.label_smoothing={SMOOTHING}",
    "objective.views=1",
    "objective.view_augmentation=crop-flip",
    "objective.consistency=4.0",
    "optimization.optimizer=sgd",
    "optimization.lr=0.02",
    "optimization.awp=0.05",
]


def kl_attack(model: Classifier, x: Tensor, stream: torch.Generator) -> Tensor:
    """Two PGD steps on KL(f(x) || f(x_adv)) in eval mode."""
    model.eval()
    with torch.no_grad():
        clean = torch.softmax(model(x), dim=1)
    x_adv = (x + EPS * (2 * torch.rand(x.shape, generator=stream) - 1)).clamp(0, 1)
    for _ in range(2):
        x_adv = x_adv.detach().requires_grad_(True)
        divergence = functional.kl_div(functional.log_softmax(model(x_adv), dim=1), clean, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, x_adv)
        moved = x_adv + 2.5 * EPS / 2 * gradient.sign()
        x_adv = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return x_adv.detach()


def objective(name: str, model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """TRADES or MART with lambda 6 and smoothing; returns the mean loss and the clean logits."""
    clean, adversarial = model(x), model(x_adv)
    p, log_q = torch.softmax(clean, dim=1), functional.log_softmax(adversarial, dim=1)
    divergence = functional.kl_div(log_q, p, reduction="none").sum(dim=1)
    if name == "trades":
        return functional.cross_entropy(clean, y, label_smoothing=SMOOTHING) + 6 * divergence.mean(), clean
    own = functional.one_hot(y, 10).bool()
    margin = -(1.0001 - log_q.exp().masked_fill(own, 0).amax(dim=1)).log()
    weighted = 6 * divergence * (1 - p[own])
    return functional.cross_entropy(adversarial, y, label_smoothing=SMOOTHING) + (margin + weighted).mean(), clean


def consistency(logits: Sequence[Tensor]) -> Tensor:
    """Jensen-Shannon divergence through torch's own KL."""
    p, q = (torch.softmax(z, dim=1) for z in logits)
    middle = ((p + q) / 2).log()
    return (
        functional.kl_div(middle, p, reduction="batchmean") + functional.kl_div(middle, q, reduction="batchmean")
    ) / 2


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_golden_losses_with_every_ingredient(digits: Dataset, name: str) -> None:
    """Three updates with a KL attack, a view with batch norms of its own, consistency, smoothing and AWP."""
    fast = learner(digits, *EVERYTHING, f"objective.name={name}", dtype=EXACT)
    first = build(fast.config, digits).to(EXACT)
    second = copy.deepcopy(first)
    for ours, theirs in zip(first.modules(), second.modules(), strict=True):
        if isinstance(ours, nn.Conv2d | nn.Linear):
            for key, weight in ours.named_parameters():
                setattr(theirs, key, weight)  # shared; only batch norms are the view's own
    parameters = list({id(p): p for net in (first, second) for p in net.parameters()}.values())
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True)
    for step in range(1, 4):
        images, y = batch(digits, step)
        loss = fast.update(images, y, step)

        stream = generator(0, "step", step)
        views = [to_float(augment(images, stream, kind)).to(EXACT) for kind in ("crop", "crop-flip")]
        attacked = [kl_attack(net, x, stream) for net, x in zip((first, second), views, strict=True)]
        worst = copy.deepcopy(first)  # a copy, so that batch norm counts nothing
        objective(name, worst, views[0], attacked[0], y)[0].backward()
        kept = copy.deepcopy(first.state_dict())
        with torch.no_grad():
            for weight, other in zip(first.parameters(), worst.parameters(), strict=True):
                if weight.dim() > 1:
                    gradient = present(other.grad)
                    weight.add_(gradient * 0.05 * weight.norm() / gradient.norm())
        (one, clean), (two, clean_view) = (
            objective(name, net, x, x_adv, y) for net, x, x_adv in zip((first, second), views, attacked, strict=True)
        )
        expected = (one + two) / 2 + 4 * consistency((clean, clean_view))
        optimizer.zero_grad()
        expected.backward()
        with torch.no_grad():
            for key, weight in first.named_parameters():
                if weight.dim() > 1:
                    weight.copy_(kept[key])
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=CLOSE), step
    for net, reference in zip(fast.networks, (first, second), strict=True):
        assert_same_weights(net, reference)


@pytest.mark.parametrize("masks", [False, True])
def test_bfloat16_gradients_reach_every_weight(digits: Dataset, masks: bool) -> None:
    """Matrices, kernels and head: gradients as in float32. A cast cached without gradient would leave out the head."""
    gradients = []
    for precision in ("float32", "bfloat16"):
        options = [PLAIN[0].replace("false", str(masks).lower()), *PLAIN[1:], "curriculum.attacks=[]", "model.width=16"]
        one = learner(digits, *options, f"optimization.precision={precision}", "masking.rule=ranked")
        one.loss(*batch(digits), 1)
        gradients.append({name: p.grad for name, p in one.model.named_parameters()})
    for name, exact in gradients[0].items():
        rough = gradients[1][name]
        assert exact is not None, name
        assert rough is not None, name
        assert functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.5, (
            name
        )  # 0.78 for the worst, by rounding
        assert 0.5 < rough.norm() / exact.norm() < 2, name
