"""Patches: exact membership, and attacks beside an exhaustive search, twice the budget and ART's."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import AdversarialPatchPyTorch
from art.estimators.classification import PyTorchClassifier
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.patch import gains, square
from dfmcl.robustness.attacks.patch_rs import pasted
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.losses import margin
from dfmcl.robustness.models import Classifier, frozen, to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.patch import Patch
from tests.linear import stream

SIDE = 2


# --- the threat ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 3), st.integers(0, 4), st.integers(1, 3))
def test_a_square_is_a_member_and_a_pixel_beyond_is_none(
    seed: int, side: int, top: int, left: int, channels: int
) -> None:
    """All values of a square may change, however much; one value farther away than the side is too much."""
    images = torch.randint(0, 256, (1, channels, 8, 9), generator=stream(seed)).to(torch.uint8)
    changed = images.clone()
    changed[:, :, top : top + side, left : left + side] = 255 - changed[:, :, top : top + side, left : left + side]
    threat = Patch(side)
    assert threat.contains_uint8(changed, images).all()
    assert threat.contains(changed.float() / 255, images.float() / 255).all()
    if side > 1:
        assert not Patch(side - 1).contains_uint8(changed, images).any()
    for row, column in ((top + side, left), (top, left + side), (top + side - 1, left + side)):
        if row < 8 and column < 9:
            beyond = changed.clone()
            beyond[:, -1, row, column] += 1
            assert not threat.contains_uint8(beyond, images).any()


def test_two_corners_of_a_larger_square_are_no_patch() -> None:
    """It is one square, not as many pixels anywhere."""
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    apart = images.clone()
    apart[0, 0, 0, 0] = apart[0, 0, 2, 2] = 1
    assert not Patch(2).contains_uint8(apart, images).any()
    assert Patch(3).contains_uint8(apart, images).all()


def test_a_share_is_rounded_up_to_a_square() -> None:
    """2 % are 5 x 5 of 32 x 32 and 32 x 32 of 224 x 224, as published; what does not fit is refused."""
    assert [Patch(share=0.02).pixels((3, side, side)) for side in (32, 224)] == [5, 32]
    assert Patch(share=0.25).pixels((3, 8, 8)) == 4
    with pytest.raises(BadInput, match="does not fit"):
        Patch(9).fits((3, 8, 32))
    for text in ("patch", "patch:5", "patch:5x6", "patch:0x0", "patch:0%", "patch:100%", "patch:x%", "patch:-1x-1"):
        with pytest.raises(BadInput, match="patch:5x5"):
            Patch.parse(text)


# --- the attacks --------------------------------------------------------------------------------------------


def linear(classes: int, seed: int, shape: tuple[int, int, int] = (1, 6, 6)) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    return model.requires_grad_(False)


def exhaustive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The highest margin over all places and all corners of a 2 x 2 patch, `(N,)`."""
    best = torch.full((len(x),), -torch.inf)
    for top, left, *values in product(range(5), range(5), *[(0.0, 1.0)] * 4):
        patched = x.clone()
        patched[:, 0, top : top + SIDE, left : left + SIDE] = torch.tensor(values).view(SIDE, SIDE)
        best = torch.maximum(best, margin(model(patched), y))
    return best


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("count", [0, 1, 24])
def test_on_a_linear_model_it_is_the_exhaustive_search(classes: int, count: int) -> None:
    """An image falls exactly where some place and corners break it; a survivor's margin is the highest there is."""
    model = linear(classes, 1)
    x = torch.rand(count, 1, 6, 6, generator=stream(2))
    y = model(x).argmax(dim=1)
    x_adv = Attack.parse("patch-3x2")(model, x, y, Patch(SIDE), generator=stream())
    assert Patch(SIDE).contains(x_adv, x).all()
    best, found = exhaustive(model, x, y) if count else torch.zeros(0), margin(model(x_adv), y)
    assert torch.equal(found > 0, best > 0)
    assert torch.allclose(found[best <= 0], best[best <= 0], atol=1e-5)
    if count == 24:
        assert 0 < (best > 0).sum() < 24 + (classes == 2)  # of two classes all can be broken


