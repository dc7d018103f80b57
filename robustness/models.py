"""The classifier: ResNet-18 with the CIFAR stem, normalisation as its first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.arch import is_code
from dfmcl.robustness.user_code import trainable


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a network without its weights. `input_shape` is (H, W, C), as on the wire.

    arch: `resnet18`, `torchvision:NAME`, `timm:NAME`, or `module:callable`, which is code that is run; width and
        activation belong to `resnet18` only.
    """

    arch: str
    width: int
    classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: str = "relu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> ModelSpec:
        try:
            height, width, channels = (int(size) for size in value["input_shape"])
            return ModelSpec(
                arch=str(value["arch"]),
                width=int(value["width"]),
                classes=int(value["classes"]),
                input_shape=(height, width, channels),
                mean=tuple(float(v) for v in value["mean"]),
                std=tuple(float(v) for v in value["std"]),
                activation=str(value["activation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"model specification: {error!r} in {value}") from None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, maps: int, stride: int) -> None:
        super().__init__()
        shortcut: nn.Module | None = None
        if stride != 1 or inputs != maps:
            shortcut = nn.Sequential(nn.Conv2d(inputs, maps, 1, stride, bias=False), nn.BatchNorm2d(maps))
        self.conv1 = nn.Conv2d(inputs, maps, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(maps)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(maps, maps, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(maps)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


def stage(inputs: int, maps: int, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, maps, stride), *(BasicBlock(maps, maps, 1) for _ in range(blocks - 1)))


class ResNet18(nn.Module):
    """ResNet-18 for small images: 3x3 stem of stride 1, no max-pool, `width` maps in the first stage.

    He et al. 2016; the stem is the one of all CIFAR work. Stages have width * (1, 2, 4, 8) maps, and the last one is an
    eighth of the image's side. Modules and parameters are called as torchvision's, whose import would take longer than
    torch's own.
    """

    def __init__(
        self, width: int, classes: int, channels: int, activation: str = "relu", *, stem: int = 3, blocks: int = 2
    ) -> None:
        super().__init__()
        if stem == 3:
            # A seed's weights are those of all records: drawn after torchvision's own, which this class began as.
            ResNet18(64, classes, 3, stem=7, blocks=1)
        self.conv1 = nn.Conv2d(channels, width, stem, padding=stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        self.layer1 = stage(width, width, 1, blocks)
        self.layer2 = stage(width, width * 2, 2, blocks)
        self.layer3 = stage(width * 2, width * 4, 2, blocks)
        self.layer4 = stage(width * 4, width * 8, 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width * 8, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if activation == "silu":  # smooth activations suit adversarial training (Pang et al. 2021)
            for module in list(self.modules()):
                if hasattr(module, "relu"):
                    module.relu = nn.SiLU()  # in place, autograd would copy a part of the input

    def forward(self, x: Tensor) -> Tensor:
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(y), 1))
        return logits


class Classifier(nn.Module):
    """Float images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; eps is therefore always in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, *, code: str = "") -> None:
        """code: the `module:callable` that may be run, as the user said; no file decides that by itself."""
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))
        self.net = build_network(spec, code)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits

    @property
    def is_resnet(self) -> bool:
        """Whether `features` and `head` exist: the network is one of torchvision's ResNets, or ours."""
        if not self.spec.arch.startswith("torchvision:"):
            return isinstance(self.net, ResNet18)
        from torchvision.models import ResNet

        return isinstance(self.net, ResNet)

    def features(self, x: Tensor) -> Tensor:
        """The output of a ResNet's last stage, `(N, C', H', W')`."""
        net: Any = self.net
        maps = net.maxpool(net.relu(net.bn1(net.conv1((x - self.mean) / self.std))))
        last: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(maps))))
        return last

    def head(self, features: Tensor) -> Tensor:
        """What follows the last stage of a ResNet: average pooling and a linear layer; logits `(N, K)`."""
        net: Any = self.net
        logits: Tensor = net.fc(torch.flatten(net.avgpool(features), 1))
        return logits


def build_network(spec: ModelSpec, code: str = "") -> nn.Module:
    """The network behind the normalisation, with fresh weights: images `(N, C, H, W)` to logits `(N, K)`.

    code: see `Classifier`. BadInput for an unknown architecture, or code that nobody asked for.
    """
    if code and code != spec.arch:
        raise BadInput(f"its network is {spec.arch}, not {code}")
    if spec.arch == "resnet18":
        return ResNet18(spec.width, spec.classes, spec.input_shape[2], spec.activation)
    if not is_code(spec.arch):
        return library_network(spec.arch, spec.classes, spec.input_shape[2])
    if not code:
        raise BadInput(
            "its network is made by code, which only `train`, `evaluate` and `export` run, when told:"
            f" --arch {spec.arch}; all else takes the exported candidate"
        )
    return trainable(spec.arch, spec.classes, spec.input_shape)


def library_network(arch: str, classes: int, channels: int) -> nn.Module:
    """A network of torchvision:NAME or timm:NAME with fresh weights; BadInput where there is none for such images."""
    library, colon, name = arch.partition(":")
    if library == "torchvision":
        from torchvision import models

        if name in models.list_models(module=models):
            if channels != 3:
                raise BadInput(f"{arch} takes 3 channels, the images have {channels}")
            network: nn.Module = models.get_model(name, weights=None, num_classes=classes)
            return network
    if library == "timm" and colon:
        try:
            import timm
        except ModuleNotFoundError:
            raise BadInput(f"{arch} needs timm; pip install timm") from None
        if timm.is_model(name):
            made: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels)
            return made
    raise BadInput(
        f"{arch!r} is unknown; choose resnet18, torchvision:NAME (torchvision.models.list_models()), timm:NAME"
        " (timm.list_models()) or module:callable"
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 `(N, H, W, C)`, as on the wire, to float `(N, C, H, W)` in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 255


def to_bytes(x: Tensor) -> Tensor:
    """Float `(N, C, H, W)` in [0, 1] on the uint8 grid, or uint8 of that layout, to uint8 `(N, H, W, C)`."""
    whole = x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)
    return whole.permute(0, 2, 3, 1).contiguous()


def device_of(model: nn.Module | None) -> torch.device:
    """Where a network's weights lie; the CPU where it has none."""
    held = (value for value in (model.state_dict().values() if model is not None else ()) if isinstance(value, Tensor))
    return next((value.device for value in held), torch.device("cpu"))


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Inside: eval mode (batch norm fixed, masks off) and no weight gradients, which saves a third of a backward."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def exactly(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network in full float32: an accelerator's 19-bit TF32, on by default in convolutions, decides nothing."""

    def decide(x: Tensor) -> Tensor:
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            logits: Tensor = model(x)
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
        return logits

    return decide
