"""What a model must prove to be served: threat, data, attacks and criteria, from a TOML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dfmcl.common.errors import BadInput
from dfmcl.common.toml import Days, Section, Seed, read_toml, validated
from dfmcl.gating.criterion import CORRUPTION, NO_REGRESSION, Criterion
from dfmcl.gating.decide import DecideSection
from dfmcl.gating.kinds import KINDS
from dfmcl.gating.signing.statement import VALID_DAYS
from dfmcl.robustness.attacks.suites import BY_KIND, SUITES
from dfmcl.robustness.sources import DataSource
from dfmcl.robustness.threats.ball import RADIUS, Ball
from dfmcl.robustness.threats.corruption import ALL
from dfmcl.robustness.threats.radius import Norm
from dfmcl.robustness.threats.registry import parse_threat, threat_of
from dfmcl.robustness.threats.threat import Threat

DRAWN = 0.2  # of the images: of 1,000 where none is lost, the bound gives way by 2 points


def threat_in(text: str, norm: str) -> Threat:
    """The threat that a criterion names: a radius in the policy's norm, or a spelling such as `patch:5x5`."""
    return threat_of(norm, text) if is_radius(text) else parse_threat(text)


def is_radius(text: str) -> bool:
    """Whether a criterion's threat is written as a number, in the policy's norm."""
    return text[:1].isdigit() or text[:1] in ("+", "-", ".")


class ThreatSection(Section):
    """The ball the attacker may use; on uint8 images eps is rounded down to the grid."""

    norm: Norm = "linf"
    eps: str

    @field_validator("eps")
    @classmethod
    def _is_radius(cls, text: str, info: ValidationInfo) -> str:
        return checked_radius(text, info.data.get("norm", "linf"))


def checked_radius(text: str, norm: str) -> str:
    """The text if it is a radius that uint8 images can use; ValueError otherwise."""
    try:
        threat = threat_of(norm, text)
    except BadInput as error:
        raise ValueError(str(error)) from None
    if not threat.sensible:
        raise ValueError(RADIUS)
    if 255 * threat.on_grid().eps < 1 - 1e-6:  # of one value by one level: the least in every norm
        raise ValueError(
            f"{text} is below one step of an image's bytes. Users' images arrive as bytes, also where the model is sent"
            " floats that are made of them, so that nobody can send a smaller change: 1/255 is the smallest (of a"
            " model that is sent 0 to 255, too, as a radius is of pixels from 0 to 1)"
        )
    return text


class DataSection(DataSource):
    """Whose test part the claim is about, and how many of its images may be attacked before the gate gives up (0: all).

    In `sequential` statistics the claim is about the whole test part, in `fixed` about the population it is drawn from.
    """

    images: int = Field(0, ge=0)


class AttackSection(Section):
    """The attacks, in the order in which they run; an image that one of them flips is not shown to the next.

    suite: the name of a suite (`fast`, `standard`) or a list of attacks. black_box: what is left where the model gives
    no gradients, beside the suite's own attacks that need none. transfer: crafted on each surrogate that the gate is
    given, on all of them and on the substitute; what they break counts. They are also recorded by themselves, for
    production to compare itself with, on as many images as were attacked, or on the first transfer_images of the order,
    where those are more. substitute: answers of the model that the gate trains a substitute on (0: it trains none).
    block: images that are attacked together.
    whole: of suite "standard": the chance of an image to meet all of it, where all meet "fast"; "drawn": DRAWN. 1: all.
    l1, patch, spatial, corruption: in place of the suite, where a criterion names such a threat.
    """

    suite: str | list[str]
    black_box: list[str] = Field(default=["square-1000", "square-subspace-1000"])
    transfer: list[str] = Field(default=["mi-fgsm-10"])
    transfer_images: int = Field(0, ge=0)
    substitute: int = Field(1200, ge=0)
    block: int = Field(32, ge=1)
    whole: Literal["drawn"] | Annotated[float, Field(gt=0, le=1)] = 1.0
    l1: list[str] = Field(default=list(BY_KIND["l1"]), min_length=1)
    patch: list[str] = Field(default=list(BY_KIND["patch"]), min_length=1)
    spatial: list[str] = Field(default=list(BY_KIND["spatial"]), min_length=1)
    corruption: list[str] = Field(default=list(BY_KIND["corruption"]), min_length=1)

    @field_validator("suite")
    @classmethod
    def _names_attacks(cls, suite: str | list[str]) -> str | list[str]:
        if isinstance(suite, str) and suite not in SUITES:
            raise ValueError(f"there is no suite of that name; choose {' or '.join(SUITES)}, or list attacks")
        if not suite or (len(set(suite)) < len(suite) and not isinstance(suite, str)):
            raise ValueError("name at least one attack, and each once")
        return suite

    def by_kind(self, kind: str) -> list[str] | None:
        """The attacks in threats of a kind; None where it is the suite's."""
        return list(getattr(self, kind)) if kind in BY_KIND else None

    @property
    def chance(self) -> float:
        """Of an image to meet the whole suite."""
        return self.whole if isinstance(self.whole, float) else DRAWN

    @property
    def phases(self) -> tuple[str | list[str], tuple[str, ...]]:
        """The suite that all images meet, and the attacks that only drawn ones meet after it."""
        if self.chance == 1:
            return self.suite, ()
        return "fast", tuple(name for name in SUITES["standard"] if name not in SUITES["fast"])


