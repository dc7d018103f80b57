"""What a round found: figures of one version, or the reason why there are none. One JSON form each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import Bytes
from dfmcl.robustness.statistics import Share

FORMAT = "dfmcl.round/2"
# Which way a round went: by gRPC straight to Triton, or by HTTP through the gateway as any customer's request.
TRITON, GATEWAY = "triton", "gateway"
PATHS = (TRITON, GATEWAY)
# server_error: the server failed inside; internal: we did.
REASONS = (
    *("unavailable", "server_error", "queue_full", "timeout", "slow"),
    *("rejected", "bad_output", "version_changed", "internal"),
)
SKIPS = ("budget", "backpressure", "paused")


@dataclass(frozen=True)
class Query:
    """One request. reason: why it failed, from REASONS; empty where it was answered."""

    images: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class AttackResult:
    """Of one attack: held[i] where image i was right before and after it. queries: images asked about, all together."""

    name: str
    held: tuple[bool, ...]
    queries: int


@dataclass(frozen=True)
class Replayed:
    """Of the images asked about again, those of one kind of further threat."""

    kind: str
    images: int
    mismatches: int


@dataclass(frozen=True)
class ReplayResult:
    """The gate's images asked about again. mismatches: with a logit that differs by more than is tolerated.

    difference: the largest of a logit, in units of what is tolerated. further: those of further threats, by kind.
    """

    images: int
    mismatches: int
    difference: float
    further: tuple[Replayed, ...] = ()


@dataclass(frozen=True)
class Example:
    """An image (H, W, C) that was right, and its adversarial version that got through; classes by index."""

    attack: str
    image: Bytes
    adversarial: Bytes
    label: int
    answer: int


@dataclass(frozen=True)
class RoundResult:
    """A round in which one version answered everything. correct[i]: clean image i was right. started: unix seconds.

    attacks: in the watch's ball; further: in threats of other kinds, by the threat's name. examples are kept in memory
    only.
    """

    number: int
    via: str
    model: str
    version: str
    norm: str
    epsilon: str
    started: float
    seconds: float
    correct: tuple[bool, ...]
    attacks: tuple[AttackResult, ...]
    queries: tuple[Query, ...]
    replay: ReplayResult | None = None
    further: tuple[AttackResult, ...] = ()
    examples: tuple[Example, ...] = field(default=(), compare=False)

    @property
    def asked(self) -> tuple[AttackResult, ...]:
        """All attacks, of whatever threat."""
        return (*self.attacks, *self.further)

    @property
    def clean(self) -> Share:
        """Clean accuracy."""
        return Share(sum(self.correct), len(self.correct))

    def under(self, attack: AttackResult) -> Share:
        """Accuracy under one attack: an upper bound of robust accuracy."""
        return Share(sum(attack.held), len(self.correct))

    @property
    def worst_case(self) -> Share:
        """Share of images that were right and that no attack in the ball flipped: still an upper bound of robust
        accuracy."""
        columns = [self.correct, *(attack.held for attack in self.attacks)]
        return Share(sum(all(column) for column in zip(*columns, strict=True)), len(self.correct))

    def __str__(self) -> str:
        kind = "transfer" if self.via == TRITON else "query"
        figures = [f"{kind} {attack.name} at {self.epsilon} {self.under(attack)}" for attack in self.attacks]
        if len(self.attacks) > 1:
            figures.append(f"worst case {self.worst_case}")
        figures += [f"{attack.name} {self.under(attack)}" for attack in self.further]
        if self.replay:
            figures.insert(
                0, f"{self.replay.images - self.replay.mismatches} of {self.replay.images} replayed as gated"
            )
        return (
            f"round {self.number} by {self.via}: model {self.model} v{self.version}, {len(self.correct)} images, "
            f"clean {100 * self.clean.value:.1f} %, {', '.join(figures)}, {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        value = {"format": FORMAT, "outcome": "measured", **asdict(replace(self, examples=()))}
        del value["examples"]
        attacks, further = (
            [{"name": a.name, "held": _bits(a.held), "queries": a.queries} for a in part]
            for part in (self.attacks, self.further)
        )
        return value | {"correct": _bits(self.correct), "attacks": attacks, "further": further}


@dataclass(frozen=True)
class RoundFailure:
    """A round without figures. reason: from REASONS; message: one line for a human."""

    number: int
    via: str
    model: str
    reason: str
    message: str
    started: float
    seconds: float
    queries: tuple[Query, ...]

    def __str__(self) -> str:
        return f"round {self.number} by {self.via}: failed ({self.reason}): {self.message}, {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "outcome": "failed", **asdict(self)}


@dataclass(frozen=True)
class RoundSkipped:
    """A round that was not begun, or broken off without an opinion. reason: from SKIPS; queries: asked before that."""

    number: int
    via: str
    model: str
    reason: str
    message: str
    started: float
    seconds: float = 0.0
    queries: tuple[Query, ...] = ()

    def __str__(self) -> str:
        return f"round {self.number} by {self.via}: skipped ({self.reason}): {self.message}"

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "outcome": "skipped", **asdict(self)}


Round = RoundResult | RoundFailure | RoundSkipped


def round_from_json(value: Mapping[str, Any]) -> Round:
    """The inverse of `to_json`; BadInput where the value is not a round's record."""
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        raise BadInput(f"round: format is {found!r}; expected {FORMAT!r}")
    fields = {key: item for key, item in value.items() if key not in ("format", "outcome")}
    try:
        fields["queries"] = tuple(Query(**query) for query in value["queries"])
        if value["outcome"] != "measured":
            outcome: Round = {"failed": RoundFailure, "skipped": RoundSkipped}[value["outcome"]](**fields)
        else:
            for part in ("attacks", "further"):  # the records of before know none
                fields[part] = tuple(
                    AttackResult(a["name"], _flags(a["held"]), a["queries"]) for a in value.get(part, ())
                )
            fields["replay"] = _replay(value["replay"]) if value["replay"] else None
            outcome = RoundResult(**fields | {"correct": _flags(value["correct"])})
        if not _is_sound(outcome):
            raise BadInput("round: malformed record: unknown words, numbers that are none, or flags that do not fit")
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"round: malformed record: {error!r}") from None
    return outcome


