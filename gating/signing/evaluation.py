"""An evaluation as it lies in a report, figures and all: under the suite, and under attacks that transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar

from dfmcl.common.entry import Amount, Bits, Count, Digest, Entry, Maybe, Ratio, one_of, told
from dfmcl.robustness.records import FORMAT
from dfmcl.robustness.threats.registry import BALLS, threat_from_json
from dfmcl.robustness.threats.threat import Threat

A = TypeVar("A")


@dataclass(frozen=True, kw_only=True)
class ShareEntry(Entry):
    """k of n images, with the exact two-sided 95 % interval of one look."""

    k: Count
    n: Count
    value: Ratio
    lower_95: Ratio
    upper_95: Ratio


@dataclass(frozen=True, kw_only=True)
class ThreatEntry(Entry):
    """Of a ball norm and eps, in pixel units; of another threat its spelling. label: as people write it."""

    norm: Maybe[Annotated[str, one_of(*BALLS)]] = None
    eps: Maybe[Amount] = None
    spelling: Maybe[str] = None
    label: str

    @cached_property
    def parsed(self) -> Threat:
        """BadInput where there is no such threat."""
        return threat_from_json(self.to_json())


@dataclass(frozen=True, kw_only=True)
class AttackFlags(Entry):
    """Of each image: whether the attack was shown it, whether it held, and the passes spent on it."""

    tried: Bits
    held: Bits
    forward: tuple[Count, ...]
    backward: tuple[Count, ...]


@dataclass(frozen=True, kw_only=True)
class AttackEntry(Entry):
    """One attack. accuracy: under it and those before it; outside: results that did not count: they left the ball."""

    name: str
    parameters: Mapping[str, Any]
    accuracy: ShareEntry
    tried: Count
    flipped: Count
    outside: Count
    unconfirmed: Count
    seconds: Amount
    per_image: AttackFlags


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(Entry):
    """Of each image: right as it came, and in the worst case over all attacks."""

    correct: Bits
    robust: Bits


@dataclass(frozen=True, kw_only=True)
class EvaluationEntry(Entry, Generic[A]):
    """Accuracy under one threat, as `Evaluation` writes it.

    not_finite: clean images whose logits are no numbers; each is wrong.
    """

    format: Annotated[str, told(const=FORMAT)]
    about: A
    threat: ThreatEntry
    grid: Annotated[str, one_of("uint8", "float")]
    seed: Count
    images: Count
    not_finite: Maybe[Count] = None
    clean: ShareEntry
    robust: ShareEntry
    attacks: tuple[AttackEntry, ...]
    per_image: EvaluationFlags
    seconds: Amount


@dataclass(frozen=True, kw_only=True)
class SurrogateEntry(Entry):
    """The networks that a transfer was crafted on."""

    kind: Annotated[str, told(const="transfer")]
    surrogate: str
    surrogate_sha256: Digest


@dataclass(frozen=True, kw_only=True)
class SuiteEntry(EvaluationEntry[Mapping[str, Any]]):
    """Under the policy's attacks. about: how they came by gradients, and what is to be remarked."""

    about: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TransferEntry(EvaluationEntry[SurrogateEntry]):
    """Under attacks that were crafted on other networks: an upper bound of robust accuracy."""

    about: SurrogateEntry