class CheckSection(Section):
    """How many images the checks look at, the first of the order; fewer see less of what an attack is misled by."""

    images: int = Field(128, ge=32, le=128)


class Policy(Section):
    """A whole gate policy.

    valid_days: how long an attestation of its verdict holds.
    subjects: the kinds that are judged. Of some the gate runs the code, which could deceive it.
    """

    criteria: list[str] = Field(min_length=1)
    seed: Seed = 0
    statistics: Literal["sequential", "fixed"] = "sequential"
    valid_days: Days = VALID_DAYS
    threat: ThreatSection
    data: DataSection
    attacks: AttackSection
    checks: CheckSection = Field(default_factory=CheckSection)
    decide: DecideSection = Field(default_factory=DecideSection)
    subjects: list[str] = Field(default=list(KINDS), min_length=1)

    @field_validator("criteria")
    @classmethod
    def _are_criteria(cls, sentences: list[str]) -> list[str]:
        for sentence in sentences:
            try:
                Criterion.parse(sentence)
            except BadInput as error:
                raise ValueError(str(error)) from None
        if not any(Criterion.parse(sentence).robust for sentence in sentences):
            raise ValueError("no criterion is about robust_accuracy; a robustness gate needs one")
        if not any(criterion.robust and criterion.threshold > 0 for criterion in map(Criterion.parse, sentences)):
            raise ValueError("robust_accuracy >= 0 asks for nothing, because every model reaches it; ask for more")
        return sentences

    @field_validator("subjects")
    @classmethod
    def _are_kinds(cls, names: list[str]) -> list[str]:
        if strange := [name for name in names if name not in KINDS]:
            raise ValueError(f"{strange[0]!r} is no kind of model; there are {', '.join(KINDS)}")
        return names

    @model_validator(mode="after")
    def _threats_are_known(self) -> Self:
        for criterion in self.parsed_criteria:
            if criterion.eps:
                try:
                    _ = criterion.corruptions  # which refuses other threats
                    if is_radius(criterion.eps):
                        checked_radius(criterion.eps, self.threat.norm)
                    for part in self.threat_of(criterion).parts:
                        if isinstance(part, Ball):
                            checked_radius(part.label, part.kind)
                except (BadInput, ValueError) as error:
                    raise ValueError(f"criterion {str(criterion)!r}: {error}") from None
        return self

    @model_validator(mode="after")
    def _a_drawn_part_fits(self) -> Self:
        if self.attacks.chance == 1:
            return self
        if self.attacks.suite != "standard":
            raise ValueError('attacks.whole: is the drawn part of suite = "standard"; leave it out, or name that suite')
        if any(criterion.metric == NO_REGRESSION for criterion in self.parsed_criteria):
            raise ValueError(f"attacks.whole: {NO_REGRESSION} compares image by image; use two policies")
        if len(self.threats(grid=True)) > 1:
            raise ValueError("attacks.whole: a drawn part is of one threat; use a policy for each")
        return self

    @model_validator(mode="after")
    def _each_criterion_once(self) -> Self:
        parsed = self.parsed_criteria
        asked = [(replace(c, eps=""), self.threat_of(c)) for c in parsed]
        for number, criterion in enumerate(parsed):
            if asked[number] in asked[:number]:
                raise ValueError(f"criterion {str(criterion)!r} stands there twice; leave one out")
        return self

    @property
    def parsed_criteria(self) -> tuple[Criterion, ...]:
        return tuple(Criterion.parse(sentence) for sentence in self.criteria)

    @property
    def parsed_threat(self) -> Ball:
        return threat_of(self.threat.norm, self.threat.eps)

    def threat_of(self, criterion: Criterion) -> Threat:
        """The threat a criterion is about, which may be a union; the policy's own where it is about none."""
        if criterion.metric == CORRUPTION:
            return parse_threat(criterion.eps or ALL)
        return threat_in(criterion.eps or self.threat.eps, self.threat.norm)

    def threats(self, grid: bool) -> tuple[Threat, ...]:
        """All threats that are attacked one by one: the policy's own and those of criteria, of unions their parts.

        Balls of the policy's norm come first, smallest first, because an image that falls in one falls in the next.
        grid: as bytes, where two radii may be the same one; in floats they are not.
        """
        named = [self.parsed_threat, *(part for one in self.parsed_criteria for part in self.threat_of(one).parts)]
        own = [threat for threat in named if isinstance(threat, Ball) and threat.kind == self.threat.norm]
        distinct = {radius(ball, grid): ball for ball in reversed(own)}
        others = dict.fromkeys(
            threat.on_grid() if grid else threat for threat in named if threat.kind != self.threat.norm
        )
        return (*sorted(distinct.values(), key=lambda ball: ball.eps), *others)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON: comments and layout of the file do not count."""
        return digest_of(self.as_written())

    def as_written(self) -> dict[str, Any]:
        """The policy as its report and its digest have it: every default written out.

        But for [decide], so that a policy that says nothing of it keeps the digest that trust files know.
        """
        return self.model_dump(exclude={"decide"} if self.decide == DecideSection() else None)

    def to_toml(self) -> str:
        """The policy as a file, every default written out; what reads it has the same digest."""
        whole = self.as_written()
        tables = {name: value for name, value in whole.items() if isinstance(value, dict)}
        lines = [f"{name} = {_toml(value)}" for name, value in whole.items() if name not in tables]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        return "\n".join([*lines, ""])

    @staticmethod
    def of_text(text: Mapping[str, Any]) -> Policy:
        """The policy that a report holds; ValueError where it is none. Keys that it lacks have their defaults."""
        return Policy.model_validate_json(json.dumps(text))

    def places(self, threat: Threat, grid: bool) -> tuple[int, ...]:
        """Which of `threats(grid)` a threat is, or the parts of a union."""
        known = [_met(one, grid) for one in self.threats(grid)]
        return tuple(known.index(_met(part, grid)) for part in threat.parts)

    def names_of(self, criterion: Criterion, grid: bool) -> list[str]:
        """Names of the parts of a criterion's threat, such as `patch 5x5`; "" for the policy's own."""
        threats, own = self.threats(grid), self.place(grid)
        places = self.places(self.threat_of(criterion), grid)
        return ["" if place == own else str(_met(threats[place], grid)) for place in places]

    def regressed(self, grid: bool) -> list[str]:
        """Names of the threats, other than its own, in which its criteria forbid a regression."""
        criteria = [one for one in self.parsed_criteria if one.metric == NO_REGRESSION]
        return [name for name in dict.fromkeys(name for one in criteria for name in self.names_of(one, grid)) if name]

    @property
    def spoiled(self) -> list[str]:
        """Names of the corruptions that its criteria are means of."""
        return list(dict.fromkeys(str(one) for criterion in self.parsed_criteria for one in criterion.corruptions))

    def place(self, grid: bool) -> int:
        """Which of `threats(grid)` is the policy's own."""
        return self.places(self.parsed_threat, grid)[0]


def _toml(value: str | int | list[str]) -> str:
    # JSON's strings are TOML's, but that TOML escapes DEL, too; of both, whole numbers look the same.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def digest_of(text: Mapping[str, Any]) -> str:
    """SHA-256 of a policy as canonical JSON."""
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def _met(threat: Threat, grid: bool) -> Threat:
    return threat.on_grid() if grid else threat


def radius(threat: Ball, grid: bool) -> float:
    """The eps that an attacker has: on the grid as far as bytes let it count."""
    return (threat.on_grid() if grid else threat).eps


POLICY = "policy.toml"  # beside the evidence: the policy that was used


def load_policy(path: Path) -> Policy:
    """A policy from a TOML file. A data path in it is relative to the working directory."""
    return validated(Policy, read_toml(path, "name a policy file (TOML)"), str(path))
