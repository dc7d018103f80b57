"""What a training run is told: the defaults are the values below, a TOML file overrides them."""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from robustness.config import Radius, Section, parse_toml, validated
from robustness.errors import BadInput


class Data(Section):
    """Which images. `heldout_images` of the training part are never trained on: selection happens there."""

    name: Literal["digits", "cifar10", "npz", "folder"] = "cifar10"
    path: str = ""
    image_size: int = Field(0, ge=0)
    train_images: int = Field(0, ge=0)
    heldout_images: int = Field(1000, ge=1)
    augmentation: Literal["none", "crop-flip", "crop"] = "crop-flip"


class Model(Section):
    """Which network; `width` is the number of maps in the first stage (64 is the usual ResNet-18)."""

    arch: Literal["resnet18"] = "resnet18"
    width: int = Field(64, ge=1)


class Masking(Section):
    """Dynamic Feature Masking: p = sigmoid(alpha * mean|dL/df|) for each map of `layer`."""

    enabled: bool = True
    layer: str = "layer4"
    alpha: float = 0.1
    learn_alpha: bool = True
    semantics: Literal["keep_with_p", "mask_with_p"] = "keep_with_p"
    temperature: float = Field(0.5, gt=0)


class Curriculum(Section):
    """Attack strength S(t) = beta * t / T, and the pool to draw from; an empty pool trains on clean images."""

    beta: Radius = "0.08"
    schedule: Literal["linear", "constant"] = "linear"
    attacks: list[Literal["fgsm", "pgd", "cw"]] = Field(default=["fgsm", "pgd", "cw"])
    steps: int = Field(10, ge=1)


class Optimization(Section):
    """How the weights move."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(128, ge=2)
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)


class Heldout(Section):
    """What is measured after each epoch, on held-out training images: clean accuracy and PGD at beta."""

    images: int = Field(500, ge=1)
    attack_steps: int = Field(10, ge=1)


class TrainConfig(Section):
    """A whole run. Two runs with equal configs, versions and threads on a CPU give equal bytes."""

    seed: int = Field(0, ge=0)
    data: Data = Data()
    model: Model = Model()
    masking: Masking = Masking()
    curriculum: Curriculum = Curriculum()
    optimization: Optimization = Optimization()
    heldout: Heldout = Heldout()

    @property
    def digest(self) -> str:
        """SHA-256 of the config's canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        item.name.removesuffix(".toml")
        for item in resources.files("training.presets").iterdir()
        if item.name.endswith(".toml")
    )


def load_config(source: str, overrides: list[str] | None = None) -> TrainConfig:
    """A config from a preset's name or a TOML file, with `section.key=value` overrides on top."""
    if source in preset_names():
        text = (resources.files("training.presets") / f"{source}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(preset_names())
            reason = getattr(error, "strerror", None) or "not text"
            raise BadInput(f"{source}: {reason}; name a TOML file or a preset ({known})") from None
    table = parse_toml(text, source)
    for override in overrides or []:
        _override(table, override)
    return validated(TrainConfig, table, " ".join([source, *(f"--set {override}" for override in overrides or [])]))


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not last:
        raise BadInput(f"--set {override!r}: write SECTION.KEY=VALUE, such as optimization.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # bare words are strings: --set data.name=digits
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise BadInput(f"--set {override!r}: {section} is a value, not a section")
    table[last] = value
