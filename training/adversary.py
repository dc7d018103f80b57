"""Attacks as training needs them: the last iterate, no image leaves the batch, no decision is taken.

Each is `craft(model, x, y, eps, noise, ...) -> x_adv` on a frozen model: x `(N, C, H, W)` in [0, 1], eps in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dfmcl.robustness.attacks.registry import Loss, Model, climb, fgsm
from dfmcl.robustness.losses import cross_entropy, margin
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.linf import Linf
from dfmcl.training.noise import Noise

Craft = Callable[..., Tensor]


def single_step(model: Model, x: Tensor, y: Tensor, eps: float, noise: Noise, **unused: float) -> Tensor:
    """FGSM from the image itself. Goodfellow et al. 2015."""
    return fgsm(model, x, y, Linf(eps), generator=noise.generator)


def noisy_single_step(model: Model, x: Tensor, y: Tensor, eps: float, noise: Noise, **unused: float) -> Tensor:
    """N-FGSM: noise of twice the radius, one step of length eps, no way back into the ball. de Jorge et al. 2022."""
    point = (x + 2 * eps * (2 * noise.uniform(*x.shape) - 1)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
    return (point.detach() + eps * gradient.sign()).clamp(0, 1)


def iterated(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    noise: Noise,
    *,
    steps: int,
    step_ratio: float,
    loss: Loss = cross_entropy,
    ball: type[Ball] = Linf,
    **unused: float,
) -> Tensor:
    """PGD from a random point of the ball, `steps` steps of step_ratio * eps / steps. Madry et al. 2018."""
    initial = x + eps * (2 * noise.uniform(*x.shape) - 1)
    return climb(
        model,
        x,
        y,
        ball(eps),
        generator=noise.generator,
        loss=loss,
        steps=steps,
        step_size=step_ratio * eps / steps,
        random_start=False,
        initial=initial,
        keep="last",
    )


def divergent(
    model: Model, x: Tensor, y: Tensor, eps: float, noise: Noise, *, steps: int, step_ratio: float, **unused: float
) -> Tensor:
    """PGD on KL(f(x) || f(x_adv)), which needs no label: the attack of TRADES. Zhang et al. 2019."""
    with torch.no_grad():
        clean = torch.softmax(model(x), dim=1)
    # KL and cross-entropy against the same targets differ by a constant.
    return iterated(model, x, clean, eps, noise, steps=steps, step_ratio=step_ratio, loss=soft_cross_entropy)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_k target_k log softmax(logits)_k for each image: `(N, K)` twice to `(N,)`."""
    return -(target * functional.log_softmax(logits, dim=1)).sum(dim=1)


CRAFTS: dict[str, Craft] = {
    "fgsm": single_step,
    "n-fgsm": noisy_single_step,
    "pgd": iterated,
    "cw": partial(iterated, loss=margin),  # the margin loss of C&W inside the eps-ball
    "kl": divergent,
}
