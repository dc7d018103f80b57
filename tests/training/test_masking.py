"""Dynamic Feature Masking: the closed form, the gradient to alpha, and silence in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustness.errors import BadInput
from robustness.losses import cross_entropy
from robustness.models import Classifier, ModelSpec
from training.masking import (
    DynamicFeatureMask,
    find_layer,
    gradient_magnitude,
    pooled_linear_magnitude,
    probability,
    sample,
)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ModelSpec("resnet18", 8, 10, (32, 32, 3), (0.5,) * 3, (0.25,) * 3))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 3, 32, 32, generator=stream(1)), torch.arange(6)


def mask(layer: str = "layer4", **changes: object) -> DynamicFeatureMask:
    settings = {"alpha": 0.1, "learn_alpha": True, "semantics": "keep_with_p", "temperature": 0.5, **changes}
    return DynamicFeatureMask(layer, **settings)  # type: ignore[arg-type]


def test_closed_form_equals_autograd(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """sum_k (softmax_k - y_k) W[k, c] / (H W) is the gradient that autograd finds, in train mode, in float64."""
    model, x, y = model.double().train(), batch[0].double(), batch[1]
    slow = gradient_magnitude(model, find_layer(model, "layer4"), x, y, cross_entropy)
    with torch.no_grad():
        logits = model(x)
    fast = pooled_linear_magnitude(logits, y, model.net.fc.weight, area=4 * 4)
    assert fast.shape == (6, 64)
    assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-15)
    assert fast.min() >= 0
    assert fast.max() > 1e-4


def test_closed_form_equals_finite_differences(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Nudging one map's pixels moves the loss as the closed form says: autograd is not its own witness."""
    model, y = model.double().eval(), batch[1]
    features = torch.rand(6, 64, 4, 4, generator=stream(2), dtype=torch.float64)

    def loss(f: Tensor) -> Tensor:
        with torch.no_grad():
            return cross_entropy(model.net.fc(f.mean(dim=(2, 3))), y)

    magnitude = pooled_linear_magnitude(model.net.fc(features.mean(dim=(2, 3))), y, model.net.fc.weight, area=16)
    for c in (0, 17, 63):
        nudge = torch.zeros_like(features)
        nudge[:, c, 1, 2] = 1e-5
        slope = (loss(features + nudge) - loss(features - nudge)) / 2e-5
        assert torch.allclose(slope.abs(), magnitude[:, c], rtol=1e-5, atol=1e-9)


