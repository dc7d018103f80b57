"""What a campaign is to do: the methods, radii and seeds to train, what to measure of each, and what to compare."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, InstanceOf

from dfmcl.common.errors import BadInput
from dfmcl.common.toml import Section, Seed, read_shipped, shipped, validated
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.linf import Linf, in_255ths
from dfmcl.robustness.threats.radius import Norm, Radius
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.robustness.threats.threat import parse_eps
from dfmcl.training.config import TrainConfig, load_config

S = TypeVar("S", bound=Section)
CAMPAIGNS = "dfmcl.training.campaigns"  # the package that carries them
WORST = "worst case"  # right, and flipped by no attack that was run at this threat


@dataclass(frozen=True)
class PlannedAttack:
    """An attack's name as `Attack.parse` reads it, and the length of its steps: `2/255`, `eps/4`, or its own ("")."""

    name: str
    step_size: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} (step {self.step_size})" if self.step_size else self.name

    def at(self, threat: Ball) -> Attack:
        """The attack with the steps it takes at this radius."""
        attack = Attack.parse(self.name)
        if not self.step_size:
            return attack
        relative = self.step_size.startswith("eps/")
        size = threat.eps / float(self.step_size[4:]) if relative else parse_eps(self.step_size)
        return replace(attack, name=self.label, parameters={**attack.parameters, "step_size": size})


