"""What a training run is told: the defaults are the values below, a TOML file overrides them."""

from __future__ import annotations

import hashlib
import json
import tomllib
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dfmcl.common.errors import BadInput
from dfmcl.common.toml import Section, Seed, read_shipped, shipped, validated
from dfmcl.robustness.arch import is_code
from dfmcl.robustness.sources import DataSource, Kind
from dfmcl.robustness.threats.radius import Radius
from dfmcl.robustness.threats.registry import parse_threat

PRESETS = "dfmcl.training.presets"  # the package that carries them

Augmentation = Literal["none", "crop", "crop-flip", "autoaugment", "idbh"]
ATTACKS = ("fgsm", "n-fgsm", "pgd", "cw", "kl")  # by name, in the ball of S(t)
POOLED = ("linf", "l2", "patch", "spatial", "corruption")  # the kinds of threats that training crafts for
Share = Annotated[float, Field(ge=0, le=1)]


def _is_member(text: str) -> str:
    """Of the pool: an attack's name, or the spelling of one threat that training crafts for, or of corruptions."""
    if text in ATTACKS:
        return text
    try:
        kinds = [part.kind for part in parse_threat(text).parts]
    except BadInput as error:
        raise ValueError(f"choose one of {', '.join(ATTACKS)}, or a threat: {error}") from None
    if kinds[0] not in POOLED:
        raise ValueError(f"{text!r} is no threat that training crafts for; choose of the kinds {', '.join(POOLED)}")
    if len(kinds) > 1 and set(kinds) != {"corruption"}:
        raise ValueError(f"{text!r} is a union; name each part by itself")
    return text


AttackName = Annotated[str, AfterValidator(_is_member)]


class DataSection(DataSource):
    """Which images. `heldout_images` of the training part are never trained on: selection happens there.

    memory_bytes: a training part that takes more as pixels is read step by step, by `workers` processes, and augmented
    there (-1: one a core where a GPU trains, else one; 0: by the training's own).
    """

    name: Kind = "cifar10"
    train_images: int = Field(0, ge=0)
    heldout_images: int = Field(1000, ge=1)
    augmentation: Augmentation = "crop-flip"
    memory_bytes: int = Field(2**29, ge=0)
    workers: int = Field(-1, ge=-1)


class Model(Section):
    """Which network: `resnet18`, or any classifier as `torchvision:NAME`, `timm:NAME`, or as code, `module:callable`,
    which is looked for beside the user, called without arguments, and sent pixels from 0 to 1 where scale is empty.

    width (maps of the first stage; 64 is the usual ResNet-18) and activation belong to `resnet18` only.
    weights: what to begin with: a file (.safetensors, .pth) or `torchvision:NAME`, `timm:NAME`; a head of another
    number of classes begins anew. scale: what they expect to be sent, in the words of `--input`; empty: the library's
    own, from scratch the data's mean and deviation. frozen: modules whose weights and batch norms stay.
    """

    arch: str = "resnet18"
    width: int = Field(64, ge=1)
    activation: Literal["relu", "silu"] = "relu"
    weights: str = ""
    scale: str = ""
    frozen: list[str] = Field(default=[])
    batch_norm: Literal["batch", "frozen", "synchronised"] = "batch"

    @property
    def code(self) -> str:
        """The `module:callable` that makes the network; empty where none does."""
        return self.arch if is_code(self.arch) else ""


class Masking(Section):
    """Dynamic Feature Masking, its readings, and the dropouts it must be told apart from.

    rule: `literal` p = sigmoid(alpha * mean|dL/df|) for each map of `layer`; `ranked` masks with probability
    sigmoid(logit(rate) + alpha * zscore(mean|dL/df|)); `dropout` masks elements, `channel_dropout` whole maps with
    probability `rate`, whatever the gradient says. semantics: what the literal p means. scaling: `inverted` divides
    what is kept by its probability. gradient: of each image's own loss, or of the batch's mean loss (1/N of it).
    prior: weight of (mean masking probability - rate)^2 in the loss.
    """

    enabled: bool = True
    rule: Literal["literal", "ranked", "dropout", "channel_dropout"] = "literal"
    layer: str = "layer4"
    alpha: float = 0.1
    learn_alpha: bool = True
    alpha_gradient: Literal["relaxed", "straight_through"] = "relaxed"
    temperature: float = Field(0.5, gt=0)
    semantics: Literal["keep_with_p", "mask_with_p"] = "keep_with_p"
    gradient: Literal["sample", "batch_mean"] = "sample"
    scaling: Literal["none", "inverted"] = "none"
    rate: float = Field(0.5, gt=0, lt=1)
    prior: float = Field(0.0, ge=0)


