"""Preprocessing: a network behind another convention than its contract is told so, an honest one never."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.conventions import CIFAR10, IMAGES, Convention, Mismatch, Standardised, conventions, mismatch
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.models import to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.scale import PLAIN, PRESETS, Scale

CPU = torch.device("cpu")
Answer = Callable[[Tensor], Tensor]
PIXELS = InputContract.parse("float32 NCHW 8x8x3")
IMAGENET = PRESETS["imagenet"]


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
    x, labels = IMAGENET.applied(to_float(torch.from_numpy(images))), torch.from_numpy(y)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net.eval()


def told(
    answer: Answer, seed: int = 1, declared: InputContract = PIXELS, *, bytes_only: bool = False
) -> Mismatch | None:
    images, y = colours(seed)
    return mismatch(answer, images, y, declared, device=CPU, bytes_only=bytes_only)


# The scales and the rule that a network may have been trained behind.
TRAINED: dict[str, Convention] = {
    "imagenet": IMAGENET,
    "imagenet BGR": IMAGENET.turned(),
    "0..1 mean=0.4914,0.4822,0.4465 std=0.247,0.2435,0.2616": CIFAR10,
    "0..255": Scale(255),
    "caffe": PRESETS["caffe"],
    "inception": PRESETS["inception"],
    "clip": PRESETS["clip"],
    "BGR": PLAIN.turned(),
    "0..1 mean=1 std=-1": Scale(1, (1,), (-1,)),
}


def behind(trained: nn.Module, scale: Scale) -> Answer:
    """The network as its owner would have it, had it been trained on that scale: what is sent, on that scale."""
    return lambda x: trained(IMAGENET.applied(scale.undone(x)))


@pytest.mark.parametrize("declared", ["float32 NCHW 8x8x3", "float32 NCHW 8x8x3 clip", "float32 NCHW 8x8x3 caffe"])
@pytest.mark.parametrize("words", TRAINED)
def test_the_words_that_repair_are_named(trained: nn.Module, words: str, declared: str) -> None:
    """Wrong on most images as declared, right on nearly all under the convention of its training, whose words it says.

    Whatever was declared, wrongly, is undone first; what was declared rightly is left alone.
    """
    contract, scale = InputContract.parse(declared), TRAINED[words]
    assert isinstance(scale, Scale)
    assert str(scale) == words
    network = behind(trained, scale)
    found = told(lambda x: network(contract.scale.applied(x)), declared=contract)
    if found is None:  # declared as it is, or so nearly that it is right
        x, y = colours(2)
        answers = network(contract.scale.applied(to_float(torch.from_numpy(x)))).argmax(1)
        assert (answers.numpy() == y).mean() > 0.7
        return
    assert found.would > 0.9 * found.images > found.right
    assert found.words in {str(one) or "plain" for one in conventions(colours(1)[0])}
    assert str(found).startswith(
        f"as `{found.words}` it is right on {100 * found.would / found.images:.0f} % of 64 images"
    )
    # Conventions that differ by little repair it as well; the one that is named must do so too, by its words alone.
    named = InputContract.parse(f"float32 NCHW 8x8x3 {found.words}")
    x, y = colours(2)
    assert (network(named.scale.applied(to_float(torch.from_numpy(x)))).argmax(1).numpy() == y).mean() > 0.9


def test_what_no_words_say_is_no_contract() -> None:
    """Each image less its own mean is a rule that is tried, and one that no `--input` takes."""
    x = to_float(torch.from_numpy(colours(1)[0]))
    centred = x - x.mean((1, 2, 3), keepdim=True)
    least = 192**-0.5  # of a deviation, as TensorFlow has it
    torch.testing.assert_close(Standardised().applied(x), centred / x.std((1, 2, 3), keepdim=True).clamp_min(least))
    assert {Standardised(), Standardised("BGR")} <= set(conventions(colours(1)[0]))
    with pytest.raises(BadInput, match="'standardised' is not known"):
        InputContract.parse(f"float32 NCHW 8x8x3 {Standardised()}")


def test_bytes_can_only_be_turned_or_inverted(trained: nn.Module) -> None:
    """What can be sent nothing outside [0, 1] is tried with nothing else."""
    assert told(lambda x: trained(x), bytes_only=True) is None
    found = told(lambda x: trained(IMAGENET.applied(x.flip(1))), bytes_only=True)
    assert found is not None
    assert found.words == "BGR"


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
        logits: Tensor = trained(IMAGENET.applied(x))
        return logits + spread * logits.std() * torch.randn(logits.shape, generator=stream)

    return answer


def test_honest_models_are_left_alone(trained: nn.Module) -> None:
    """Good, weak, untrained, constant or random: none is said to be behind another convention."""
    honest: list[Answer] = [lambda x: trained(IMAGENET.applied(x)), Constant(), *(linear(seed) for seed in range(8))]
    honest += [noisy(trained, spread) for spread in (0.5, 1, 2, 4)]
    for answer in honest:
        for seed in (1, 2):
            assert told(answer, seed) is None


def test_a_commonest_label_is_no_convention() -> None:
    """Two classes, nine to one, and a network that always says one of them: under another scale it says the other."""
    images, _ = colours(3)
    y = (np.arange(len(images)) % 10 == 0).astype(np.int64)
    answer = lambda x: torch.stack([x.mean(dim=(1, 2, 3)) - 1, 1 - x.mean(dim=(1, 2, 3))], dim=1)  # noqa: E731  # short
    assert mismatch(answer, images, y, PIXELS, device=CPU, bytes_only=False) is None


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_few_images_decide_nothing(trained: nn.Module, count: int) -> None:
    """So few could be right by chance."""
    images, y = colours(1, count)
    assert mismatch(lambda x: trained(x), images, y, PIXELS, device=CPU, bytes_only=False) is None


def test_a_trained_run_behind_its_own_normalisation(standard_run: Path, other_run: Path) -> None:
    """The digits' networks are honest with their first layer, and behind a convention without it."""
    data, contract = load_dataset("digits"), InputContract.parse("float32 NCHW 16x16x3")
    x_test = np.asarray(data.x_test)
    for run in (standard_run, other_run):
        network = load_run(run).model.eval()
        assert mismatch(network, x_test, data.y_test, contract, device=CPU, bytes_only=False) is None
        found = mismatch(network.net, x_test, data.y_test, contract, device=CPU, bytes_only=False)
        assert found is not None
        assert found.images == IMAGES // 2
        assert "BGR" not in found.words  # grey images have no order
