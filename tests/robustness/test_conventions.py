"""Preprocessing: a network behind another convention than its contract is told so, an honest one never."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfmcl.robustness.conventions import CIFAR10, IMAGENET, IMAGES, Mismatch, conventions, mismatch, normalised
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.models import to_float
from dfmcl.robustness.runs import load_run

CPU = torch.device("cpu")
Answer = Callable[[Tensor], Tensor]


def colours(seed: int, count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Noise images (N, 8, 8, 3) of six classes: which channel is brightest, and whether much or little so."""
    stream = np.random.default_rng(seed)
    y = np.arange(count) % 6
    x = stream.normal(0.4, 0.05, (count, 8, 8, 3))
    x[np.arange(count), :, :, y // 2] += np.where(y % 2, 0.3, 0.12)[:, None, None]
    return (x.clip(0, 1) * 255).round().astype(np.uint8), y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network on those images, normalised by ImageNet's mean and std; its contract says nothing of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    images, y = colours(0)
    x, labels = normalised(*IMAGENET)(to_float(torch.from_numpy(images))), torch.from_numpy(y)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net.eval()


def told(answer: Answer, seed: int = 1, *, bytes_only: bool = False) -> Mismatch | None:
    images, y = colours(seed)
    return mismatch(answer, images, y, device=CPU, bytes_only=bytes_only)


# What stands between pixels in [0, 1] and the network, as its owner has it: `trained` behind its own convention.
BEHIND: dict[str, Answer] = {
    "normalised with ImageNet's mean and std": lambda x: x,
    "normalised with ImageNet's mean and std, in the order blue, green, red": lambda x: x.flip(1),
    "normalised with CIFAR-10's mean and std": lambda x: normalised(*IMAGENET)(
        x * torch.tensor(CIFAR10[1]).view(3, 1, 1) + torch.tensor(CIFAR10[0]).view(3, 1, 1)
    ),
    "given as numbers from 0 to 255": lambda x: normalised(*IMAGENET)(x / 255),
    "given as numbers from 0 to 255 less ImageNet's mean, in the order blue, green, red": lambda x: normalised(
        *IMAGENET
    )((x.flip(1) + torch.tensor((123.68, 116.779, 103.939)).view(3, 1, 1)) / 255),
    "given in the order blue, green, red": lambda x: normalised(*IMAGENET)(x.flip(1)),
    "inverted": lambda x: normalised(*IMAGENET)(1 - x),
}


@pytest.mark.parametrize("convention", BEHIND)
def test_the_convention_that_repairs_is_named(trained: nn.Module, convention: str) -> None:
    """Wrong on most images as the contract says, right on nearly all under the convention of its training."""
    found = told(lambda x: trained(BEHIND[convention](x)))
    assert found is not None
    assert found.would > 0.9 * found.images > 2 * found.right
    # Conventions that differ by little repair it as well; the one that is named must do so too.
    x, y = colours(2)
    named = conventions(x)[found.convention](to_float(torch.from_numpy(x)))
    assert (trained(BEHIND[convention](named)).argmax(1).numpy() == y).mean() > 0.9
    assert f"on {100 * found.would / found.images:.0f} % if they are {found.convention}" in str(found)


def test_bytes_can_only_be_turned_or_inverted(trained: nn.Module) -> None:
    """What can be sent nothing outside [0, 1] is tried with nothing else."""
    assert told(lambda x: trained(x), bytes_only=True) is None
    found = told(lambda x: trained(normalised(*IMAGENET)(x.flip(1))), bytes_only=True)
    assert found is not None
    assert found.convention == "given in the order blue, green, red"


class Constant(nn.Module):
    """One label for dark images, another for bright ones: nothing learnt."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean(dim=(1, 2, 3)) > 0.45
        return nn.functional.one_hot(torch.where(bright, 3, 0), 6).float()


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6))


def noisy(trained: nn.Module, spread: float) -> Answer:
    """The honest network, its logits so noisy that it is often wrong."""
    stream = torch.Generator().manual_seed(0)

    def answer(x: Tensor) -> Tensor:
        logits: Tensor = trained(normalised(*IMAGENET)(x))
        return logits + spread * logits.std() * torch.randn(logits.shape, generator=stream)

    return answer


def test_honest_models_are_left_alone(trained: nn.Module) -> None:
    """Good, weak, untrained, constant or random: none is said to be behind another convention."""
    honest = [lambda x: trained(normalised(*IMAGENET)(x)), Constant(), *(linear(seed) for seed in range(8))]
    honest += [noisy(trained, spread) for spread in (0.5, 1, 2, 4)]
    for answer in honest:
        for seed in (1, 2):
            assert told(answer, seed) is None


def test_a_commonest_label_is_no_convention() -> None:
    """Two classes, nine to one, and a network that always says one of them: under another scale it says the other."""
    images, _ = colours(3)
    y = (np.arange(len(images)) % 10 == 0).astype(np.int64)
    answer = lambda x: torch.stack([x.mean(dim=(1, 2, 3)) - 1, 1 - x.mean(dim=(1, 2, 3))], dim=1)  # noqa: E731  # short
    assert mismatch(answer, images, y, device=CPU, bytes_only=False) is None


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_few_images_decide_nothing(trained: nn.Module, count: int) -> None:
    """So few could be right by chance."""
    images, y = colours(1, count)
    assert mismatch(lambda x: trained(x), images, y, device=CPU, bytes_only=False) is None


def test_a_trained_run_behind_its_own_normalisation(standard_run: Path, other_run: Path) -> None:
    """The digits' networks are honest with their first layer, and behind a convention without it."""
    data = load_dataset("digits")
    for run in (standard_run, other_run):
        network = load_run(run).model.eval()
        assert mismatch(network, data.x_test, data.y_test, device=CPU, bytes_only=False) is None
        found = mismatch(network.net, data.x_test, data.y_test, device=CPU, bytes_only=False)
        assert found is not None
        assert found.images == IMAGES // 2
        assert "blue" not in found.convention  # grey images have no order
