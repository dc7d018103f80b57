"""Adversarial weight perturbation: the loss is taken where a small step of the weights is worst. Wu et al. 2020."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def perturbed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are perturbed: tensors of two dimensions or more, as the authors do; no frozen one."""
    return [parameter for parameter in model.parameters() if parameter.dim() > 1 and parameter.requires_grad]


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], gamma: float) -> Iterator[None]:
    """Inside: each weight tensor w is w + gamma * |w| / |g| * g (norms of the whole tensor). Outside: w, to the bit."""
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        weight_norms = torch._foreach_norm(kept)
        gradient_norms = torch._foreach_norm(list(gradients))
        for parameter, gradient, long, short in zip(parameters, gradients, weight_norms, gradient_norms, strict=True):
            parameter.addcmul_(gradient, gamma * long / (short + 1e-20))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, kept, strict=True):
                parameter.copy_(original)