def _planned(value: Any) -> Any:
    """From `"pgd-20"` or `{attack = "pgd-20", step_size = "2/255"}`."""
    table = {"attack": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not {"attack"} <= set(table) <= {"attack", "step_size"}:
        raise ValueError('an attack is "pgd-20" or {attack = "pgd-20", step_size = "2/255"}')
    planned = PlannedAttack(str(table["attack"]), str(table.get("step_size", "")))
    try:
        function = planned.at(Linf(8 / 255)).function  # whatever is wrong with it shows here
    except (BadInput, ValueError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from None
    if planned.step_size and "step_size" not in inspect.signature(function).parameters:
        raise ValueError(f"{planned.name} takes no step_size")
    return planned


class Method(Section):
    """A way to train: a preset or TOML file, and `section.key=value` overrides on top.

    seeds: its own, instead of the campaign's. measured = false: trained only as a source of transfer attacks.
    claimed: what is claimed of it at the campaign's `claims_eps`, in percent, by `clean` or an attack's name.
    vary: one key and its values; each makes a method of its own, called NAME-VALUE.
    """

    preset: str
    overrides: list[str] = Field(default=[])
    seeds: list[Seed] = Field(default=[])
    measured: bool = True
    claimed: dict[str, float] = Field(default={})
    vary: dict[str, Annotated[list[float], Field(min_length=1)]] = Field(default={}, max_length=1)


class Measurement(Section):
    """Attacks at some radii. Every attack sees every image that is right, or (cascade) what earlier ones left of them.

    images: only the first so many of the campaign's (0: all). source: a method whose network of the same beta and seed
    (or of its first seed, where it has seeds of its own) the images are crafted on; that is black box.
    """

    eps: Annotated[list[Radius], Field(min_length=1)]
    attacks: Annotated[list[Annotated[InstanceOf[PlannedAttack], BeforeValidator(_planned)]], Field(min_length=1)]
    norm: Norm = "linf"
    kind: Literal["white-box", "black-box"] = "white-box"
    source: str = ""
    cascade: bool = False
    images: int = Field(0, ge=0)

    @property
    def threats(self) -> list[Ball]:
        return [threat_of(self.norm, eps) for eps in self.eps]

    @property
    def black_box(self) -> bool:
        return bool(self.source) or self.kind == "black-box"


class Comparisons(Section):
    """Pairs of methods, first minus second, on the same images: `clean`, attacks by name, or `worst case`."""

    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(default=[])
    eps: list[Radius] = Field(default=[])
    attacks: list[str] = Field(default=[WORST])


class Regression(Section):
    """Accuracy under one attack on one key of the config, within each method that varies it."""

    key: str = ""
    eps: Radius = "8/255"
    attack: str = WORST


class Campaign(Section):
    """Methods x betas x seeds.

    overrides: for every run. images: the first so many of a fixed shuffle of the test part (0: all). main: the attacks
    of the first table, at eps = beta. cost_of: the method whose training cost the others' are compared with. label
    stands over every table, such as "small scale".
    """

    title: str
    label: str = ""
    overrides: list[str] = Field(default=[])
    betas: Annotated[list[Radius], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    images: int = Field(0, ge=0)
    batch_size: int = Field(256, ge=1)
    main: list[str] = Field(default=["fgsm", "pgd-20"])
    claims_eps: Radius = "0.08"
    hyperscore: list[Radius] = Field(default=[])
    cost_of: str = ""
    methods: dict[str, Method]
    measurements: dict[str, Measurement]
    comparisons: Comparisons = Comparisons()
    regression: Regression = Regression()

    def varied(self) -> Iterator[tuple[str, str, Method]]:
        """Name, family and method, with `vary` written out."""
        for family, method in self.methods.items():
            if not method.vary:
                yield family, family, method
            for key, values in method.vary.items():
                for value in values:
                    overrides = [*method.overrides, f"{key}={value}"]
                    yield f"{family}-{value:g}", family, method.model_copy(update={"overrides": overrides})

    @property
    def sources(self) -> set[str]:
        """Methods whose weights others are attacked from."""
        return {measurement.source for measurement in self.measurements.values() if measurement.source}


@dataclass(frozen=True)
class PlannedRun:
    """One training, and whether it is measured."""

    name: str
    method: str
    family: str
    beta: str
    seed: int
    measured: bool
    config: TrainConfig

    def identity(self, campaign: Campaign) -> str:
        """SHA-256 of what makes its figures: the config, but for where the data lie, and the measurements."""
        config = self.config.placeless()
        measured = {
            name: {**measurement.model_dump(exclude={"attacks"}), "attacks": [a.label for a in measurement.attacks]}
            for name, measurement in campaign.measurements.items()
        }
        images = [campaign.images, campaign.batch_size]
        value = [config, measured, images] if self.measured else [config]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def campaign_names() -> list[str]:
    """Names of the campaigns that come with the package."""
    return list(shipped(CAMPAIGNS))


def load_campaign(source: str) -> Campaign:
    """A campaign from a name or a TOML file; BadInput names file and key."""
    table = read_shipped(source, CAMPAIGNS, "campaign")
    _each(Method, table, "methods", source)  # one by one, so that the error names the table
    _each(Measurement, table, "measurements", source)
    campaign = validated(Campaign, table, source)
    _check(campaign, source)
    return campaign


def _each(section: type[S], table: dict[str, Any], key: str, source: str) -> None:
    entries = table.get(key)
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{source}: {key}: missing or no table; write at least one [{key}.NAME]")
    for name, entry in entries.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise BadInput(f"{source}: {key}.{name!r}: a name becomes a file's; letters, digits and _ . - only")
        validated(section, entry, f"{source}: {key}.{name}")


def _check(campaign: Campaign, source: str) -> None:
    names = {name for name, _, _ in campaign.varied()}
    labels = {attack.label for measurement in campaign.measurements.values() for attack in measurement.attacks}
    wanted = {
        f"measurements.{name}.source": [measurement.source] if measurement.source else []
        for name, measurement in campaign.measurements.items()
    }
    wanted["comparisons.pairs"] = [name for pair in campaign.comparisons.pairs for name in pair]
    wanted["cost_of"] = [campaign.cost_of] if campaign.cost_of else []
    for key, found in wanted.items():
        for name in set(found) - names:
            raise BadInput(f"{source}: {key}: {name!r} is none of the methods ({', '.join(sorted(names))})")
    attacks = {
        "main": campaign.main,
        "comparisons.attacks": campaign.comparisons.attacks,
        "regression.attack": [campaign.regression.attack],
        **{f"methods.{name}.claimed": list(method.claimed) for name, method in campaign.methods.items()},
    }
    if campaign.regression.key:
        value: Any = TrainConfig().model_dump()
        for name in campaign.regression.key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"{source}: regression.key: {campaign.regression.key!r} is no number of a training config")
    for key, found in attacks.items():
        for label in set(found) - labels - {"clean", WORST}:
            raise BadInput(f"{source}: {key}: {label!r} is measured nowhere; choose from {', '.join(sorted(labels))}")


def runs(campaign: Campaign, source: str, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """All runs, in the order of work: sources of transfer attacks first, then seed by seed.

    overrides: `section.key=value` for every run, above everything else, such as where the data lie here.
    """
    found = []
    for name, family, method in campaign.varied():
        for beta in campaign.betas:
            for seed in method.seeds or campaign.seeds:
                own = [*campaign.overrides, *method.overrides, f"curriculum.beta='{beta}'", f"seed={seed}", *overrides]
                try:
                    config = load_config(method.preset, own)
                except BadInput as error:
                    raise BadInput(f"{source}: methods.{name}: {error}") from None
                label = in_255ths(parse_eps(beta)).partition("/")[0]
                run = PlannedRun(f"{name}_beta{label}_seed{seed}", name, family, beta, seed, method.measured, config)
                found.append((name not in campaign.sources, (method.seeds or campaign.seeds).index(seed), run))
    every = [run for _, _, run in sorted(found, key=lambda entry: entry[:2])]
    names = [run.name for run in every]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadInput(f"{source}: betas and seeds: {', '.join(sorted(twice))} more than once; leave one out")
    return every


def source_of(run: PlannedRun, measurement: Measurement, all_runs: Sequence[PlannedRun]) -> PlannedRun | None:
    """The run whose network a transfer attack on `run` is crafted on; None where it would be `run` itself."""
    same = [other for other in all_runs if other.method == measurement.source and other.beta == run.beta]
    chosen = next((other for other in same if other.seed == run.seed), same[0])
    return None if chosen.name == run.name else chosen
