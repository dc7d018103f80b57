"""Dynamic Feature Masking: maps of one layer are masked at random, each with a probability from the loss's gradient.

For feature map c of image n, g = mean over h, w of |dL/df[n, c, h, w]| with L the image's own cross-entropy
(under TRADES against its clean prediction: the gradient of the KL). The literal rule is p = sigmoid(alpha * g); every
element of the map is kept ("keep_with_p", the source's pseudocode) or masked ("mask_with_p", its prose) with
probability p, independently. The ranked rule does what the text intends: maps are masked at a base rate, and maps that
stand out by their gradient more often. (By the curve of the sigmoid the mean of p lies above a small rate: 0.21, 0.24
and 0.30 for a rate of 0.2 and alpha 0.5, 1 and 2; `prior` pulls it back.) Two dropouts that look at no gradient are the
controls. Masks exist in the training step only: a classifier in eval mode knows nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.models import Classifier
from dfmcl.training.adversary import soft_cross_entropy
from dfmcl.training.config import Masking
from dfmcl.training.noise import Noise

BINS = 10


@dataclass(frozen=True)
class MaskStatistics:
    """Spread of p over a batch's images and maps; counts: `BINS` equal bins from low to high."""

    mean: float
    std: float
    low: float
    high: float
    counts: tuple[int, ...]

    @staticmethod
    def of(p: Tensor) -> MaskStatistics:
        low, high = p.min().item(), p.max().item()
        counts = torch.histc(p.float().cpu(), BINS, low, high) if high > low else torch.zeros(BINS)
        return MaskStatistics(p.mean().item(), p.std().item(), low, high, tuple(int(count) for count in counts))


def z_score(magnitude: Tensor) -> Tensor:
    """Each image's magnitudes `(N, C)` with mean 0 and deviation 1 over its maps; all 0 where they are all equal."""
    centred = magnitude - magnitude.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def literal(magnitude: Tensor, alpha: Tensor, settings: Masking) -> Tensor:
    """logit of p = sigmoid(alpha * g), which lies in [0.5, 1) while alpha > 0, as g >= 0."""
    return alpha * magnitude


def ranked(magnitude: Tensor, alpha: Tensor, settings: Masking) -> Tensor:
    """logit of p = sigmoid(logit(rate) + alpha * z), z the rank of a map among its image's, in deviations."""
    return logit(settings.rate) + alpha * z_score(magnitude)


def uninformed(magnitude: Tensor, alpha: Tensor, settings: Masking) -> Tensor:
    """logit of p = rate for every map: plain dropout."""
    return torch.full_like(magnitude, logit(settings.rate))


RULES: dict[str, Callable[[Tensor, Tensor, Masking], Tensor]] = {
    "literal": literal,
    "ranked": ranked,
    "dropout": uninformed,
    "channel_dropout": uninformed,
}


def logit(rate: float) -> float:
    return math.log(rate / (1 - rate))


def keep_logit(p_logit: Tensor, settings: Masking) -> Tensor:
    """logit of the probability to keep: p itself in the pseudocode's reading of the literal rule, else 1 - p."""
    keeps = settings.rule == "literal" and settings.semantics == "keep_with_p"
    return p_logit if keeps else -p_logit


def sample(keep: Tensor, side: tuple[int, int], settings: Masking, noise: Noise) -> Tensor:
    """A mask `(N, C, H, W)` of zeros and ones from logits `(N, C)` of the probability to keep, with a gradient to them.

    The forward value is an exact Bernoulli draw, over the probability to keep if scaling is inverted. The gradient is
    that of the relaxed draw at the same noise (binary Concrete, Maddison et al. 2017; Jang et al. 2017), or that of the
    probability (straight-through, Bengio et al. 2013).
    """
    size = (1, 1) if settings.rule == "channel_dropout" else side
    uniform = noise.uniform(*keep.shape, *size)
    wide = keep[:, :, None, None]
    noisy = wide + torch.logit(uniform, eps=1e-6)  # a uniform draw of exactly 0 or 1 has no logit
    relaxed = settings.alpha_gradient == "relaxed"
    soft = torch.sigmoid(noisy / settings.temperature if relaxed else wide.expand_as(noisy))
    hard = (noisy > 0).to(soft.dtype) + (soft - soft.detach())  # in this order, or 1 comes out as 0.99999994
    if settings.scaling == "none":
        return hard
    keep = torch.sigmoid(wide)
    scaled = soft / keep  # its mean does not depend on keep, and its gradient must not pretend that it does
    return hard.detach() / keep.detach() + (scaled - scaled.detach())