def test_random_search_gets_there_by_answers_alone() -> None:
    """Patch-RS breaks three quarters of what can be broken and nothing else, in as many queries as it says."""
    model, x = linear(3, 1), torch.rand(24, 1, 6, 6, generator=stream(2))
    y = model(x).argmax(dim=1)
    best, trial = exhaustive(model, x, y), Trial(y)
    asked: list[int] = []

    def counted(points: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(len(points))
        return model(points)

    attack, threat = Attack.parse("patch-rs-400"), Patch(SIDE)
    x_adv = attack(counted, x, y, threat, generator=stream(), trial=trial)
    held = ~trial.fooled
    assert threat.contains(x_adv, x).all()
    assert sum(asked) == int(trial.forward.sum())
    assert (trial.forward[held] == 400).all()
    assert trial.backward.sum() == 0
    found = margin(model(x_adv), y)
    assert not (trial.fooled & (best <= 0)).any()
    assert (found[held] <= best[held] + 1e-5).all()
    assert 24 > (best > 0).sum() * 0.75 <= trial.fooled.sum()
    assert torch.equal(x_adv, attack(counted, x, y, threat, generator=stream()))


def test_random_search_finds_the_place() -> None:
    """Where only one corner of the image counts, hardly a search begins there, and nearly all end there."""
    model, x = linear(2, 1, (1, 12, 12)), torch.full((12, 1, 12, 12), 0.5)
    weight = torch.zeros(2, 1, 12, 12)
    weight[1, :, 10:, 10:] = 1
    model[1].weight.copy_(weight.flatten(1))  # type: ignore[index]  # a Sequential of ours
    model[1].bias.copy_(torch.tensor([2.5, 0.0]))  # type: ignore[index]  # a Sequential of ours
    y = torch.zeros(12, dtype=torch.long)
    x_adv = Attack.parse("patch-rs-600")(model, x, y, Patch(SIDE), generator=stream())
    assert (model(x_adv).argmax(dim=1) == 1).sum() >= 9


def test_gains_are_those_of_each_place() -> None:
    """By a plain loop over the corners of the square."""
    gradient, x = (torch.rand(2, 3, 5, 6, generator=stream(seed)) - 0.3 * (1 - seed) for seed in (0, 1))
    found = gains(gradient, x, 3)
    assert found.shape == (2, 3, 4)
    for image, top, left in product(range(2), range(3), range(4)):
        inside = square(x, torch.full((2,), top * 6 + left), 3)[image]
        assert inside.sum() == 27
        corner = torch.where(gradient[image] > 0, 1.0, 0.0)
        gained = (gradient[image] * (corner - x[image]))[inside].sum()
        assert found[image, top, left] == pytest.approx(gained.item(), abs=1e-5)


@pytest.fixture(scope="module")
def standard(standard_run: Path) -> Classifier:
    return load_run(standard_run).model


def test_a_standard_network_holds_nothing_more_under_twice_the_steps(
    standard: Classifier, hardened: Classifier
) -> None:
    """5 x 5 of 16 x 16 pixels break a plain network; twice the steps and restarts break at most one image more.

    On a hardened one a smaller patch breaks some, fewer by answers alone than by gradients.
    """
    data = load_dataset("digits")

    def kept(model: Classifier, name: str, side: int) -> tuple[int, int]:
        images, labels, suite = data.x_test[:24], data.y_test[:24], [Attack.parse(name)]
        found = evaluate(model, images, labels, Patch(side), suite, grid=True).evaluation
        assert found.attacks[0].outside == 0
        return found.clean.k, found.robust.k

    once = kept(standard, "patch", 5)[1]
    assert once <= 2
    assert once - kept(standard, "patch-80x12", 5)[1] <= 1
    clean, white = kept(hardened, "patch-10x2", 3)
    assert white < kept(hardened, "patch-rs-40", 3)[1] < clean


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_one_patch_lies_in_all_images(steps: int) -> None:
    """The same values, each image at a place of its own; where every place counts alike they are the corners' best."""
    model = linear(2, 1, (3, 8, 8))
    weight = torch.zeros(2, 3, 8, 8)
    weight[1] = torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)
    model[1].weight.copy_(weight.flatten(1))  # type: ignore[index]  # a Sequential of ours
    model[1].bias.copy_(torch.tensor([1e3, 0.0]))  # type: ignore[index]  # a Sequential of ours; nothing falls
    x, y = torch.full((10, 3, 8, 8), 0.5), torch.zeros(10, dtype=torch.long)
    attack, trial = Attack("universal-patch", Attack.parse("universal-patch").function, {"steps": steps}), Trial(y)
    x_adv = attack(model, x, y, Patch(3), generator=stream(), trial=trial)
    assert Patch(3).contains(x_adv, x).all()
    changed = (x_adv != x).any(dim=1)
    squares = [one[:, which].view(3, 3, 3) for one, which in zip(x_adv, changed, strict=True)]
    assert all(torch.equal(squares[0], other) for other in squares)
    assert len({tuple(torch.nonzero(which)[0].tolist()) for which in changed}) > 3
    assert (trial.forward == steps + 4).all()
    assert (trial.backward == steps).all()
    if steps == 30:
        assert torch.equal(squares[0][:, 0, 0], torch.tensor([1.0, 0.0, 1.0]))
        assert (squares[0] == squares[0][:, :1, :1]).all()
    assert len(attack(model, x[:0], y[:0], Patch(3), generator=stream())) == 0


