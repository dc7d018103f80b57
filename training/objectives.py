"""What training minimises, per image: a loss of logits on clean and on adversarial images, `(N, K)` each, to `(N,)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dfmcl.training.adversary import soft_cross_entropy

Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def smoothed(y: Tensor, classes: int, smoothing: float) -> Tensor:
    """Label distributions `(N, K)`: 1 - smoothing on the label, the rest spread evenly. Szegedy et al. 2016."""
    return functional.one_hot(y, classes).float() * (1 - smoothing) + smoothing / classes


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) for each image, in nats."""
    log_p, log_q = functional.log_softmax(p_logits, dim=1), functional.log_softmax(q_logits, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def trades(clean: Tensor, adversarial: Tensor, target: Tensor, regularization: float) -> Tensor:
    """CE(clean) + lambda * KL(clean || adversarial). Zhang et al. 2019, lambda = 1 / their lambda (6 is usual)."""
    return soft_cross_entropy(clean, target) + regularization * kl(clean, adversarial)


def mart(clean: Tensor, adversarial: Tensor, target: Tensor, regularization: float) -> Tensor:
    """Boosted CE(adversarial) + lambda * KL(clean || adversarial) * (1 - p_clean[y]). Wang et al. 2020.

    The boosted loss adds -log(1 - the largest wrong probability), as the authors' code does with 1.0001.
    """
    label = target.argmax(dim=1, keepdim=True)
    others = torch.softmax(adversarial, dim=1).scatter(1, label, 0.0).amax(dim=1)
    own = torch.softmax(clean, dim=1).gather(1, label).squeeze(1)
    boosted = soft_cross_entropy(adversarial, target) - torch.log(1.0001 - others + 1e-12)
    return boosted + regularization * kl(clean, adversarial) * (1 - own)


def jensen_shannon(views: Sequence[Tensor]) -> Tensor:
    """Jensen-Shannon divergence of the predictions of several views, per image, in nats. Hendrycks et al. 2020."""
    predictions = [torch.softmax(logits, dim=1) for logits in views]
    mixture = torch.stack(predictions).mean(dim=0).clamp_min(1e-7).log()
    divergences = [(p * (p.clamp_min(1e-7).log() - mixture)).sum(dim=1) for p in predictions]
    return torch.stack(divergences).mean(dim=0)


OBJECTIVES: dict[str, Objective] = {
    "ce": lambda clean, adversarial, target, regularization: soft_cross_entropy(adversarial, target),
    "trades": trades,
    "mart": mart,
}
