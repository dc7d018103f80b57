"""Where an attack may go: steps, projections and membership of the ball that a threat names.

Letters used in this room: N batch, C H W image, K classes; x images as float in [0, 1], `(N, C, H, W)`;
y labels `(N,)`; logits `(N, K)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dfmcl.robustness.threats.threat import Threat

# How far float32 arithmetic may carry a projected point out of its ball: eps is at most ~1 for linf and
# ~50 for l2, where one rounding is 4e-6; a uint8 step is 4e-3.
SLACK = {"linf": 1e-6, "l2": 1e-4}


def norms(delta: Tensor, norm: str) -> Tensor:
    """Length of each image's perturbation: `(N, C, H, W)` -> `(N,)`."""
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


def project(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point of the ball around x (and of [0, 1]) that an attack step is pulled back to.

    Exact projection onto the ball, then onto the box; as x is in the box, the second step never leaves the ball.
    """
    if threat.norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - threat.eps), x + threat.eps).clamp(0, 1)
    delta = x_adv - x
    length = norms(delta, "l2").clamp_min(1e-12)  # a zero perturbation stays zero
    factor = (threat.eps / length).clamp(max=1.0)
    return (x + delta * factor.view(-1, *[1] * (x.dim() - 1))).clamp(0, 1)


def start(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """A random point of the ball around x: uniform in the cube for Linf, uniform in the ball for L2."""
    if threat.norm == "linf":
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) * 2 - 1
        return (x + threat.eps * noise).clamp(0, 1)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    radius = threat.eps * radius.pow(1 / max(1, x[0].numel())) if len(x) else radius
    scale = radius / norms(noise, "l2").clamp_min(1e-12)
    return (x + noise * scale.view(-1, *[1] * (x.dim() - 1))).clamp(0, 1)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The unit step that raises the loss most: the sign for Linf, the normalised gradient for L2."""
    if norm == "linf":
        return gradient.sign()
    length = norms(gradient, "l2").clamp_min(1e-12)
    return gradient / length.view(-1, *[1] * (gradient.dim() - 1))


def contains(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """Whether each image lies in the ball and in [0, 1], up to float rounding: `(N,)` bool."""
    inside = norms(x_adv - x, threat.norm) <= threat.eps + SLACK[threat.norm]
    in_box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(dim=1)
    return inside & in_box


def to_uint8(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """Adversarial images as bytes `(N, C, H, W)` that stay inside the ball around x.

    x must lie on the uint8 grid. Linf: round to the nearest grid point, then clamp to x +- floor(255 eps).
    L2: round to the nearest grid point; where that leaves the ball, coordinates that were rounded away from x go one
    level back, those first that were rounded farthest, until the image is inside.
    """
    origin = (x * 255).round()
    moved = x_adv * 255 - origin
    if threat.norm == "linf":
        limit = math.floor(threat.eps * 255 + 1e-6)
        moved = moved.round().clamp(-limit, limit)
    else:
        moved = _shortened(moved, threat.eps * 255)
    return (origin + moved).clamp(0, 255).to(torch.uint8)


def _shortened(moved: Tensor, radius: float) -> Tensor:
    """Whole numbers near `moved` `(N, ...)` whose L2 norm is at most `radius`, for every row that is inside itself."""
    exact = moved.flatten(1)
    size = exact.abs().round()
    excess = size - exact.abs()  # above 0 where rounding went outwards
    order = excess.argsort(dim=1, descending=True)
    saving = ((2 * size - 1) * (excess > 0)).gather(1, order)  # of the squared norm, by one level back
    surplus = size.square().sum(dim=1, keepdim=True) - radius**2
    needed = (saving.cumsum(dim=1) - saving < surplus) & (saving > 0)
    size = size - torch.zeros_like(size).scatter(1, order, needed.to(size.dtype))
    return (size * exact.sign()).view_as(moved)


def contains_uint8(adversarial: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Exact membership of uint8 images in the ball, in integer arithmetic: `(N, ...)` x 2 -> `(N,)` bool."""
    delta = (adversarial.to(torch.int64) - images.to(torch.int64)).flatten(1)
    if threat.norm == "linf":
        return delta.abs().amax(dim=1) <= math.floor(threat.eps * 255 + 1e-6)
    return (delta * delta).sum(dim=1).to(torch.float64) <= (threat.eps * 255) ** 2 + 1e-6
