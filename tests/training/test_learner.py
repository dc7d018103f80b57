"""One update: each ingredient does what its source says, and the fast path does what the plain loop does."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.models import Classifier, to_float
from dfmcl.training.adversary import CRAFTS, Craft
from dfmcl.training.averaging import MovingAverage
from dfmcl.training.awp import perturbed, perturbed_parameters
from dfmcl.training.compact import expand, shrink
from dfmcl.training.config import TrainConfig, load_config
from dfmcl.training.learner import Learner, batch_norms, layout_of, twin, with_own_batch_norm
from dfmcl.training.noise import Noise
from dfmcl.training.objectives import OBJECTIVES, jensen_shannon, kl, smoothed
from dfmcl.training.optimizer import learning_rate
from dfmcl.training.train import build
from tests.present import present
from tests.training.workshop import ALONE, NARROW, PLAIN, batch, learner

ROOT = Path(__file__).parents[2]


def test_bfloat16_passes_stay_close(digits: Dataset) -> None:
    """The same update in bfloat16: loss and gradient hardly differ; weights, gradients and averages stay float32."""
    losses, gradients = list[float](), list[torch.Tensor]()
    for precision in ("float32", "bfloat16"):
        one = learner(digits, *PLAIN, f"optimization.precision={precision}", "optimization.ema=0.9")
        losses.append(one.update(*batch(digits, 1), 1).item())
        found = [parameter.grad for parameter in one.model.parameters()]
        gradients.append(torch.cat([gradient.flatten() for gradient in found if gradient is not None]))
        tensors = [*one.model.parameters(), *one.model.buffers(), *one.result.parameters()]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
        assert all(present(parameter.grad).dtype == torch.float32 for parameter in one.model.parameters())
    # Eight bits of a mantissa: each of 20 layers may be off by half a step, 0.2 %. What follows from the first update
    # on is another training, whose losses may go anywhere.
    assert losses[0] == pytest.approx(losses[1], rel=20 * 0.002)
    first, second = gradients
    assert (
        torch.cosine_similarity(first, second, dim=0) > 0.5
    )  # two that have nothing to do with each other: 0.00 +- 0.01
    assert losses[0] != losses[1]


def test_twin_follows_the_model_without_being_told(digits: Dataset) -> None:
    """It shares the storage: after updates it answers as the model in eval mode; it never asks for weight gradients."""
    one = learner(digits, *PLAIN)
    for step in range(1, 4):
        one.update(*batch(digits, step), step)
    x = to_float(batch(digits)[0])
    own = copy.deepcopy(one.model).eval()
    with torch.no_grad():
        assert torch.equal(one.twins[0](x), own(x))
    assert one.model.training
    assert not one.twins[0].training
    assert not any(parameter.requires_grad for parameter in one.twins[0].parameters())


def test_views_have_their_own_batch_norms_and_share_the_rest(digits: Dataset) -> None:
    """After updates all weights are one and the same, the statistics and affine parameters differ."""
    one = learner(digits, *PLAIN, "objective.views=2", "objective.name=trades", "objective.view_augmentation=crop-flip")
    for step in range(1, 4):
        one.update(*batch(digits, step), step)
    first, further = one.networks
    norms = {id(p) for module in batch_norms(first) for p in module.parameters()}
    for (name, ours), theirs in zip(first.named_parameters(), further.parameters(), strict=True):
        assert (ours is theirs) == (id(ours) not in norms), name
    pairs = list(zip(batch_norms(first), batch_norms(further), strict=True))
    for name in ("running_mean", "weight"):
        assert all(not torch.equal(a.state_dict()[name], b.state_dict()[name]) for a, b in pairs)
    assert with_own_batch_norm(first).mean is first.mean
    stem = "net.conv1.weight"
    assert twin(further).get_parameter(stem).data_ptr() == first.get_parameter(stem).data_ptr()


def test_trades_and_its_kl_equal_a_float64_reference() -> None:
    """Against numpy in float64: CE(clean) + 6 KL(clean || adversarial), and the divergence by itself."""
    rng = np.random.default_rng(0)
    clean, adversarial, y = rng.normal(0, 3, (16, 10)), rng.normal(0, 3, (16, 10)), rng.integers(0, 10, 16)
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (clean, adversarial))
    divergence = (p * np.log(p / q)).sum(axis=1)
    expected = -np.log(p[np.arange(16), y]) + 6 * divergence
    logits = torch.tensor(clean, dtype=torch.float32), torch.tensor(adversarial, dtype=torch.float32)
    assert kl(*logits).numpy() == pytest.approx(divergence, rel=1e-4)
    target = smoothed(torch.from_numpy(y), 10, 0.0)
    assert OBJECTIVES["trades"](*logits, target, 6.0).numpy() == pytest.approx(expected, rel=1e-4)
    assert OBJECTIVES["ce"](*logits, target, 6.0).numpy() == pytest.approx(-np.log(q[np.arange(16), y]), rel=1e-4)
    boosted = -np.log(q[np.arange(16), y]) - np.log(1.0001 - np.where(np.eye(10)[y] == 1, 0, q).max(axis=1))
    expected = boosted + 5 * divergence * (1 - p[np.arange(16), y])
    assert OBJECTIVES["mart"](*logits, target, 5.0).numpy() == pytest.approx(expected, rel=1e-4)


def test_jensen_shannon_is_zero_for_equal_views_and_ln_2_for_opposite_ones() -> None:
    """Its two known values, and symmetry."""
    a, b = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert jensen_shannon([a, a, a]).item() == pytest.approx(0, abs=1e-6)
    assert jensen_shannon([a, b]).item() == pytest.approx(math.log(2), rel=1e-4)
    c = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    d = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(jensen_shannon([c, d]), jensen_shannon([d, c]))


def test_label_smoothing_equals_torchs() -> None:
    """The smoothed target's cross-entropy is torch's own."""
    logits, y = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    ours = OBJECTIVES["ce"](logits, logits, smoothed(y, 10, 0.1), 0.0)
    assert torch.allclose(ours, functional.cross_entropy(logits, y, label_smoothing=0.1, reduction="none"))


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "layout"),
    [
        (1, 2, 4, torch.contiguous_format),  # the shortcut of a ResNet of width 4
        (1, 2, 12, torch.contiguous_format),
        (1, 2, 8, torch.contiguous_format),  # of width 8: AVX512, with two threads
        (1, 2, 20, torch.contiguous_format),
        (1, 2, 16, torch.channels_last),
        (1, 1, 4, torch.channels_last),
        (3, 2, 4, torch.channels_last),
    ],
)
def test_what_onednn_cannot_lay_out_is_not(
    kernel: int, stride: int, channels: int, layout: torch.memory_format
) -> None:
    """The weight gradient of a strided 1x1 convolution writes past its buffer, but for 16, 24, 32 ... channels."""
    conv = nn.Conv2d(channels, 16, kernel, stride)
    assert layout_of(nn.Sequential(nn.Conv2d(3, channels, 3), conv)) == layout
    data, config = load_dataset("digits"), load_config("quickstart", ["model.width=4"])
    assert Learner(config, build(config, data), 1, ALONE).view(batch(data)[0]).is_contiguous()


def test_weight_perturbation_is_relative_uphill_and_undone(digits: Dataset) -> None:
    """Inside, each weight tensor moved by gamma of its norm along its gradient, uphill; outside, nothing moved."""
    torch.manual_seed(0)
    model = build(load_config("quickstart", NARROW), digits)
    x, y = to_float(batch(digits)[0]).contiguous(), batch(digits)[1]  # see learner.layout_of
    weights = perturbed_parameters(model)
    assert {id(weight) for weight in weights} == {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    before = [weight.detach().clone() for weight in weights]
    loss = functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, weights)
    with perturbed(weights, gradients, gamma=0.01):
        for weight, old, gradient in zip(weights, before, gradients, strict=True):
            step = weight.detach() - old
            assert step.norm().item() == pytest.approx(0.01 * old.norm().item(), rel=1e-4)
            assert functional.cosine_similarity(step.flatten(), gradient.flatten(), dim=0) > 0.999
        assert functional.cross_entropy(model(x), y) > loss + 0.01
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_weight_perturbation_enters_the_update_and_leaves_statistics_alone(digits: Dataset) -> None:
    """With it another gradient results; batch norm counts one forward pass a step, as without it."""
    updates: dict[float, Learner] = {}
    for gamma in (0.0, 0.02):
        updates[gamma] = learner(digits, *PLAIN, f"optimization.awp={gamma}")
        updates[gamma].loss(*batch(digits), 1)
    plain, perturbed_one = (list(updates[gamma].model.parameters()) for gamma in (0.0, 0.02))
    assert all(torch.equal(a, b) for a, b in zip(plain, perturbed_one, strict=True))  # restored
    pairs = [(present(a.grad), present(b.grad)) for a, b in zip(plain, perturbed_one, strict=True)]
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in pairs)
    counted = [int(module.get_buffer("num_batches_tracked")) for module in batch_norms(updates[0.02].model)]
    assert set(counted) == {1}


def test_weight_perturbation_waits_for_its_share_of_the_run(digits: Dataset) -> None:
    """awp_start = 0.5 of 20 steps: step 10 is as without it, step 11 is not."""
    for step, same in ((10, True), (11, False)):
        plain = learner(digits, *PLAIN)
        later = learner(digits, *PLAIN, "optimization.awp=0.02", "optimization.awp_start=0.5")
        losses = [one.loss(*batch(digits), step).item() for one in (plain, later)]
        assert (losses[0] == losses[1]) == same


def test_average_equals_its_closed_form() -> None:
    """sum over steps of (1 - d_i) prod_{j > i} d_j w_i, for weights and batch-norm buffers; counters are copied."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average = MovingAverage(net, 0.9)
    expected = {name: value.clone().double() for name, value in net.state_dict().items()}
    for step in range(1, 31):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        net(torch.randn(5, 3, 8, 8))
        average.update(net)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in average.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(value) == 30
        else:
            assert torch.allclose(value.double(), expected[name], rtol=1e-4, atol=1e-5), name


