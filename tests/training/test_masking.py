"""Dynamic Feature Masking: the closed form, the gradient to alpha, and silence in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.training import masking
from dfmcl.training.adversary import soft_cross_entropy
from dfmcl.training.config import Masking
from dfmcl.training.masking import (
    RULES,
    DynamicFeatureMask,
    MaskStatistics,
    find_layer,
    gradient_magnitude,
    keep_logit,
    pooled_linear_magnitude,
    sample,
    z_score,
)
from dfmcl.training.noise import Noise
from dfmcl.training.objectives import smoothed
from tests.present import present


def noise(seed: int = 0) -> Noise:
    return Noise(torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ModelSpec("resnet18", 8, 10, (32, 32, 3), (0.5,) * 3, (0.25,) * 3))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, smoothed(torch.arange(6), 10, 0.0)


def mask(layer: str = "layer4", **changes: object) -> DynamicFeatureMask:
    return DynamicFeatureMask(Masking.model_validate({"layer": layer, **changes}))


def drawn(magnitude: Tensor, alpha: Tensor, side: tuple[int, int] = (4, 4), seed: int = 0, **changes: object) -> Tensor:
    """A mask by the settings' rule."""
    settings = Masking.model_validate(changes)
    return sample(keep_logit(RULES[settings.rule](magnitude, alpha, settings), settings), side, settings, noise(seed))


def test_closed_form_equals_autograd(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """sum_k (softmax_k - y_k) W[k, c] / (H W) is the gradient that autograd finds, in train mode, in float64."""
    model, x, y = model.double().train(), batch[0].double(), batch[1].double()
    slow = gradient_magnitude(model, find_layer(model, "layer4"), x, y)
    with torch.no_grad():
        logits = model(x)
    fast = pooled_linear_magnitude(logits, y, model.get_parameter("net.fc.weight"), area=4 * 4)
    assert fast.shape == (6, 64)
    assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-15)
    assert fast.min() >= 0
    assert fast.max() > 1e-4


