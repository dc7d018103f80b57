"""Where a run begins that is not from scratch: weights of a file or of a library, and the scale that they expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.common.text import why_not_local
from dfmcl.robustness.arch import LIBRARIES
from dfmcl.robustness.scale import Scale
from dfmcl.robustness.weights import fitted, read_weights


@dataclass(frozen=True)
class Pretrained:
    """Weights, and what is known of them.

    source: as the config names them. sha256: of the file; empty where a library keeps it. scale: what they expect;
    None where the file does not say.
    """

    source: str
    weights: Mapping[str, Tensor]
    sha256: str
    scale: Scale | None

    def lay_into(self, network: nn.Module) -> dict[str, Any]:
        """Give the network these weights; returns the manifest's entry. BadInput where they do not fit."""
        state, head = fitted(self.weights, network, f"model.weights: {self.source}")
        network.load_state_dict(state)
        return {"source": self.source, "sha256": self.sha256, "fresh": list(head)}


def read_pretrained(source: str) -> Pretrained:
    """A file (.safetensors, .pth) or `torchvision:NAME`, `timm:NAME`, which these libraries have or fetch."""
    library, colon, name = source.partition(":")
    if colon and library in LIBRARIES:
        return _of_library(source, library, name)
    if why := why_not_local(source):
        raise BadInput(f"model.weights: {source}: {why}")
    path = Path(source)
    weights = read_weights(path)
    return Pretrained(source, weights, sha256_of(path), None)


def scale_of(told: str, pretrained: Pretrained | None) -> Scale | None:
    """The scale of the config's words, else that of the library; None: the data's own. BadInput where nobody knows it.

    A network that meets another scale than it was trained on is mostly wrong, and fine-tuning hides that it is.
    """
    if told:
        try:
            scale = Scale.parse(told.split())
        except BadInput as error:
            raise BadInput(f"model.scale: {told!r}: {error}") from None
        if scale.order != "RGB":
            raise BadInput(f"model.scale: {told!r}: training gives RGB; turn the first layer's channels of the weights")
        return scale
    if pretrained is not None and pretrained.scale is None:
        raise BadInput(
            f"model.weights: {pretrained.source}: what scale do they expect? Say model.scale, such as 'imagenet',"
            " 'plain' or '0..255 mean=127 std=128'"
        )
    return pretrained.scale if pretrained else None


def _of_library(source: str, library: str, name: str) -> Pretrained:
    try:
        network, mean, std = {"torchvision": _torchvision, "timm": _timm}[library](name)
    except ModuleNotFoundError as error:
        raise BadInput(f"model.weights: {source} needs {error.name}; pip install {error.name}") from None
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # unknown names; what a download meets
        said = " ".join(str(error).split())
        raise BadInput(f"model.weights: {source}: cannot be had here: {said}; name a file instead") from None
    return Pretrained(source, network.state_dict(), "", Scale(1, mean, std))


def _torchvision(name: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    from torchvision import models

    known = models.get_model_weights(name).DEFAULT
    told = known.transforms()
    return models.get_model(name, weights=known), tuple(told.mean), tuple(told.std)


def _timm(name: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    import timm

    network = timm.create_model(name, pretrained=True)
    told = network.pretrained_cfg
    return network, tuple(told["mean"]), tuple(told["std"])