def test_average_begins_where_it_is_told_and_is_what_is_kept(digits: Dataset) -> None:
    """Before ema_start the average is the network; after it, it lags behind, and `result` is the average."""
    one = learner(digits, *PLAIN, "optimization.ema=0.99", "optimization.ema_start=0.1")
    for step, equal in ((1, True), (2, True), (3, False)):
        one.update(*batch(digits, step), step)
        pairs = list(zip(one.result.parameters(), one.model.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs) == equal
    assert one.result is not one.model
    assert not one.result.training


@given(st.integers(1, 1000), st.sampled_from(["constant", "cosine", "linear"]), st.floats(0, 0.5))
def test_learning_rate_warms_up_and_comes_down(step: int, schedule: str, warmup: float) -> None:
    """Positive, at most lr, lr at the end of the warm-up, near zero at the end unless constant."""
    options = ["optimization.lr=0.1", f"optimization.lr_schedule={schedule}", f"optimization.lr_warmup={warmup}"]
    config: TrainConfig = load_config("quickstart", options)
    assert 0 < learning_rate(config, step, 1000) <= 0.1 + 1e-12
    assert learning_rate(config, math.ceil(warmup * 1000) + 1, 1000) == pytest.approx(0.1, rel=5e-3)
    assert learning_rate(config, 1000, 1000) == pytest.approx(0.1 if schedule == "constant" else 0, abs=3e-4)


def test_collapse_of_pgd_accuracy_gives_fgsms_share_to_n_fgsm(digits: Dataset) -> None:
    """The held-out figure falls by more than the threshold: from then on FGSM steps are noisy ones, for good."""
    one = learner(digits, *PLAIN, "curriculum.attacks=['fgsm']", "curriculum.fgsm_fallback=0.1")
    x, y = to_float(batch(digits)[0]), batch(digits)[1]

    def reach() -> float:
        noise = Noise(torch.Generator().manual_seed(0))
        return (one.craft(x, y, 1, noise, 0) - x).abs().max().item()

    assert not one.falls_back([0.30])
    assert not one.falls_back([0.30, 0.25])
    assert reach() == pytest.approx(8 / 255, abs=1e-6)
    assert one.falls_back([0.30, 0.25, 0.05])
    assert not one.falls_back([0.30, 0.25, 0.05, 0.0])  # said once
    assert reach() > 16 / 255
    assert one.state_dict()["fallen_back"] is True
    assert not learner(digits, *PLAIN, "curriculum.attacks=['fgsm']").falls_back([0.9, 0.0])  # off by default


def test_curriculum_reaches_the_attack(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Radius, steps and the pool's weights arrive; before the ramp nothing attacks; FGSM may have given its share."""
    seen: list[tuple[str, float, int]] = []

    def recorder(name: str) -> Craft:
        def craft(model: Any, x: Tensor, y: Tensor, eps: float, noise: Noise, **settings: Any) -> Tensor:
            seen.append((name, 255 * eps, settings["steps"]))
            return x

        return craft

    monkeypatch.setattr("dfmcl.training.crafts.CRAFTS", {name: recorder(name) for name in CRAFTS})
    options = ["masking.enabled=false", "curriculum.beta=8/255", "curriculum.warmup=0.2", "curriculum.hold=0.4"]
    pool = ["curriculum.attacks=['fgsm','pgd']", "curriculum.weights=[1e-9, 1.0]", "curriculum.final_steps=6"]
    one = learner(digits, *options, *pool)
    for step in (4, 5, 8, 12, 20):  # of 20: the ramp lies between 4 and 12
        one.loss(*batch(digits), step)
    assert [(name, steps) for name, _, steps in seen] == [("pgd", steps) for steps in (2, 4, 6, 6)]
    assert [eps for _, eps, _ in seen] == pytest.approx([1, 4, 8, 8])
    one = learner(digits, *options, "curriculum.attacks=['fgsm']", "curriculum.schedule=cosine")
    one.fallen_back = True
    one.loss(*batch(digits), 6)
    ((name, eps, steps),) = seen[4:]
    assert (name, steps) == ("n-fgsm", 2)
    assert eps == pytest.approx(4 * (1 - math.cos(math.pi / 4)))


def test_prior_on_the_rate_enters_the_loss(digits: Dataset) -> None:
    """By weight * (mean masking probability - rate)^2, averaged over the images."""
    options = ["masking.rule=ranked", "masking.rate=0.2", "masking.alpha=2", *PLAIN[1:]]
    plain, pulled = (learner(digits, *options, f"masking.prior={weight}") for weight in (0.0, 50.0))
    losses = [one.loss(*batch(digits), 1).item() for one in (plain, pulled)]
    assert plain.p is not None
    expected = 50 * (plain.p.mean(dim=1) - 0.2).square().mean().item()
    assert expected > 0.1
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)


def test_frozen_batch_norm_stays(digits: Dataset) -> None:
    """model.batch_norm = frozen: running statistics do not move, weights do."""
    one = learner(digits, *PLAIN, "model.batch_norm=frozen")
    before = copy.deepcopy(one.model.state_dict())
    one.update(*batch(digits), 1)
    after = one.model.state_dict()
    assert torch.equal(before["net.bn1.running_mean"], after["net.bn1.running_mean"])
    assert not torch.equal(before["net.conv1.weight"], after["net.conv1.weight"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_compact_state_is_small_and_close(digits: Dataset, optimizer: str) -> None:
    """Weights to float16's precision, moments to a few per cent, average and all else there; the loss hardly moves."""
    options = [*PLAIN, f"optimization.optimizer={optimizer}", "optimization.ema=0.9", "objective.views=1"]
    options += ["objective.name=trades", "objective.view_augmentation=crop-flip", "model.width=16"]
    one = learner(digits, *options)
    for step in range(1, 4):
        one.update(*batch(digits, step), step)
    state = copy.deepcopy(one.state_dict())
    restored = learner(digits, *options)
    restored.load_state_dict(expand(shrink(state)))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), one.networks[0].parameters(), strict=True))
    for name, value in restored.state_dict()["networks"][1].items():
        assert torch.allclose(value, state["networks"][1][name], rtol=1e-3, atol=1e-6), name
    for index, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.dim() > 1:
                found = restored.optimizer.state_dict()["state"][index][name]
                error = (found - value).norm() / value.norm()
                assert error < (0.3 if name == "exp_avg_sq" else 0.05), (name, error)
    for (name, ours), theirs in zip(one.result.named_parameters(), restored.result.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=2e-3), name
    losses = [learner_.loss(*batch(digits, 4), 4).item() for learner_ in (one, restored)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_compact_state_of_full_width_is_under_60_megabytes(digits: Dataset) -> None:
    """Adam with an average, the largest state there is, at width 64."""
    import io

    one = learner(digits, *PLAIN, "model.width=64", "optimization.ema=0.9", "curriculum.attacks=[]")
    one.update(*batch(digits, 0, 2), 1)
    buffer = io.BytesIO()
    torch.save(shrink(one.state_dict()), buffer)
    assert 40e6 < buffer.tell() < 60e6


@pytest.mark.parametrize("objective", ["ce", "trades", "mart"])
@pytest.mark.parametrize(
    ("arch", "layer"),
    [("torchvision:mobilenet_v3_small", "features.3"), ("resnet18", "layer2"), ("resnet18", "layer4")],
)
def test_any_architecture_can_be_trained(digits: Dataset, arch: str, layer: str, objective: str) -> None:
    """With a mask on any layer, also while the pass over clean images still waits for its backward pass."""
    options = [f"model.arch={arch}", f"masking.layer={layer}", "curriculum.steps=1", f"objective.name={objective}"]
    one = learner(digits, *PLAIN[1:], *options)
    assert math.isfinite(one.update(*batch(digits), 1).item())
    assert one.p is not None
    assert isinstance(one.result, Classifier)


# Not getrusage: what it calls the maximum includes that of the process which started this one.
MEMORY = """
import pathlib, torch
from benchmarks.training import ours
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
images, labels = torch.zeros(128, 32, 32, 3, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64)
ours(64, 128, images, labels, attacks=["fgsm"], precision="float32", masks=True)()
print(peak() - before)
"""


def test_full_width_trains_in_four_gibibytes() -> None:
    """One masked update of batch 128 at width 64 in float32, the most that a preset's `paper` step takes."""
    made = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.5 < int(made.stdout) / 2**20 < 4


@pytest.mark.parametrize(("objective", "attacks"), [("ce", []), ("ce", ["fgsm"]), ("trades", ["kl"])])
@pytest.mark.parametrize("layer", ["layer3", "layer4"])
def test_only_passes_that_are_used_are_recorded(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, objective: str, layer: str, attacks: list[str]
) -> None:
    """Each costs a GPU time and memory of its own."""
    calls: list[int] = []

    def recorded(network: nn.Module, function: Any, example: Tensor, autocast: Any) -> Any:
        calls.append(0)
        number = len(calls) - 1

        def replayed(x: Tensor) -> Tensor:
            calls[number] += 1
            return function(x)

        return replayed

    monkeypatch.setattr("dfmcl.training.learner.recorded", recorded)
    options = [f"objective.name={objective}", "objective.views=1", f"masking.layer={layer}", "curriculum.steps=2"]
    one = learner(digits, *PLAIN[1:], *options, f"curriculum.attacks={attacks}")
    one.record([network.features for network in one.networks], [0, 1])
    one.update(*batch(digits), 1)
    assert len(calls) == 2 * (bool(attacks) + (objective == "trades") + (layer == "layer4"))
    assert all(calls)