class Curriculum(Section):
    """Attack strength S(t), from 0 to beta, and the pool to draw from; an empty pool trains on clean images.

    warmup: share of the run on clean images before S rises; hold: share at its end at full strength. attacks: names of
    attacks in the ball of S(t), and threats of other kinds such as `patch:2%`, `rotation:15`, `corruptions`, `l2:0.5`,
    which grow as S does. weights: of the attacks in the pool (none: even).
    steps grow to final_steps (0: they stay) as S grows to beta; a step is
    step_ratio * S(t) / steps long. fgsm_fallback: how far held-out PGD accuracy may fall below its best before the
    FGSM share is given to N-FGSM for good (catastrophic overfitting; 0: never).
    """

    beta: Radius = "0.08"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.0
    hold: Share = 0.0
    attacks: list[AttackName] = Field(default=["fgsm", "pgd", "cw"])
    weights: list[Annotated[float, Field(gt=0)]] = Field(default=[])
    steps: int = Field(10, ge=1)
    final_steps: int = Field(0, ge=0)
    step_ratio: float = Field(2.5, gt=0)
    fgsm_fallback: Share = 0.0


class Objective(Section):
    """What training minimises: `ce` on adversarial images, `trades` or `mart` with `regularization` (their lambda).

    views: further views of each image by `view_augmentation`, through batch norms of their own, tied to the first by
    `consistency` times the Jensen-Shannon divergence of their clean predictions (DAJAT; of their adversarial ones under
    `ce`, which looks at no others).
    """

    name: Literal["ce", "trades", "mart"] = "ce"
    regularization: float = Field(6.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    views: int = Field(0, ge=0)
    view_augmentation: Augmentation = "autoaugment"
    consistency: float = Field(2.0, ge=0)


class Optimization(Section):
    """How the weights move. ema and awp are off at 0; ema_start, awp_start and lr_warmup are shares of the run.

    precision: of forward and backward passes in training; weights, perturbations and every measurement stay float32.
    graphs: whether a GPU runs each pass as one CUDA graph (masks on an inner layer apart).
    layer_decay: what the learning rate is multiplied by from each block to the one before it (1: all alike).
    accumulate: parts of a batch that are passed one after the other, for the memory of one.
    """

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(128, ge=2)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup: Share = 0.0
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    ema_start: Share = 0.0
    awp: float = Field(0.0, ge=0)
    awp_start: Share = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    graphs: Literal["auto", "never"] = "auto"
    layer_decay: float = Field(1.0, gt=0, le=1)
    accumulate: int = Field(1, ge=1)


class Heldout(Section):
    """What is measured after each `every`-th epoch and the last, on held-out training images: clean accuracy and PGD
    at beta."""

    every: int = Field(1, ge=1)

    images: int = Field(500, ge=1)
    attack_steps: int = Field(10, ge=1)


class TrainConfig(Section):
    """A whole run. Two runs with equal configs, versions and threads on a CPU give equal bytes."""

    seed: Seed = 0
    data: DataSection = DataSection()
    model: Model = Model()
    masking: Masking = Masking()
    curriculum: Curriculum = Curriculum()
    objective: Objective = Objective()
    optimization: Optimization = Optimization()
    heldout: Heldout = Heldout()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pool, chosen = self.curriculum, self.objective
        if pool.weights and len(pool.weights) != len(pool.attacks):
            raise ValueError(f"curriculum.weights: {len(pool.weights)} for {len(pool.attacks)} attacks; one for each")
        if pool.warmup + pool.hold >= 1:
            raise ValueError("curriculum.warmup and curriculum.hold: together they leave nothing of the run to ramp in")
        if chosen.name != "ce" and not pool.attacks:
            raise ValueError(f"objective.name: {chosen.name} needs curriculum.attacks")
        if pool.fgsm_fallback and "fgsm" not in pool.attacks:
            raise ValueError("curriculum.fgsm_fallback: curriculum.attacks has no fgsm to fall back from")
        masks = self.masking
        if masks.prior and not (masks.enabled and masks.rule in ("literal", "ranked")):
            raise ValueError("masking.prior: only the literal and the ranked rule have a rate that it could move")
        return self

    def placeless(self) -> dict[str, Any]:
        """All of it as JSON, but for where the data lie and who reads them: another matter on another machine."""
        table = self.model_dump()
        del table["data"]["path"], table["data"]["workers"]
        return table

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of `placeless`."""
        return hashlib.sha256(json.dumps(self.placeless(), sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return list(shipped(PRESETS))


def load_config(source: str, overrides: list[str] | None = None) -> TrainConfig:
    """A config from a preset's name or a TOML file, with `section.key=value` overrides on top."""
    table = read_shipped(source, PRESETS, "preset")
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
    except ValueError:  # no TOML, or a number of more digits than Python reads
        value = text.strip()  # bare words are strings: --set data.name=digits
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise BadInput(f"--set {override!r}: {section} is a value, not a section")
    table[last] = value
