"""Dynamic Feature Masking: maps of one layer are masked at random, each with a probability from the loss's gradient.

For feature map c of image n, g = mean over h, w of |dL/df[n, c, h, w]| with L the image's own loss (no division by
the batch size), and p = sigmoid(alpha * g). Every element of the map is then kept ("keep_with_p", the source's
pseudocode) or masked ("mask_with_p", its prose) with probability p, independently, without rescaling. Masks exist in
the training step only: a classifier in eval mode knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustness.errors import BadInput
from robustness.models import Classifier


@dataclass(frozen=True)
class MaskStatistics:
    """Spread of the masking probability p over a batch's images and maps."""

    mean: float
    std: float
    low: float
    high: float


def probability(magnitude: Tensor, alpha: Tensor) -> Tensor:
    """p = sigmoid(alpha * g): `(N, C)` to `(N, C)` in (0, 1); in [0.5, 1) while alpha > 0, as g >= 0."""
    return torch.sigmoid(alpha * magnitude)


def sample(
    magnitude: Tensor,
    alpha: Tensor,
    side: tuple[int, int],
    semantics: str,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """A mask of zeros and ones, `(N, C, H, W)`, with a gradient to alpha.

    The forward value is an exact Bernoulli draw; the gradient is that of the relaxed one (binary Concrete,
    Maddison et al. 2017; Jang et al. 2017) at the same noise, with `temperature`.
    """
    logit = alpha * magnitude
    keep_logit = logit if semantics == "keep_with_p" else -logit
    uniform = torch.rand(*magnitude.shape, *side, generator=generator, device=magnitude.device)
    noise = torch.logit(uniform, eps=1e-6)  # a uniform draw of exactly 0 or 1 has no logit
    noisy = keep_logit[:, :, None, None] + noise
    soft = torch.sigmoid(noisy / temperature)
    return (noisy > 0).to(soft.dtype) + (soft - soft.detach())  # in this order, or 1 comes out as 0.99999994


def pooled_linear_magnitude(logits: Tensor, y: Tensor, weight: Tensor, area: int) -> Tensor:
    """mean_hw |dL/df| in closed form where f is followed by average pooling and a linear layer: `(N, C)`.

    L is the cross-entropy of one image; dL/df[n, c, h, w] = sum_k (softmax_k - y_k) W[k, c] / (H W) for all h, w.
    One `(N, K) x (K, C)` product instead of a backward pass. logits `(N, K)`, weight `(K, C)`, area H * W.
    """
    residual = torch.softmax(logits, dim=1)
    residual = residual.scatter_add(1, y[:, None], -torch.ones_like(residual[:, :1]))
    return (residual @ weight).abs() / area


class DynamicFeatureMask(nn.Module):
    """The learnable alpha, and the masked forward pass through a classifier in training mode."""

    def __init__(self, layer: str, alpha: float, learn_alpha: bool, semantics: str, temperature: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)), requires_grad=learn_alpha)
        self.layer, self.semantics, self.temperature = layer, semantics, temperature

    def forward(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator,
        closed_form: bool | None = None,
    ) -> tuple[Tensor, MaskStatistics]:
        """Logits `(N, K)` under a fresh mask. The gradient that sets p is data: nothing flows back through it.

        closed_form: None takes the fast path where the layer is followed by pooling and a linear layer only.
        """
        module = find_layer(model, self.layer)
        fast = has_pooled_linear_tail(model, self.layer) if closed_form is None else closed_form
        if fast:
            with hooked(module) as seen:
                plain = model(x)
            (features,) = seen
            net = model.net
            magnitude = pooled_linear_magnitude(
                plain.detach(), y, net.fc.weight.detach(), features.shape[2] * features.shape[3]
            )
            masked = features * self._mask(magnitude, features, generator)
            logits = net.fc(torch.flatten(net.avgpool(masked), 1))
        else:
            magnitude = gradient_magnitude(model, module, x, y, loss)
            with hooked(module, lambda features: features * self._mask(magnitude, features, generator)):
                logits = model(x)
        p = probability(magnitude, self.alpha.detach())
        statistics = MaskStatistics(p.mean().item(), p.std().item(), p.min().item(), p.max().item())
        return logits, statistics

    def _mask(self, magnitude: Tensor, features: Tensor, generator: torch.Generator) -> Tensor:
        side = (features.shape[2], features.shape[3])
        return sample(magnitude, self.alpha, side, self.semantics, self.temperature, generator)


def gradient_magnitude(
    model: Classifier, module: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """mean_hw |dL/df| for the output f of any module: one forward pass and one backward pass from the loss to f."""
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    leaves: list[Tensor] = []

    def cut(features: Tensor) -> Tensor:
        # With the weights frozen nothing before this point needs a gradient: the backward pass ends here.
        leaves.append(features.detach().requires_grad_(True))
        return leaves[0]

    model.requires_grad_(False)
    try:
        with hooked(module, cut), running_statistics_kept(model):
            (gradient,) = torch.autograd.grad(loss(model(x), y).sum(), leaves)
    finally:
        for parameter, requires_grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires_grad)
    return gradient.abs().mean(dim=(2, 3))


def has_pooled_linear_tail(model: Classifier, layer: str) -> bool:
    """Whether only average pooling and a linear layer follow `layer`: true for the last stage of a ResNet."""
    return layer == "layer4" and isinstance(model.net.fc, nn.Linear)


def find_layer(model: Classifier, layer: str) -> nn.Module:
    """The module of that name inside the network."""
    modules: dict[str, nn.Module] = dict(model.net.named_modules())
    if layer not in modules or not layer:
        top = ", ".join(name for name, _ in model.net.named_children())
        raise BadInput(f"masking.layer: the network has no layer {layer!r}; choose one of {top}, or a module in them")
    return modules[layer]


@contextmanager
def hooked(module: nn.Module, replace: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Inside: the module's output is collected, and replaced where `replace` is given."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.dim() != 4:
            raise BadInput("masking.layer: the layer's output is no (N, C, H, W) tensor; choose a convolutional layer")
        seen.append(output)
        return replace(output) if replace else None

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside: batch norm uses the batch's statistics, as in training, but a second look at it is not counted."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        layer.num_batches_tracked = None
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches
