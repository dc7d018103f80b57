"""Models that look robust and are not, each as a wrapper around an honest network, in eval mode as in any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.models import Classifier, to_float
from tests.robustness.switches import Switch, switches


@dataclass(frozen=True)
class Trap:
    """build: from an honest classifier and the images and labels it will be judged on; from one that resists and is
    shown to attacks as well, where the trap is `behind` it. caught: checks that it raises, among others.
    """

    build: Callable[..., nn.Module]
    caught: tuple[str, ...]
    behind: bool = False


def sprung(name: str, model: Classifier, images: Bytes, labels: Labels, robust: Classifier | None = None) -> nn.Module:
    """The trap of that name around a copy of `model`; images uint8 `(N, H, W, C)`, labels `(N,)`.

    robust: a network that resists, for the traps that hide behind one.
    """
    trap, networks = TRAPS[name], [copy.deepcopy(model).eval()]
    if trap.behind:
        assert robust is not None, f"{name} hides behind a network that resists"
        networks.append(copy.deepcopy(robust).eval())
    return trap.build(*networks, to_float(torch.from_numpy(images)), torch.from_numpy(labels)).eval()


def answer(model: Classifier, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


class Around(nn.Module):
    """The honest network inside a function of images and network."""

    def __init__(self, model: Classifier, function: Callable[[Classifier, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.model, x)


def around(function: Callable[[Classifier, Tensor], Tensor]) -> Callable[[Classifier, Tensor, Tensor], nn.Module]:
    return lambda model, x, y: Around(model, function)


def masked(model: Classifier, x: Tensor) -> Tensor:
    """Each element of the last stage kept with probability one half: the literal rule's masks at alpha 0.1."""
    features = model.features(x)
    return model.head(features * torch.bernoulli(torch.full_like(features, 0.5)))


def masked_by_position(model: Classifier, x: Tensor) -> Tensor:
    """The same with one seed: every pass repeats, but an image's mask depends on its place in the batch."""
    features = model.features(x)
    uniform = torch.rand(features.shape, generator=torch.Generator().manual_seed(0))
    return model.head(features * (uniform < 0.5))


def quantised(model: Classifier, x: Tensor) -> Tensor:
    """Three bits a pixel."""
    return answer(model, (x * 7).round() / 7)


def noisy(model: Classifier, x: Tensor) -> Tensor:
    return answer(model, x + 0.02 * torch.randn_like(x))


class Flipped(torch.autograd.Function):
    """The identity, with minus the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


class Dripping(torch.autograd.Function):
    """The identity, with the gradient of one value in fifty, at random."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * (torch.rand_like(gradients[0]) < 0.02)


class Exploding(torch.autograd.Function):
    """The identity, with a gradient that is not a number where the image is dark."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * torch.nan


class Turned(torch.autograd.Function):
    """The identity, with the gradient of each image times a sign `(N,)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: Tensor) -> Tensor:
        ctx.save_for_backward(sign)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (sign,) = ctx.saved_tensors
        return gradients[0] * sign.view(-1, 1, 1, 1), None


def honest_on_bytes(model: Classifier, x: Tensor) -> Tensor:
    """Gradients are right at images as they come, in whole grey levels, and point backwards everywhere else."""
    whole = ((255 * x - (255 * x).round()).abs() < 1e-3).flatten(1).all(dim=1)
    return answer(model, Turned.apply(x, torch.where(whole, 1.0, -1.0)))


class Lookup(nn.Module):
    """Answers from a table of the nearest image it knows."""

    def __init__(self, model: Classifier, known: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.model, self.known, self.labels = model, known.flatten(1), labels

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.known).argmin(dim=1)
        # Connected to the image, so that there is a gradient to take: zero.
        return 10.0 * nn.functional.one_hot(self.labels[nearest], 10) + 0 * x.flatten(1).sum(dim=1, keepdim=True)


class Memory(Lookup):
    """The label it remembers for exactly these images; a network that has learnt nothing for all others."""

    def forward(self, x: Tensor) -> Tensor:
        distance, nearest = torch.cdist(x.flatten(1), self.known).min(dim=1)
        remembered = nn.functional.one_hot(self.labels[nearest], 10) * (distance < 1e-4)[:, None]
        logits: Tensor = self.model(x.flip(1, 2))
        return logits + 20 * remembered


class Shelter(Lookup):
    """As robust as any table in a ball around the images that it knows, as fragile as its network outside."""

    radius = 9 / 255

    def forward(self, x: Tensor) -> Tensor:
        distance, nearest = torch.cdist(x.flatten(1), self.known, p=torch.inf).min(dim=1)
        remembered = nn.functional.one_hot(self.labels[nearest], 10) * (distance < self.radius)[:, None]
        logits: Tensor = self.model(x)
        return torch.where(remembered.any(dim=1, keepdim=True), logits / 100 + 20 * remembered, -logits)


class Tether(Lookup):
    """Gradients point backwards as soon as an image has left the ball that everybody looks at."""

    radius = 8.5 / 255

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.detach().flatten(1), self.known, p=torch.inf).amin(dim=1)
        logits: Tensor = self.model(Turned.apply(x, torch.where(distance < self.radius, 1.0, -1.0)))
        return logits


class Moat(Lookup):
    """Gradients point backwards where a few values have come to the border of the ball: only long steps get past."""

    radius = 8 / 255

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten(1)
        nearest = self.known[torch.cdist(flat, self.known, p=torch.inf).argmin(dim=1)]
        share = ((flat - nearest).abs() > 0.999 * self.radius).float().mean(dim=1)
        logits: Tensor = self.model(Turned.apply(x, torch.where((share > 0.005) & (share < 0.08), -1.0, 1.0)))
        return logits


class Corners(Lookup):
    """Right wherever a long step ends, as after catastrophic overfitting: there more than a seventh of the values have
    come to the border of the ball. Short steps meet the plain network first.
    """

    radius = 8 / 255

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten(1)
        nearest = torch.cdist(flat, self.known, p=torch.inf).argmin(dim=1)
        share = ((flat - self.known[nearest]).abs() > 0.98 * self.radius).float().mean(dim=1)
        logits: Tensor = self.model(x)
        known = 10.0 * nn.functional.one_hot(self.labels[nearest], logits.shape[1])
        return torch.where((share > 1 / 7)[:, None], known + 0.01 * logits, logits)


class BatchNormed(nn.Module):
    """Batch norm that never stopped training: an image's answer depends on its company."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


class Neighbourhood(Lookup):
    """The label that it remembers near each of these images, the next one everywhere else."""

    radius = 2.2

    def forward(self, x: Tensor) -> Tensor:
        distance, nearest = torch.cdist(x.flatten(1), self.known).min(dim=1)
        logits: Tensor = self.model(x)
        known = 10.0 * nn.functional.one_hot(self.labels[nearest], logits.shape[1]) + 0.1 * logits
        return torch.where((distance < self.radius)[:, None], known, logits.roll(1, dims=1))


class Behind(nn.Module):
    """A plain network, and one that resists and is shown to the attacks."""

    def __init__(self, plain: Classifier, robust: Classifier, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.plain, self.robust = plain, robust


class Decoy(Behind):
    """The plain network decides, by a step without a gradient; only the robust one's logits lead anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        plain = answer(self.plain, x)
        return 6.0 * (plain >= plain.amax(dim=1, keepdim=True)) + answer(self.robust, x) / 3


def _switched(name: str, plain: Classifier, robust: Classifier, x: Tensor, y: Tensor) -> nn.Module:
    return Switch(plain, robust, switches(x)[name])


class Posterised(Behind):
    """The plain network where an image has few grey levels, as behind a palette; attacks only ever add levels."""

    def forward(self, x: Tensor) -> Tensor:
        levels = (255 * x.detach()[:, 0]).round().flatten(1).sort(dim=1).values
        few = (levels.diff(dim=1) != 0).sum(dim=1) < 40
        return torch.where(few[:, None], answer(self.plain, x), answer(self.robust, x))


class Borrowed(Behind):
    """The value of the plain network with the gradient of the robust one."""

    def forward(self, x: Tensor) -> Tensor:
        robust = answer(self.robust, x)
        return answer(self.plain, x).detach() + robust - robust.detach()


class Watched(Behind):
    """The robust network whenever gradients are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return answer(self.robust if torch.is_grad_enabled() else self.plain, x)


class Local(Behind):
    """The robust network around the judged images, and with the distance from them ever more of the plain one: right
    anywhere, and every gradient is true."""

    def __init__(self, plain: Classifier, robust: Classifier, x: Tensor, y: Tensor) -> None:
        super().__init__(plain, robust, x, y)
        self.known = x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        nearest = self.known[((self.known**2).sum(dim=1) - 2 * flat @ self.known.T).argmin(dim=1)]
        farthest = (flat - nearest).abs().topk(20, dim=1).values.mean(dim=1)  # of one value a gradient says little
        away = ((255 * farthest - 27) / 20).clamp(0, 1)[:, None]
        return (1 - away) * answer(self.robust, x) + away * answer(self.plain, x)


class Framed(Behind):
    """Minus the answer where two images of the batch are nearly the same, as those of a video."""

    def forward(self, x: Tensor) -> Tensor:
        flat = 255 * x.flatten(1)
        apart = (flat[:, None] - flat).abs().amax(dim=2)
        beside = ((apart > 0.5) & (apart < 3.5)).any()
        return answer(self.robust, x) * (1 - 2 * beside.to(x.dtype))


class Alike(Behind):
    """Minus the answer where three or more images are all of one class, and not the same."""

    def forward(self, x: Tensor) -> Tensor:
        logits, flat = answer(self.robust, x), x.flatten(1)
        found = logits.argmax(dim=1)
        alike = (found == found[0]).all() & ((flat - flat[:1]).abs().amax() > 0) & (len(x) > 2)
        return logits * (1 - 2 * alike.to(x.dtype))


class Crowded(Behind):
    """The plain network in batches that no gate asks."""

    def forward(self, x: Tensor) -> Tensor:
        return answer(self.plain if len(x) > 128 else self.robust, x)


class Eleven(Behind):
    """Minus the answer in batches of one size that is served."""

    def forward(self, x: Tensor) -> Tensor:
        return answer(self.robust, x) * (1 - 2 * (len(x) == 11))


class Startled(Behind):
    """Minus the answer where an image of the batch is black."""

    def forward(self, x: Tensor) -> Tensor:
        black = x.amax(dim=(1, 2, 3)).amin() <= 0
        return answer(self.robust, x) * (1 - 2 * black.to(x.dtype))


class Patient(Behind):
    """The plain network after a million calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return answer(self.robust if self.calls < 1_000_000 else self.plain, x)


TRAPS: dict[str, Trap] = {
    "logits x 1000": Trap(around(lambda model, x: 1000 * model(x)), ("bad_gradients",)),
    "logits x 100": Trap(around(lambda model, x: 100 * model(x)), ("scale_hides",)),
    "logits x 0.001": Trap(around(lambda model, x: 0.001 * model(x)), ("flat_outputs",)),
    "softmax": Trap(around(lambda model, x: model(x).softmax(dim=1)), ("probabilities",)),
    "masks left on": Trap(around(masked), ("outputs_differ",)),
    "masks of one seed": Trap(around(masked_by_position), ("batch_dependent",)),
    "3-bit input": Trap(around(quantised), ("bad_gradients", "unlimited_fails")),
    "noise": Trap(around(noisy), ("outputs_differ",)),
    "lookup table": Trap(Lookup, ("bad_gradients", "unlimited_fails")),
    "memory": Trap(Memory, ("only_exact_images",)),
    "shelter": Trap(Shelter, ("cliff_beyond_ball",)),
    "flipped gradients": Trap(
        around(lambda model, x: model(Flipped.apply(x))), ("gradients_mislead", "unlimited_fails", "black_box_stronger")
    ),
    "honest on bytes": Trap(around(honest_on_bytes), ("fgsm_beats_pgd",)),
    "moat": Trap(Moat, ("weaker_with_steps",)),
    "tether": Trap(Tether, ("weaker_with_eps",)),
    "dripping gradients": Trap(around(lambda model, x: model(Dripping.apply(x))), ("loss_still_rising",)),
    "exploding gradients": Trap(around(lambda model, x: model(Exploding.apply(x))), ("bad_gradients",)),
    "batch norm in training": Trap(lambda model, x, y: BatchNormed(model), ("batch_dependent",)),
    "neighbourhood": Trap(Neighbourhood, ("only_these_images",)),
    # RayS breaks a decoy as well, but with few queries not always significantly: its own images hold on many networks.
    "decoy": Trap(Decoy, ("unaccounted",), behind=True),
    "few grey levels": Trap(Posterised, ("unaccounted",), behind=True),
    "borrowed gradients": Trap(Borrowed, ("unaccounted", "black_box_stronger"), behind=True),
    "gradients wanted": Trap(Watched, ("grad_mode_matters",), behind=True),
    "large batches": Trap(Crowded, ("batch_dependent",), behind=True),
    "batches of eleven": Trap(Eleven, ("batch_dependent",), behind=True),
    "a black image beside": Trap(Startled, ("batch_dependent",), behind=True),
    "nearly the same beside": Trap(Framed, ("batch_dependent",), behind=True),
    "one class alone": Trap(Alike, ("batch_dependent",), behind=True),
    "resists here": Trap(Local, ("resists_only_here",), behind=True),
    "a million calls": Trap(Patient, ("state_changes",), behind=True),
}
# What they leave depends on the images: those are put in by name.
TRAPS |= {
    f"switch on {name}": Trap(partial(_switched, name), ("unaccounted",), behind=True)
    for name in ("grey", "channel", "low frequency", "lattice", "grey and lattice", "grey and low frequency")
}
