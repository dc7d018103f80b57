"""The fast pass: in float32 it is the model, in bfloat16 it points where the model points, and shortcuts that do not
hold are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.robustness import losses
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.gradients import AttackPass, attack_pass, has_bfloat16
from dfmcl.robustness.models import Classifier, to_bytes
from dfmcl.robustness.threats.registry import threat_of
from tests.robustness.traps import Flipped

# Convolutions in bfloat16 run on every CPU, slowly where it has no instruction for them.
BOTH = ("float32", "bfloat16")


@pytest.fixture
def example() -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def lived(model: nn.Module) -> nn.Module:
    """The model with running statistics and affine parameters as training leaves them: not 0 and 1."""
    stream = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=stream))
    return model.eval()


def small(*middle: nn.Module) -> nn.Module:
    """Convolution, `middle`, pooling, linear layer; ten classes."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return lived(nn.Sequential(conv, *middle, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)))


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of the margin to class 0."""
    y = torch.zeros(len(x), dtype=torch.int64)
    return losses.value_and_gradient(model, x, losses.margin, (y,), True)[1]


def assert_same(made: AttackPass, model: nn.Module, x: Tensor) -> None:
    """Logits and gradients up to rounding."""
    with torch.no_grad():
        assert torch.allclose(made(x), model(x), rtol=1e-4, atol=1e-4 * float(model(x).abs().max()))
    theirs = gradient(model, x)
    assert (gradient(made, x) - theirs).norm() <= 1e-3 * theirs.norm()


def test_in_float32_it_is_the_model(hardened: Classifier, digits: tuple[Tensor, Tensor]) -> None:
    """On images that the proof never saw, logits and gradients are the model's, with every batch norm folded."""
    made = attack_pass(hardened, digits[0], precision="float32")
    assert (made.precision, made.folded, made.memory_format) == ("float32", 20, torch.channels_last)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert_same(made, hardened, digits[0][50:100])


def test_in_bfloat16_it_points_where_the_model_points(hardened: Classifier, digits: tuple[Tensor, Tensor]) -> None:
    """Convolutions run in bfloat16, the gradient is nearly float32's, and logits keep float32's resolution."""
    made, x = attack_pass(hardened, digits[0], precision="bfloat16"), digits[0][50:100]
    assert made.precision == "bfloat16"
    cosine = torch.cosine_similarity(gradient(made, x).flatten(1), gradient(hardened, x).flatten(1))
    assert cosine.median() > 0.98
    with torch.no_grad():
        logits = made(x)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"])
def test_networks_of_torchvision_fold(name: str) -> None:
    """Each batch norm right behind a convolution is folded, whatever the network's code looks like."""
    torch.manual_seed(0)
    # DenseNet's others come before their convolution.
    expected = {"mobilenet_v2": 52, "shufflenet_v2_x0_5": 56, "densenet121": 59}[name]
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    x = torch.rand(4, 3, 32, 32)
    model.train()(torch.rand(16, 3, 32, 32))
    model.eval().requires_grad_(False)
    made = attack_pass(model, x, precision="float32")
    assert made.folded == expected
    assert_same(made, model, x)


class Fork(nn.Module):
    """A convolution whose output is read by a batch norm and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.net = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), small()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        logits: Tensor = self.net(self.norm(y) + y)
        return logits


class Twice(nn.Module):
    """A batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.net = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), small()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.norm(self.one(x))[:, :, 1:-1, 1:-1] + self.norm(self.two(x)))
        return logits