def test_fast_and_general_path_give_the_same_masked_step(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Same noise, same weights: logits, every weight's gradient and batch norm's statistics are equal."""
    x, y = batch
    results = []
    for closed_form in (True, False):
        torch.manual_seed(0)
        model = Classifier(ModelSpec("resnet18", 8, 10, (32, 32, 3), (0.5,) * 3, (0.25,) * 3)).double().train()
        masking = mask().double()
        logits, statistics = masking(model, x.double(), y, cross_entropy, stream(), closed_form)
        cross_entropy(logits, y).sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        running = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
        results.append((logits.detach(), gradients, masking.alpha.grad, running, statistics.mean))
    for fast, general in zip(*results, strict=True):
        assert torch.allclose(torch.as_tensor(fast), torch.as_tensor(general), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layer", ["conv1", "layer1", "layer2.0", "layer3.1.conv2", "layer4"])
def test_any_named_layer_can_be_masked(model: Classifier, batch: tuple[Tensor, Tensor], layer: str) -> None:
    """A step through a mask on any layer gives finite logits, and gradients to all weights and to alpha."""
    masking = mask(layer)
    logits, statistics = masking(model.train(), *batch, cross_entropy, stream())
    cross_entropy(logits, batch[1]).mean().backward()
    assert logits.isfinite().all()
    assert 0.5 <= statistics.low <= statistics.mean <= statistics.high < 1
    assert masking.alpha.grad is not None
    assert masking.alpha.grad.abs() > 0
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("semantics", ["keep_with_p", "mask_with_p"])
def test_alpha_receives_the_gradient_of_the_expected_mask(semantics: str) -> None:
    """The relaxed gradient points where the expectation does, and a frozen alpha gets none."""
    magnitude, alpha = torch.full((64, 32), 2.0), torch.tensor(0.3, requires_grad=True)
    sample(magnitude, alpha, (4, 4), semantics, 0.1, stream()).mean().backward()
    p = probability(magnitude, alpha.detach()).mean().item()
    expected = (2.0 if semantics == "keep_with_p" else -2.0) * p * (1 - p)
    # The relaxation is biased by its temperature: 0.1 leaves a few per cent, the sample another per cent.
    assert alpha.grad.item() == pytest.approx(expected, rel=0.1)
    assert not mask(learn_alpha=False).alpha.requires_grad


@pytest.mark.parametrize(("semantics", "kept"), [("keep_with_p", 0.75), ("mask_with_p", 0.25)])
def test_mask_is_an_exact_bernoulli_draw(semantics: str, kept: float) -> None:
    """Elements are 0 or 1 and kept at the stated rate: p = sigmoid(ln 3) = 0.75 of 131,072 elements, +- 5 sigma."""
    drawn = sample(torch.ones(64, 128), torch.log(torch.tensor(3.0)), (4, 4), semantics, 0.5, stream())
    assert torch.equal(drawn, drawn.round())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(kept, abs=5 * (0.1875 / drawn.numel()) ** 0.5)


def test_elements_of_a_map_are_independent() -> None:
    """The mask is per element, not per map: pixels of one map are uncorrelated."""
    drawn = sample(torch.zeros(256, 64), torch.tensor(0.1), (2, 2), "keep_with_p", 0.5, stream())
    a, b = drawn[:, :, 0, 0].flatten() - 0.5, drawn[:, :, 1, 1].flatten() - 0.5
    assert abs((a * b).mean().item() * 4) < 5 / 128  # 5 sigma of 16,384 independent products


def test_masking_changes_nothing_in_eval_mode(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """After masked steps on every kind of layer a classifier in eval mode answers as a copy that never saw a mask."""
    x, y = batch
    for layer in ("layer2", "layer4"):
        mask(layer)(model.train(), x, y, cross_entropy, stream())
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
    masked, _ = mask()(model, x, y, cross_entropy, stream())
    assert not torch.allclose(plain, masked, atol=1e-3)


def test_nothing_flows_back_through_p(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Weight gradients are those of a fixed mask: |dL/df| is data."""
    x, y = batch
    model = model.double().train()
    masking = mask(learn_alpha=False).double()
    logits, _ = masking(model, x.double(), y, cross_entropy, stream())
    (through_mask,) = torch.autograd.grad(cross_entropy(logits, y).sum(), [model.net.fc.weight])

    features: list[Tensor] = []
    handle = model.net.layer4.register_forward_hook(lambda module, inputs, output: features.append(output))
    plain = model(x.double())
    handle.remove()
    magnitude = pooled_linear_magnitude(plain.detach(), y, model.net.fc.weight.detach(), 16)
    fixed = sample(magnitude, torch.tensor(0.1, dtype=torch.float64), (4, 4), "keep_with_p", 0.5, stream()).detach()
    logits = model.net.fc(torch.flatten(model.net.avgpool(features[0] * fixed), 1))
    (through_constant,) = torch.autograd.grad(cross_entropy(logits, y).sum(), [model.net.fc.weight])
    assert torch.allclose(through_mask, through_constant, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layer", ["layer5", "", "fc"])
def test_impossible_layer_is_refused(model: Classifier, batch: tuple[Tensor, Tensor], layer: str) -> None:
    """A name that is not there, or whose output is no feature map, is bad input that names the key."""
    with pytest.raises(BadInput, match=r"masking\.layer"):
        mask(layer)(model.train(), *batch, cross_entropy, stream())


def test_hooks_vanish_when_the_step_fails(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """An error in the middle leaves no hook and no frozen weight behind."""
    with pytest.raises(RuntimeError):
        mask("layer2")(model.train(), batch[0][:, :2], batch[1], cross_entropy, stream())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
