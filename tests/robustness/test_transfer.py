"""What makes an attack transfer: each transform against its formula, the attacks against their costs and the ball."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.registry import Attack, climb
from dfmcl.robustness.attacks.transfer import SAMPLES, SMALLEST, WITHIN, blurred, diverse, ensemble, smoothed, tuned
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.losses import margin
from dfmcl.robustness.models import frozen, to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.statistics import PairedCounts
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import BALLS, threat_of
from tests.linear import Linear, images, stream
from tests.networks import Networks
from tests.robustness.test_apgd import SHAPE, greys, network

NAMES = ("mi-fgsm", "di-fgsm", "ti-fgsm", "vmi-fgsm")
STEPS = 4
PASSES = {"mi-fgsm": STEPS, "di-fgsm": STEPS, "ti-fgsm": STEPS, "vmi-fgsm": STEPS + (STEPS - 1) * SAMPLES}
THREAT = Linf(0.1)
NOBODY = torch.zeros(0, dtype=torch.long)


class Weighed:
    """A pass whose loss is w . x, w `(N, C, H, W)`; it keeps the points it was shown."""

    def __init__(self, w: Tensor) -> None:
        self.w, self.shown = w, list[Tensor]()

    def __call__(self, points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.shown.append(points)
        return (points * self.w).flatten(1).sum(dim=1), self.w.clone(), torch.zeros(len(points), 2)


def noise(count: int, size: tuple[int, int] = (12, 12), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=stream(seed))


# --- views --------------------------------------------------------------------------------------------------


def test_half_of_the_images_are_seen_smaller_and_elsewhere() -> None:
    """A view of a white image is a white rectangle of at least 0.9 of its sides, on black; each has its own."""
    white, look = torch.ones(400, 1, 40, 40), Weighed(torch.ones(400, 1, 40, 40))
    diverse(look, THREAT, stream())(white, NOBODY, False)
    views = look.shown[0][:, 0]
    same = (views == 1).flatten(1).all(dim=1)
    assert 160 <= same.sum() <= 240
    assert len(views[~same].flatten(1).unique(dim=0)) == (~same).sum()
    area = views[~same].flatten(1).mean(dim=1)
    assert (area >= SMALLEST**2 - 0.03).all()
    assert area.min() < SMALLEST**2 + 0.03
    middle = (views * torch.arange(40.0)).sum(dim=(1, 2)) / views.sum(dim=(1, 2))
    assert abs(middle[~same].mean().item() - 19.5) < 0.25, "no side is preferred"
    for border in (views[:, 0], views[:, -1], views[:, :, 0], views[:, :, -1]):
        assert (border.amax(dim=1) < 0.5).any(), "black on each side of some"
    assert ((views >= 0) & (views <= 1)).all()


def test_the_gradient_of_a_view_is_that_of_the_image() -> None:
    """As the loss of a view is linear in the image, it rises along d by exactly gradient . d."""
    x, d, look = greys(30), noise(30, (6, 6)), Weighed(noise(30, (6, 6), seed=1))
    view = lambda points: diverse(look, THREAT, stream(3))(points, NOBODY, True)  # noqa: E731  # the same views
    value, gradient, _ = view(x)
    assert torch.allclose(view(x + d)[0] - value, (gradient * d).flatten(1).sum(dim=1), atol=1e-4)


# --- smoothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "width"), [(16, 5), (32, 5), (299, 15)])
def test_the_kernel_is_the_paper_s(side: int, width: int) -> None:
    """A Gaussian, 15 of 299 pixels wide at three standard deviations; it sums to one, and channels stay apart."""
    point = torch.zeros(1, 2, side, side)
    point[0, 0, side // 2, side // 2] = 1
    kernel = blurred(point)
    assert not kernel[0, 1].any()
    assert kernel.sum().item() == pytest.approx(1)
    rows = torch.nonzero(kernel[0, 0].any(dim=1))
    assert (rows.max() - rows.min() + 1).item() == width
    middle, reach = side // 2, width // 2
    for i, j in ((0, 0), (1, 0), (1, 2), (reach, reach)):
        share = kernel[0, 0, middle + i, middle + j] / kernel[0, 0, middle, middle]
        assert share.item() == pytest.approx(float(torch.tensor(-(i * i + j * j) * 4.5 / reach**2).exp()), rel=1e-3)


def test_smoothing_is_the_mean_over_moved_images() -> None:
    """What the paper derives: the blurred gradient is the weighted mean of those at images moved both ways."""
    w = noise(2, (17, 17))
    look = smoothed(Weighed(w), THREAT, stream())
    _, gradient, _ = look(torch.zeros(2, 3, 17, 17), NOBODY, True)
    point = torch.zeros(1, 1, 17, 17)
    point[0, 0, 8, 8] = 1
    kernel = blurred(point)[0, 0]
    reach = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    moved = torch.stack([kernel[8 + i, 8 + j] * w.roll((i, j), (2, 3)) for i, j in reach]).sum(dim=0)
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    assert torch.allclose(gradient[inner], moved[inner], atol=1e-5)


# --- tuning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_tuning_adds_what_the_neighbours_of_the_last_point_differed_by(norm: str) -> None:
    """First the plain gradient; then plus the mean of those within 1.5 eps of the point before, minus its own."""
    x, shown = 0.3 + 0.4 * greys(3), list[Tensor]()

    def look(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:  # the loss is |x|^3 / 3
        shown.append(points)
        return points.pow(3).flatten(1).sum(dim=1) / 3, points.square(), torch.zeros(len(points), 2)

    threat = threat_of(norm, 0.1)
    seen = tuned(look, threat, stream())
    _, first, _ = seen(x, NOBODY, True)
    assert len(shown) == 1
    _, second, _ = seen(x + 0.05, NOBODY, True)
    around = shown[2:]
    assert torch.equal(first, x.square())
    assert len(around) == SAMPLES
    far = torch.stack([BALLS[norm].lengths(point - x) for point in around])
    assert (far <= WITHIN * 0.1 + 1e-5).all()
    assert far.max() > 0.1
    difference = torch.stack([point.square() for point in around]).mean(dim=0) - x.square()
    assert torch.allclose(second, (x + 0.05).square() + difference, atol=1e-6)


# --- the attacks --------------------------------------------------------------------------------------------


@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([("linf", 0.0), ("linf", 0.03), ("linf", 1.0), ("l2", 0.4)]),
    st.sampled_from([0, 1, 3]),
    st.integers(0, 99),
)
def test_result_is_inside_repeatable_and_as_dear_as_said(
    name: str, ball: tuple[str, float], count: int, seed: int
) -> None:
    """In the ball and in [0, 1]; the same generator, the same bytes; so many passes of every image, and no more."""
    model, x, threat, sizes = network(seed=seed), greys(count, seed), threat_of(*ball), list[int]()
    y = model(x).argmax(dim=1)

    def counted(points: Tensor) -> Tensor:
        sizes.append(len(points))
        return model(points)

    attack, trial = Attack.parse(f"{name}-{STEPS}"), Trial(y)
    x_adv = attack(counted, x, y, threat, generator=stream(seed), trial=trial)
    assert threat.contains(x_adv, x).all()
    assert sum(sizes) == count * PASSES[name]
    assert (trial.forward == PASSES[name]).all()
    assert torch.equal(trial.forward, trial.backward)
    assert torch.equal(x_adv, attack(model, x, y, threat, generator=stream(seed)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_tuning_loses_nothing_where_gradients_are_alike(norm: str) -> None:
    """On a linear model the neighbours say the same: VMI reaches the best point of the ball on each image."""
    model, x = Linear(SHAPE), images(4, SHAPE)
    y = model(x).argmax(dim=1)
    eps = 0.5 * model.least(x, norm).min().item()
    dual = model.weight.abs().sum() if norm == "linf" else model.weight.norm()
    with frozen(model):
        x_adv = Attack.parse("vmi-fgsm-10")(model, x, y, threat_of(norm, eps), generator=stream())
        gained = (margin(model(x_adv), y) - margin(model(x), y)) / (eps * dual)
    assert (gained >= 0.99).all()


def test_transforms_need_the_last_iterate() -> None:
    """What they look at is not the iterate, so no iterate can be chosen by it; several together are fine."""
    model, x = network(), greys(2)
    y = model(x).argmax(dim=1)
    with pytest.raises(BadInput, match="keep"):
        climb(model, x, y, THREAT, generator=stream(), transforms=("di",))
    all_three = ("di", "ti", "vmi")
    x_adv = climb(model, x, y, THREAT, generator=stream(), transforms=all_three, keep="last", steps=3)
    assert THREAT.contains(x_adv, x).all()


def test_an_ensemble_is_the_mean_of_its_logits() -> None:
    """Logits, not probabilities or losses; one model alone stays itself."""
    one, other, x = network(seed=0), network(seed=1), greys(5)
    assert ensemble([one]) is one
    assert torch.allclose(ensemble([one, other])(x), (one(x) + other(x)) / 2)


@pytest.mark.parametrize("steps", [1, 5])
def test_momentum_is_that_of_its_peer(steps: int) -> None:
    """In float64, where no sign hangs on rounding, MI-FGSM ends where torchattacks' does, with momentum 1."""
    model, x = network().double(), greys(20).double()
    y, eps = model(x).argmax(dim=1), 0.05
    peer = torchattacks.MIFGSM(model, eps=eps, alpha=2.5 * eps / steps, steps=steps, decay=1.0)
    found = Attack.parse(f"mi-fgsm-{steps}")(model, x, y, Linf(eps), generator=stream())
    assert torch.allclose(found, peer(x, y), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_crafted_on_one_network_fools_another(
    name: str, networks: Networks, record_property: Callable[[str, object], None]
) -> None:
    """On a network trained otherwise fewer images hold than under noise of the same size, far beyond chance."""
    data = load_dataset("digits")
    x, y = to_float(torch.from_numpy(data.x_test[:200])), torch.from_numpy(data.y_test[:200])
    # Both resist a little: plain networks fall to noise of this size, and what that breaks no attack can.
    source, target = (load_run(networks(which)).model for which in ("pgd-at", "trades"))
    threat = threat_of("linf", "32/255")
    with frozen(source), frozen(target), torch.no_grad():
        crafted = Attack.parse(name)(source, x, y, threat, generator=generator(0, name))
        signs = torch.rand(x.shape, generator=stream()).sub(0.5).sign()
        held, under_noise = (
            (target(points).argmax(dim=1) == y).numpy() for points in (crafted, (x + threat.eps * signs).clamp(0, 1))
        )
    # Chance gives this once in 10^8 where the attack is no better than noise; the pinned networks give 10^-20.
    record_property("p below", p := PairedCounts.of(under_noise, held).p_more_lost)
    assert p < 1e-8, (held.sum(), under_noise.sum())