class Busy(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def in_training() -> nn.Module:
    """A network that keeps its batch norm in training mode."""
    model = small(nn.BatchNorm2d(8))
    model[1].eval = lambda: model[1]  # type: ignore[index]  # stubborn, as some traps are
    model[1].train = lambda mode=True: model[1]  # type: ignore[index]
    model[1].training = True  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: lived(Fork()),
        lambda: lived(Twice()),
        lambda: small(nn.ReLU(inplace=True), nn.BatchNorm2d(8)),
        lambda: small(Busy(8)),
        in_training,
    ],
    ids=["fork", "twice", "in place", "subclass", "training"],
)
def test_what_cannot_be_folded_is_not(make: Callable[[], nn.Module], example: Tensor) -> None:
    """A batch norm that is not all there is between convolution and the rest stays, and the answers stay right."""
    model = make()
    made = attack_pass(model, example, precision="float32")
    assert made.folded == 0
    assert_same(made, model, example)


def test_an_in_place_step_does_not_keep_others_from_folding(example: Tensor) -> None:
    """A pair that only looks like one is left out alone."""
    model = small(nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    assert attack_pass(model, example, precision="float32").folded == 1


class Viewed(nn.Module):
    """A forward pass that bears no channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 14 * 14, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.conv(x)).view(len(x), -1))
        return logits


class Strict(nn.Module):
    """A forward pass that bears no bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small(nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError("expected scalar type Float but found BFloat16")
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize(("make", "memory_format"), [(Viewed, torch.contiguous_format), (Strict, torch.channels_last)])
def test_a_shortcut_that_a_model_does_not_bear_is_left_out(
    make: Callable[[], nn.Module], memory_format: torch.memory_format, example: Tensor
) -> None:
    """What raises in one form is attacked in another; the rest of the shortcuts remain."""
    model = lived(make())
    made = attack_pass(model, example, precision="bfloat16")
    assert (made.memory_format, made.folded) == (memory_format, 1)
    assert made.precision == ("bfloat16" if make is Viewed else "float32")


class Steep(nn.Module):
    """A difference that three digits do not resolve: in bfloat16 its gradient is noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 10, 3)
        self.two.load_state_dict(self.one.state_dict())
        self.two.weight.data.mul_(1 + 1e-4 * torch.randn_like(self.two.weight))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.one(x) - self.two(x)).amax(dim=(2, 3))
        return logits


def test_a_gradient_that_bfloat16_turns_is_taken_in_float32(example: Tensor) -> None:
    """Where bfloat16 points elsewhere the attack climbs in float32, though bfloat16 was asked for."""
    made = attack_pass(Steep(), example, precision="bfloat16")
    assert made.precision == "float32"
    assert_same(made, Steep(), example)


def test_foreign_gradients_survive(example: Tensor) -> None:
    """An operator with a backward pass of its own keeps it: the copy is the model, not a trace of its answers."""
    net = small(nn.BatchNorm2d(8))

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(Flipped.apply(x))
            return logits

    for precision in BOTH:
        turned, honest = attack_pass(Wrong(), example, precision=precision), attack_pass(net, example)
        assert torch.cosine_similarity(gradient(turned, example).flatten(), gradient(honest, example).flatten(), 0) < 0


def test_random_models_are_used_as_they_are(example: Tensor) -> None:
    """A model that answers otherwise each time is neither copied nor frozen in one of its answers."""
    model = nn.Sequential(small(nn.BatchNorm2d(8)), Noise())
    made = attack_pass(model, example, precision="bfloat16")
    assert made.network is model
    assert not torch.equal(made(example), made(example))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Tied(nn.Module):
    """A network with a tensor that `copy.deepcopy` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small(nn.BatchNorm2d(8))
        self.scale = self.net[-1].weight.sum().abs()  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x) * self.scale
        return logits


def test_a_model_that_cannot_be_copied_is_used_itself(example: Tensor) -> None:
    """It is attacked all the same, in float32."""
    model = Tied()
    made = attack_pass(model, example)
    assert (made.network, made.precision) == (model, "float32")
    assert gradient(made, example).abs().sum() > 0


@pytest.mark.parametrize("precision", BOTH)
def test_work_that_is_told_to_end_ends(precision: str, example: Tensor) -> None:
    """In whichever of the proof's passes that comes: it is no copy that fails, after which the next is tried."""
    model, passes = small(nn.BatchNorm2d(8)), [0]
    ends = 100

    def end(module: nn.Module, inputs: Any) -> None:
        passes[0] += 1
        if passes[0] >= ends:
            raise DfmclError("stopped")

    model.register_forward_pre_hook(end)  # which its copies carry too
    attack_pass(model, example, precision=precision)
    for ends in range(1, passes[0] + 1):
        passes[0] = 0
        with pytest.raises(DfmclError):
            attack_pass(model, example, precision=precision)
        assert passes[0] == ends


@pytest.mark.parametrize("precision", BOTH)
def test_the_model_is_left_as_it_was(precision: str, example: Tensor) -> None:
    """Modes, hooks, gradients and weights of the model are untouched, and later changes to it do not reach the copy."""
    model = small(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = attack_pass(model, example, precision=precision)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    answers = made(example)
    model[0].weight.data.zero_()  # type: ignore[index]
    assert torch.equal(made(example), answers)
    assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("name", ["pgd-10", "apgd-ce-20"])
def test_bfloat16_loses_no_strength(name: str, hardened: Classifier, digits: tuple[Tensor, Tensor]) -> None:
    """The same images fall as in float32, give or take two of 200."""
    images, labels = to_bytes(digits[0]).numpy(), digits[1].numpy()
    robust = {}
    for precision in BOTH:
        suite, threat = [Attack.parse(name)], threat_of("linf", "16/255")
        outcome = evaluate(hardened, images, labels, threat, suite, batch_size=200, precision=precision)
        robust[precision] = outcome.evaluation.robust_images
    assert 20 < sum(robust["float32"]) < 180
    assert abs(sum(robust["float32"]) - sum(robust["bfloat16"])) <= 2


def test_bfloat16_claims_nothing(hardened: Classifier, digits: tuple[Tensor, Tensor]) -> None:
    """Where only the pass in bfloat16 errs, nothing has fallen: float32 decides, and the record says how often."""
    x, y = digits[0], digits[1]
    made = attack_pass(hardened, x, precision="bfloat16")

    class Wrong(AttackPass):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * -1

    wrong = Wrong(made.network, made.memory_format, made.precision, made.folded, made.portions)
    threat, suite = threat_of("linf", "1/255"), [Attack.parse("pgd-2")]
    outcome = evaluate(hardened, to_bytes(x).numpy(), y.numpy(), threat, suite, source=wrong, batch_size=200)
    with torch.no_grad():
        decided = hardened(torch.from_numpy(outcome.adversarial).permute(0, 3, 1, 2) / 255).argmax(dim=1) == y
    assert outcome.evaluation.robust.k >= decided.sum() > 100
    assert (outcome.evaluation.attacks[0].unconfirmed or 0) > 100


def test_precision_is_one_of_three(example: Tensor) -> None:
    """A word that means nothing is an error that names the choices."""
    with pytest.raises(BadInput, match=r"float16.*auto, bfloat16, float32"):
        attack_pass(small(), example, precision="float16")


def test_auto_is_what_the_hardware_is_fast_in(hardened: Classifier, digits: tuple[Tensor, Tensor]) -> None:
    """bfloat16 where this CPU has it, else float32."""
    expected = "bfloat16" if has_bfloat16(torch.device("cpu")) else "float32"
    assert attack_pass(hardened, digits[0]).precision == expected
    assert has_bfloat16(torch.device("meta")) is False


def test_any_kind_of_trap_is_copied_with_its_answers(example: Tensor) -> None:
    """Logits scaled by a thousand or a thousandth are folded, proven and climbed like others."""
    for factor in (1e3, 1e-3):
        model: Any = nn.Sequential(small(nn.BatchNorm2d(8)), Scale(factor))
        made = attack_pass(model, example, precision="bfloat16")
        assert (made.folded, made.precision) == (1, "bfloat16")


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