def test_closed_form_equals_finite_differences(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Nudging one map's pixels moves the loss as the closed form says: autograd is not its own witness."""
    model, y = model.double().eval(), batch[1]
    fc, weight = model.get_submodule("net.fc"), model.get_parameter("net.fc.weight")
    features = torch.rand(6, 64, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(f: Tensor) -> Tensor:
        with torch.no_grad():
            return soft_cross_entropy(fc(f.mean(dim=(2, 3))), y)

    magnitude = pooled_linear_magnitude(fc(features.mean(dim=(2, 3))), y, weight, area=16)
    for c in (0, 17, 63):
        nudge = torch.zeros_like(features)
        nudge[:, c, 1, 2] = 1e-5
        slope = (loss(features + nudge) - loss(features - nudge)) / 2e-5
        assert torch.allclose(slope.abs(), magnitude[:, c], rtol=1e-5, atol=1e-9)


READINGS: dict[str, dict[str, Any]] = {
    "literal": {},
    "mask with p, rescaled": {"semantics": "mask_with_p", "scaling": "inverted"},
    "batch mean": {"gradient": "batch_mean"},
    "straight-through": {"alpha_gradient": "straight_through"},
    "ranked": {"rule": "ranked", "rate": 0.2, "scaling": "inverted"},
}


@pytest.mark.parametrize("changes", READINGS.values(), ids=READINGS)
def test_fast_and_general_path_give_the_same_masked_step(batch: tuple[Tensor, Tensor], changes: dict[str, Any]) -> None:
    """Same noise, same weights: logits, every weight's gradient and batch norm's statistics are equal."""
    x, y = batch
    results = []
    for closed_form in (True, False):
        torch.manual_seed(0)
        model = Classifier(ModelSpec("resnet18", 8, 10, (32, 32, 3), (0.5,) * 3, (0.25,) * 3)).double().train()
        layer = mask(**changes).double()
        logits, p = layer(model, x.double(), y.double(), noise(), closed_form=closed_form)
        soft_cross_entropy(logits, y).sum().backward()
        gradients = torch.cat([present(parameter.grad).flatten() for parameter in model.parameters()])
        running = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
        results.append((logits.detach(), gradients, layer.alpha.grad, running, p.detach()))
    for fast, general in zip(*results, strict=True):
        assert torch.allclose(torch.as_tensor(fast), torch.as_tensor(general), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layer", ["conv1", "layer1", "layer2.0", "layer3.1.conv2", "layer4"])
def test_any_named_layer_can_be_masked(model: Classifier, batch: tuple[Tensor, Tensor], layer: str) -> None:
    """A step through a mask on any layer gives finite logits, and gradients to all weights and to alpha."""
    masking = mask(layer)
    logits, p = masking(model.train(), *batch, noise())
    soft_cross_entropy(logits, batch[1]).mean().backward()
    assert logits.isfinite().all()
    assert 0.5 <= p.min() <= p.max() < 1
    assert masking.alpha.grad is not None
    assert masking.alpha.grad.abs() > 0
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("alpha_gradient", ["relaxed", "straight_through"])
@pytest.mark.parametrize("semantics", ["keep_with_p", "mask_with_p"])
def test_alpha_receives_the_gradient_of_the_expected_mask(semantics: str, alpha_gradient: str) -> None:
    """Both estimators point where the expectation does, and a frozen alpha gets no gradient."""
    magnitude, alpha = torch.full((64, 32), 2.0), torch.tensor(0.3, requires_grad=True)
    settings: dict[str, Any] = {"semantics": semantics, "alpha_gradient": alpha_gradient, "temperature": 0.1}
    drawn(magnitude, alpha, **settings).mean().backward()
    p = torch.sigmoid(torch.tensor(0.6)).item()
    expected = (2.0 if semantics == "keep_with_p" else -2.0) * p * (1 - p)
    # The relaxation is biased by its temperature: 0.1 leaves a few per cent, the sample another per cent.
    assert present(alpha.grad).item() == pytest.approx(expected, rel=0.1 if alpha_gradient == "relaxed" else 1e-5)
    assert not mask(learn_alpha=False).alpha.requires_grad


@pytest.mark.parametrize("alpha_gradient", ["relaxed", "straight_through"])
def test_alpha_learns_nothing_from_the_mean_of_a_rescaled_mask(alpha_gradient: str) -> None:
    """E[mask / keep] is 1 whatever alpha is: the gradient of the mean must not claim otherwise."""
    magnitude, alpha = torch.full((64, 128), 2.0), torch.tensor(0.3, requires_grad=True)
    settings: dict[str, Any] = {"scaling": "inverted", "alpha_gradient": alpha_gradient, "temperature": 0.1}
    scaled = drawn(magnitude, alpha, **settings)
    assert scaled.max().item() == pytest.approx(1 / torch.sigmoid(torch.tensor(0.6)).item())
    scaled.mean().backward()
    assert alpha.grad is not None
    assert abs(alpha.grad.item()) < 0.05  # with the divisor taken for a constant: 0.71


@pytest.mark.parametrize("rule", ["dropout", "channel_dropout"])
def test_a_control_pays_for_no_gradient(
    model: Classifier, batch: tuple[Tensor, Tensor], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any layer dropout costs what dropout costs, so that its row in a table of costs is its own."""
    monkeypatch.setattr(masking, "gradient_magnitude", lambda *arguments: 1 / 0)
    _, p = mask("layer2", rule=rule, rate=0.3)(model.train(), *batch, noise())
    assert torch.allclose(p, torch.tensor(0.3))


KEPT: dict[str, tuple[dict[str, Any], float]] = {
    "keep with p": ({"semantics": "keep_with_p"}, 0.75),
    "mask with p": ({"semantics": "mask_with_p"}, 0.25),
    "dropout": ({"rule": "dropout", "rate": 0.3}, 0.7),
    "channel dropout": ({"rule": "channel_dropout", "rate": 0.3}, 0.7),
}


@pytest.mark.parametrize(("changes", "kept"), KEPT.values(), ids=KEPT)
def test_mask_is_an_exact_bernoulli_draw(changes: dict[str, Any], kept: float) -> None:
    """Elements are 0 or 1 and kept at the stated rate (5 sigma of the independent draws); rescaled, the mean is 1."""
    g, alpha = torch.ones(64, 128), torch.log(torch.tensor(3.0))
    bare = drawn(g, alpha, **changes)
    assert set(bare.unique().tolist()) == {0.0, 1.0}
    draws = g.numel() * (1 if changes.get("rule") == "channel_dropout" else 16)
    assert bare.mean().item() == pytest.approx(kept, abs=5 * (kept * (1 - kept) / draws) ** 0.5)
    scaled = drawn(g, alpha, **changes, scaling="inverted")
    assert torch.allclose(scaled, bare / kept)


def test_elements_of_a_map_are_independent_unless_maps_are_dropped_whole() -> None:
    """Per element, pixels of one map are uncorrelated; channel dropout takes all of a map or nothing."""
    plain = drawn(torch.zeros(256, 64), torch.tensor(0.1), (2, 2))
    a, b = plain[:, :, 0, 0].flatten() - 0.5, plain[:, :, 1, 1].flatten() - 0.5
    assert abs((a * b).mean().item() * 4) < 5 / 128  # 5 sigma of 16,384 independent products
    maps = drawn(torch.zeros(256, 64), torch.tensor(0.1), (2, 2), rule="channel_dropout").expand(256, 64, 2, 2)
    assert torch.equal(maps.amin(dim=(2, 3)), maps.amax(dim=(2, 3)))


def test_ranked_rule_is_relative() -> None:
    """A thousandfold smaller gradient gives the same p; p rises with the gradient, around the base rate."""
    g = torch.rand(8, 64, generator=torch.Generator().manual_seed(3))
    settings, alpha = Masking(rule="ranked", rate=0.2), torch.tensor(0.7)
    p = torch.sigmoid(RULES["ranked"](g, alpha, settings))
    assert torch.allclose(p, torch.sigmoid(RULES["ranked"](g / 1000, alpha, settings)), atol=1e-4)
    assert torch.equal(p.argsort(dim=1), g.argsort(dim=1))
    assert torch.sigmoid(RULES["ranked"](g, torch.tensor(0.0), settings)) == pytest.approx(0.2 * torch.ones(8, 64))
    assert torch.allclose(z_score(g).mean(dim=1), torch.zeros(8), atol=1e-5)
    assert torch.allclose(z_score(g).square().mean(dim=1), torch.ones(8), atol=1e-4)
    assert torch.equal(z_score(torch.ones(2, 5)), torch.zeros(2, 5))


def test_literal_rule_is_dropout_one_half_at_real_magnitudes(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """|dL/df| is so small that p stays within 1e-3 of one half; of the batch's mean loss it is 1/N of that."""
    _, p = mask()(model.train(), *batch, noise())
    _, of_mean = mask(gradient="batch_mean")(model, *batch, noise())
    assert 0.5 <= p.min() < p.max() < 0.501
    assert (of_mean - 0.5).mean().item() == pytest.approx((p - 0.5).mean().item() / 6, rel=0.05)


@pytest.mark.parametrize("layer", ["layer4", "layer3"])
def test_bfloat16_passes_leave_p_in_full_precision(model: Classifier, batch: tuple[Tensor, Tensor], layer: str) -> None:
    """Under autocast p - 1/2, some 1e-4, is as in float32 to a few per cent; bfloat16 would round it to 0."""
    _, expected = mask(layer)(model.train(), *batch, noise())
    with torch.autocast("cpu", torch.bfloat16):
        logits, p = mask(layer)(model, *batch, noise())
        soft_cross_entropy(logits.float(), batch[1]).mean().backward()
    assert p.dtype == torch.float32
    assert p.unique().numel() > 100
    assert torch.allclose(p - 0.5, expected - 0.5, rtol=0.2, atol=2e-5)


def test_prior_pulls_the_rate_back() -> None:
    """The penalty is prior * (masking rate - rate)^2 and its gradient brings alpha to where the rates agree."""
    layer = mask(rule="ranked", rate=0.1, prior=3.0, alpha=2.0)
    p = torch.full((4, 8), 0.3)
    assert layer.penalty(p) == pytest.approx(torch.full((4,), 3.0 * 0.04))
    kept = mask(rule="literal", rate=0.1, prior=1.0)
    assert kept.penalty(torch.full((1, 8), 0.9)).item() == pytest.approx(0.0, abs=1e-12)
    g = torch.rand(16, 64, generator=torch.Generator().manual_seed(3))
    layer.penalty(torch.sigmoid(RULES["ranked"](g, layer.alpha, layer.settings))).mean().backward()
    assert present(layer.alpha.grad) > 0  # at alpha 2 more than a tenth is masked


def test_statistics_describe_p() -> None:
    """Mean, spread and a histogram that counts every value, also where all are equal."""
    p = torch.linspace(0.2, 0.6, 1000).view(10, 100)
    found = MaskStatistics.of(p)
    assert (found.low, found.high, found.mean) == pytest.approx((0.2, 0.6, 0.4))
    assert sum(found.counts) == 1000
    assert max(found.counts) - min(found.counts) <= 2
    assert len(MaskStatistics.of(torch.full((2, 3), 0.5)).counts) == masking.BINS


def test_masking_changes_nothing_in_eval_mode(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """After masked steps on every kind of layer a classifier in eval mode answers as a copy that never saw a mask."""
    x, y = batch
    for layer in ("layer2", "layer4"):
        mask(layer)(model.train(), x, y, noise())
    copy = Classifier(model.spec)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), copy.eval()(x))
        assert torch.equal(model(x), model(x))
    assert not any(module._forward_hooks for module in model.modules())


def test_mask_does_act_in_training(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """The masked logits differ from the plain ones: the test above is not vacuous."""
    x, y = batch
    with torch.no_grad():
        plain = model.train()(x)
    masked, _ = mask()(model, x, y, noise())
    assert not torch.allclose(plain, masked, atol=1e-3)


def test_nothing_flows_back_through_p(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Weight gradients are those of a fixed mask: |dL/df| is data."""
    x, y = batch
    model = model.double().train()
    x, y = x.double(), y.double()
    logits, p = mask(learn_alpha=False).double()(model, x, y, noise())
    (through_mask,) = torch.autograd.grad(soft_cross_entropy(logits, y).sum(), [model.get_parameter("net.fc.weight")])

    constant = sample(torch.logit(p), (4, 4), Masking(), noise()).detach()
    logits = model.head(model.features(x) * constant)
    (through_constant,) = torch.autograd.grad(
        soft_cross_entropy(logits, y).sum(), [model.get_parameter("net.fc.weight")]
    )
    assert torch.allclose(through_mask, through_constant, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layer", ["layer5", "", "fc"])
def test_impossible_layer_is_refused(model: Classifier, batch: tuple[Tensor, Tensor], layer: str) -> None:
    """A name that is not there, or whose output is no feature map, is bad input that names the key."""
    with pytest.raises(BadInput, match=r"masking\.layer"):
        mask(layer)(model.train(), *batch, noise())


def test_hooks_vanish_when_the_step_fails(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """An error in the middle leaves no hook and no frozen weight behind."""
    with pytest.raises(RuntimeError):
        mask("layer2")(model.train(), batch[0][:, :2], batch[1], noise())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
