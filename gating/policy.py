"""What a model must prove to be served: threat, data, attacks and criteria, from a TOML file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from robustness.config import Section, read_toml, validated
from robustness.errors import BadInput
from robustness.threat import Threat, parse_eps

METRICS = ("clean_accuracy", "robust_accuracy")
_CRITERION = re.compile(
    rf"(?P<metric>{'|'.join(METRICS)})\s*>=\s*(?P<threshold>\d*\.?\d+)\s*(?P<percent>%?)\s+at\s+(?P<confidence>[\d.]+)\s*%"
)


@dataclass(frozen=True)
class Criterion:
    """`metric >= threshold`, to be shown by an exact one-sided bound at `confidence`. Both are shares in [0, 1]."""

    metric: str
    threshold: float
    confidence: float

    @staticmethod
    def parse(text: str) -> Criterion:
        """From a sentence such as `robust_accuracy >= 0.45 at 95 %` or `clean_accuracy >= 90 % at 99 %`."""
        match = _CRITERION.fullmatch(text.strip())
        if match is None:
            raise BadInput(
                f"{text!r} is no criterion; write METRIC >= SHARE at CONFIDENCE %, METRIC {' or '.join(METRICS)}"
            )
        threshold = float(match["threshold"]) / (100 if match["percent"] else 1)
        confidence = float(match["confidence"]) / 100
        if not 0 <= threshold <= 1:
            raise BadInput(f"{text!r}: the threshold is {threshold:g}; a share lies between 0 and 1")
        if not 0.5 <= confidence < 1:
            raise BadInput(f"{text!r}: the confidence is {100 * confidence:g} %; it must be at least 50 and below 100")
        return Criterion(match["metric"], threshold, confidence)

    def __str__(self) -> str:
        return f"{self.metric} >= {self.threshold:g} at {100 * self.confidence:g} %"


class ThreatSection(Section):
    """The ball the attacker may use; on uint8 images eps is rounded down to the grid."""

    norm: Literal["linf", "l2"] = "linf"
    eps: str

    @field_validator("eps")
    @classmethod
    def _is_radius(cls, text: str, info: ValidationInfo) -> str:
        try:
            eps = parse_eps(text)
        except BadInput as error:
            raise ValueError(str(error)) from None
        if eps <= 0 or (info.data.get("norm") == "linf" and eps > 1):
            raise ValueError("a radius is above 0, and in Linf at most 1 (pixel units: 8/255, not 8)")
        if Threat(info.data.get("norm", "linf"), eps).on_grid().eps == 0:
            raise ValueError("the radius is below one step of uint8 images; 1/255 is the smallest")
        return text


class DataSection(Section):
    """The images the claim is about: the test part of a data set, or `images` of it drawn by `seed`."""

    name: Literal["digits", "cifar10", "npz", "folder"]
    path: str = ""
    image_size: int = Field(0, ge=0)
    images: int = Field(0, ge=0)


class AttackSection(Section):
    """The attacks, in the order in which they run; an image that one of them flips is not shown to the next."""

    suite: list[str] = Field(min_length=1)


class Policy(Section):
    """A whole gate policy."""

    criteria: list[str] = Field(min_length=1)
    seed: int = Field(0, ge=0)
    threat: ThreatSection
    data: DataSection
    attacks: AttackSection

    @field_validator("criteria")
    @classmethod
    def _are_criteria(cls, sentences: list[str]) -> list[str]:
        for sentence in sentences:
            try:
                Criterion.parse(sentence)
            except BadInput as error:
                raise ValueError(str(error)) from None
        if not any(Criterion.parse(sentence).metric == "robust_accuracy" for sentence in sentences):
            raise ValueError("no criterion is about robust_accuracy; a robustness gate needs one")
        return sentences

    @property
    def parsed_criteria(self) -> tuple[Criterion, ...]:
        return tuple(Criterion.parse(sentence) for sentence in self.criteria)

    @property
    def parsed_threat(self) -> Threat:
        return Threat.parse(self.threat.norm, self.threat.eps)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON: comments and layout of the file do not count."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def load_policy(path: Path) -> Policy:
    """A policy from a TOML file. A data path in it is relative to the working directory."""
    return validated(Policy, read_toml(path, "name a policy file (TOML)"), str(path))