# --- beside ART's -------------------------------------------------------------------------------------------


def art_patch(model: Classifier, x: Tensor, y: Tensor, side: int, **told: Any) -> Tensor:
    """ART's AdversarialPatch on all images together, values `(C, side, side)`; steps by sign, as ours are."""
    loss, shape = nn.CrossEntropyLoss(), (x.shape[1], side, side)
    estimator = PyTorchClassifier(model, loss, tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu")
    attack = AdversarialPatchPyTorch(
        estimator, rotation_max=0.0, scale_min=side / x.shape[2], scale_max=side / x.shape[2] + 1e-6, optimizer="pgd",
        patch_shape=shape, patch_type="square", targeted=False, batch_size=len(x), verbose=False, **told,
    )  # fmt: skip
    values, _ = attack.generate(x.numpy(), np.eye(10, dtype=np.float32)[y.numpy()])
    return torch.from_numpy(values).to(x.dtype)


def right_digits(model: Classifier, count: int) -> tuple[Tensor, Tensor]:
    data = load_dataset("digits")
    x, y = to_float(torch.from_numpy(data.x_test[:64])), torch.from_numpy(data.y_test[:64])
    right = torch.nonzero(model(x).argmax(dim=1) == y).squeeze(1)[:count]
    return x[right], y[right]


def test_a_patch_of_ours_breaks_more_than_arts(hardened: Classifier) -> None:
    """Image by image at equal passes: ART's is climbed for 25 steps at each of two places, ours finds its places."""
    side, places, steps = 3, [(3, 3), (9, 9)], 25
    with frozen(hardened):
        x, y = right_digits(hardened, 8)
        trial = Trial(y)
        ours = Attack.parse("patch-15x1")(hardened, x, y, Patch(side), generator=stream(), trial=trial)
        assert trial.forward.max() <= len(places) * steps
        theirs = torch.zeros(len(x), dtype=torch.bool)
        for row, (top, left) in product(range(len(x)), places):
            told = {"patch_location": (top, left), "max_iter": steps, "learning_rate": 0.1}
            values = art_patch(hardened, x[row : row + 1], y[row : row + 1], side, **told)
            point = pasted(x[row : row + 1], values[None], torch.tensor([[top, left]]))
            theirs[row] |= bool(hardened(point).argmax() != y[row])
    fell = hardened(ours).argmax(dim=1) != y
    assert fell.sum() > theirs.sum()


def test_one_patch_for_all_breaks_more_than_arts(standard: Classifier) -> None:
    """At as many passes: ours lies at the best of four places, ART's, which it lays at random, at the mean of ten."""
    side, steps = 4, 40

    def broken(values: Tensor) -> float:
        count = 0
        for number in range(10):
            corner = torch.randint(0, 16 - side + 1, (len(x), 2), generator=stream(number))
            pictures = pasted(x, values.expand(len(x), -1, -1, -1), corner)
            count += int((standard(pictures).argmax(dim=1) != y).sum())
        return count / 10

    with frozen(standard):
        x, y = right_digits(standard, 40)
        trial, attack = Trial(y), Attack.parse(f"universal-patch-{steps}")
        found = attack(standard, x, y, Patch(side), generator=stream(), trial=trial)
        ours = int((standard(found).argmax(dim=1) != y).sum())
        np.random.seed(0)  # ART draws its places from it
        theirs = art_patch(standard, x, y, side, max_iter=steps + 4, learning_rate=0.1)
        assert trial.forward.max() <= steps + 4
        assert ours > broken(theirs) > broken(torch.full((3, side, side), 0.5))