def pooled_linear_magnitude(logits: Tensor, target: Tensor, weight: Tensor, area: int) -> Tensor:
    """mean_hw |dL/df| in closed form where f is followed by average pooling and a linear layer: `(N, C)`.

    L is one image's cross-entropy against the distribution `target` `(N, K)`;
    dL/df[n, c, h, w] = sum_k (softmax_k - target_k) W[k, c] / (H W) for all h, w. One `(N, K) x (K, C)` product instead
    of a backward pass. logits `(N, K)`, weight `(K, C)`, area H * W.
    """
    residual = torch.softmax(logits, dim=1) - target
    return (residual @ weight.to(residual.dtype)).abs() / area


class DynamicFeatureMask(nn.Module):
    """The learnable alpha, and the masked forward pass through a classifier in training mode."""

    def __init__(self, settings: Masking) -> None:
        super().__init__()
        self.settings = settings
        learned = settings.learn_alpha and settings.rule in ("literal", "ranked")
        self.alpha = nn.Parameter(torch.tensor(float(settings.alpha)), requires_grad=learned)

    def forward(
        self,
        model: Classifier,
        x: Tensor,
        target: Tensor,
        noise: Noise,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        closed_form: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits `(N, K)` under a fresh mask, and p `(N, C)`. The gradient that sets p is data: none flows through it.

        target `(N, K)`: the distribution whose cross-entropy is the loss. features: a recorded `model.features`.
        closed_form: None takes the fast path where the layer is followed by pooling and a linear layer only.
        """
        settings = self.settings
        module = find_layer(model, settings.layer)
        fast = has_pooled_linear_tail(model, settings.layer) if closed_form is None else closed_form
        batch = len(x) * noise.world if settings.gradient == "batch_mean" else 1
        if fast:
            maps = (features or model.features)(x)
            with exact(x.device):
                with torch.no_grad():  # in full precision: autocast before torch 2.10 keeps casts made without gradient
                    plain = model.head(widened(maps))
                weight = model.net.get_parameter("fc.weight").detach()
                magnitude = pooled_linear_magnitude(plain, target, weight, maps.shape[2] * maps.shape[3]) / batch
                p_logit = RULES[settings.rule](magnitude, self.alpha, settings)
                mask = sample(keep_logit(p_logit, settings), (maps.shape[2], maps.shape[3]), settings, noise)
            return model.head(maps * mask), torch.sigmoid(p_logit)

        informed = RULES[settings.rule] is not uninformed
        known = gradient_magnitude(model, module, x, target) / batch if informed else None
        seen: list[Tensor] = []

        def masked(maps: Tensor) -> Tensor:
            with exact(x.device):
                magnitude = maps.new_zeros(maps.shape[:2], dtype=torch.float32) if known is None else known
                seen.append(RULES[settings.rule](magnitude, self.alpha, settings))
                return maps * sample(keep_logit(seen[0], settings), (maps.shape[2], maps.shape[3]), settings, noise)

        with hooked(module, masked):
            logits = model(x)
        return logits, torch.sigmoid(seen[0])

    def penalty(self, p: Tensor) -> Tensor:
        """The prior on the rate, per image: prior * (mean over maps of the masking probability - rate)^2, `(N,)`."""
        keeps = self.settings.rule == "literal" and self.settings.semantics == "keep_with_p"
        masked = 1 - p if keeps else p
        return self.settings.prior * (masked.mean(dim=1) - self.settings.rate).square()


def exact(device: torch.device) -> torch.autocast:
    """Inside: full precision. p differs from one half in the fourth digit, where bfloat16 has two to three."""
    return torch.autocast(device.type, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """At least float32: what comes out of bfloat16 passes is added up in full."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gradient_magnitude(model: Classifier, module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
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
            (gradient,) = torch.autograd.grad(soft_cross_entropy(widened(model(x)), target).sum(), leaves)
    finally:
        for parameter, requires_grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires_grad)
    return widened(gradient).abs().mean(dim=(2, 3))


def has_pooled_linear_tail(model: Classifier, layer: str) -> bool:
    """Whether only average pooling and a linear layer follow `layer`: true for the last stage of a ResNet."""
    return layer == "layer4" and model.is_resnet


def find_layer(model: Classifier, layer: str, key: str = "masking.layer") -> nn.Module:
    """The module of that name inside the network; BadInput names the config's key."""
    modules: dict[str, nn.Module] = dict(model.net.named_modules())
    if layer not in modules or not layer:
        top = ", ".join(name for name, _ in model.net.named_children())
        raise BadInput(f"{key}: the network has no layer {layer!r}; choose one of {top}, or a module in them")
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
    """Inside, backward pass included: batch norm uses the batch's statistics, as in training; nothing of it is kept."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    # Put back, not switched off by their momentum: a CUDA graph has recorded that. Through `data`, as batch norm itself
    # writes them, unseen by autograd: another pass may still wait for its backward pass, which does not read them.
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.data.copy_(value)