def _is_sound(outcome: Round) -> bool:
    """Whether its words are from closed sets, because they become labels, and its numbers are such."""
    queries = outcome.queries
    counts = [outcome.number, *(query.images for query in queries)]
    numbers = [outcome.started, outcome.seconds, *(query.seconds for query in queries)]
    words = outcome.via in PATHS and all(query.reason in ("", *REASONS) for query in queries)
    if isinstance(outcome, RoundResult):
        words = words and outcome.version.isascii() and outcome.version.isdecimal()
        fits = bool(outcome.correct) and all(len(attack.held) == len(outcome.correct) for attack in outcome.asked)
        counts += [attack.queries for attack in outcome.asked]
        if outcome.replay is not None:
            parts = outcome.replay.further
            counts += [outcome.replay.images, outcome.replay.mismatches]
            counts += [count for part in parts for count in (part.images, part.mismatches)]
            words = words and all(isinstance(part.kind, str) for part in parts)
            numbers.append(outcome.replay.difference)
    else:
        fits, known = True, SKIPS if isinstance(outcome, RoundSkipped) else REASONS
        words = words and outcome.reason in known
    whole = all(type(count) is int and count >= 0 for count in counts)
    return words and fits and whole and all(math.isfinite(number) for number in numbers)


def _replay(value: Mapping[str, Any]) -> ReplayResult:
    """The records of before know no further threats."""
    return ReplayResult(**{**value, "further": tuple(Replayed(**part) for part in value.get("further", ()))})


def compared(
    found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], tolerance: float, kinds: Sequence[str] = ()
) -> ReplayResult:
    """Logits (N, K) beside those the gate recorded.

    tolerance: a share of the largest logit there
    kinds: of each image that of its further threat, "" for none; () where there is none at all

    Nothing compares with a logit that is not finite: then every image is a mismatch.
    """
    if found.shape != expected.shape or not all(np.isfinite(one).all() for one in (found, expected)):
        differ, worst = np.ones(len(expected), bool), float(np.finfo(np.float32).max)
        return ReplayResult(len(expected), len(expected), worst, _by_kind(kinds, differ))
    allowed = tolerance * max(1.0, float(np.abs(expected).max()))
    off = np.abs(found.astype(np.float64) - expected).max(axis=1)  # float32 could overflow
    # Logits decide: the gate's adversarial images lie at the border, where a label turns within any tolerance, and a
    # label that turns elsewhere took its logits with it.
    return ReplayResult(
        len(expected), int((off > allowed).sum()), float(off.max() / allowed), _by_kind(kinds, off > allowed)
    )


def _by_kind(kinds: Sequence[str], differ: np.ndarray[Any, Any]) -> tuple[Replayed, ...]:
    found = {kind: np.array([one == kind for one in kinds]) for kind in kinds if kind}
    return tuple(Replayed(kind, int(own.sum()), int(differ[own].sum())) for kind, own in found.items())


def _bits(flags: tuple[bool, ...]) -> str:
    return "".join("01"[flag] for flag in flags)


def _flags(bits: str) -> tuple[bool, ...]:
    return tuple(bit == "1" for bit in bits)
