"""One round: fresh images, clean and attacked, through the endpoint; a whole result or a counted failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from monitoring.probes import NO_ATTACK, PROBES, Scene
from robustness.attacks import Attack, Model
from robustness.data import Bytes, Labels
from robustness.errors import BadInput
from robustness.seeds import derived_seed
from robustness.statistics import Share
from robustness.threat import Threat
from serving.client import Answer
from serving.errors import AnswerError, Rejected, ServingError
from serving.errors import BadInput as Misfit

FORMAT = "dfmcl.round/1"
REASONS = ("unavailable", "queue_full", "timeout", "rejected", "bad_output", "version_changed", "internal")
# A query is one request: promoted models take 64 images, and half of that lets users in between sooner.
QUERY_IMAGES = 32

Predict = Callable[[Bytes], Answer]


class Clock(Protocol):
    """The two clocks of the `time` module: unix seconds, and seconds that never jump."""

    def time(self) -> float: ...
    def monotonic(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """What all rounds of a watch share. images: the pool, uint8 (M, H, W, C); labels: (M,); source: the surrogates."""

    model: str
    images: Bytes
    labels: Labels
    classes: int
    source: Model
    threat: Threat
    attacks: tuple[Attack, ...]
    images_per_round: int
    seed: int


@dataclass(frozen=True)
class Query:
    """One request. reason: why it failed, from REASONS; empty where it was answered."""

    images: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class AttackResult:
    """Of one attack: held[i] where image i was right before and after it."""

    name: str
    held: tuple[bool, ...]


@dataclass(frozen=True)
class RoundResult:
    """A round in which one version answered everything. correct[i]: clean image i was right. started: unix seconds."""

    number: int
    model: str
    version: str
    norm: str
    epsilon: str
    started: float
    seconds: float
    correct: tuple[bool, ...]
    attacks: tuple[AttackResult, ...]
    queries: tuple[Query, ...]

    @property
    def clean(self) -> Share:
        """Clean accuracy."""
        return Share(sum(self.correct), len(self.correct))

    def under(self, attack: AttackResult) -> Share:
        """Accuracy under one attack: an upper bound of robust accuracy."""
        return Share(sum(attack.held), len(self.correct))

    @property
    def worst_case(self) -> Share:
        """Share of images that were right and that no attack flipped: still an upper bound of robust accuracy."""
        columns = [self.correct, *(attack.held for attack in self.attacks)]
        return Share(sum(all(column) for column in zip(*columns, strict=True)), len(self.correct))

    def __str__(self) -> str:
        figures = [f"transfer {attack.name} at {self.epsilon} {self.under(attack)}" for attack in self.attacks] + [
            f"worst case {self.worst_case}"
        ]
        return (
            f"round {self.number}: model {self.model} v{self.version}, {len(self.correct)} images, "
            f"clean {100 * self.clean.value:.1f} %, {', '.join(figures)}, {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        value = {"format": FORMAT, "outcome": "measured", **asdict(self), "correct": _bits(self.correct)}
        return value | {"attacks": [{"name": a.name, "held": _bits(a.held)} for a in self.attacks]}


@dataclass(frozen=True)
class RoundFailure:
    """A round without figures. reason: from REASONS; message: one line for a human."""

    number: int
    model: str
    reason: str
    message: str
    started: float
    seconds: float
    queries: tuple[Query, ...]

    def __str__(self) -> str:
        return f"round {self.number}: failed ({self.reason}): {self.message}, {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "outcome": "failed", **asdict(self)}


Round = RoundResult | RoundFailure


def round_from_json(value: Mapping[str, Any]) -> Round:
    """The inverse of `to_json`; BadInput where the value is not a round's record."""
    if value.get("format") != FORMAT:
        raise BadInput(f"round: format is {value.get('format')!r}; expected {FORMAT!r}")
    fields = {key: item for key, item in value.items() if key not in ("format", "outcome")}
    try:
        fields["queries"] = tuple(Query(**query) for query in value["queries"])
        if value["outcome"] == "failed":
            return RoundFailure(**fields)
        attacks = tuple(AttackResult(attack["name"], _flags(attack["held"])) for attack in value["attacks"])
        result = RoundResult(**fields | {"correct": _flags(value["correct"]), "attacks": attacks})
    except (KeyError, TypeError) as error:
        raise BadInput(f"round: malformed record: {error!r}") from None
    if any(len(attack.held) != len(result.correct) for attack in result.attacks):
        raise BadInput("round: malformed record: not every attack has one flag an image")
    return result


class Endpoint:
    """The frame around a round's queries: it takes the time, counts, and believes only what can be believed."""

    def __init__(self, predict: Predict, classes: int, clock: Clock) -> None:
        self._predict, self._classes, self._clock = predict, classes, clock
        self.queries: list[Query] = []
        self.version = ""

    def ask(self, images: Bytes) -> Labels:
        """Labels (N,) of uint8 images (N, H, W, C), N >= 0; ServingError where any query fails. Nothing is retried."""
        parts = [self._query(images[begin : begin + QUERY_IMAGES]) for begin in range(0, len(images), QUERY_IMAGES)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _query(self, images: Bytes) -> Labels:
        begun, reason = self._clock.monotonic(), ""
        try:
            answer = self._predict(images)
            _require_sense(answer, (len(images), self._classes))
        except ServingError as error:
            reason = reason_of(error)
            raise
        finally:
            self.queries.append(Query(len(images), self._clock.monotonic() - begun, reason))
        if self.version not in ("", answer.version):
            raise Rejected(f"version {self.version} answered first, {answer.version} later", "version_changed")
        self.version = answer.version
        labels: Labels = answer.logits.argmax(axis=1).astype(np.int64)
        return labels


def _require_sense(answer: Answer, shape: tuple[int, int]) -> None:
    """Refuse what cannot be logits of this model: the version becomes a label, so it must be one of Triton's."""
    if answer.logits.shape != shape or not np.isfinite(answer.logits).all():
        raise Rejected(f"expected finite logits {shape}, received {answer.logits.shape}", "bad_output")
    if not (answer.version.isascii() and answer.version.isdecimal() and len(answer.version) <= 19):
        raise Rejected(f"version {answer.version[:40]!r} is no 64-bit number", "bad_output")


def reason_of(error: ServingError) -> str:
    """Which of REASONS an error of the client is."""
    if isinstance(error, Misfit):
        return "rejected"  # the endpoint takes other images than ours
    reason = error.reason if isinstance(error, AnswerError) else "internal"
    reason = {"invalid": "rejected", "unknown_model": "rejected"}.get(reason, reason)
    return reason if reason in REASONS else "internal"


def draw(pool: int, count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Indices of round `number` (from 1): without replacement until fewer than `count` are left, then reshuffled."""
    rounds = pool // count
    shuffle, place = divmod(number - 1, rounds)
    order: npt.NDArray[np.int64] = np.random.default_rng(derived_seed(seed, "images", shuffle)).permutation(pool)
    return order[place * count : (place + 1) * count]


def run_round(plan: Plan, number: int, *, predict: Predict, clock: Clock) -> Round:
    """Measure once: clean images first, then for each attack its version of every image that was right."""
    started, begun = clock.time(), clock.monotonic()
    endpoint = Endpoint(predict, plan.classes, clock)
    chosen = draw(len(plan.images), plan.images_per_round, plan.seed, number)
    scene = Scene(plan.images[chosen], plan.labels[chosen], plan.source, plan.threat, plan.seed, number)
    try:
        correct = PROBES["clean"](scene, NO_ATTACK, endpoint.ask) == scene.labels
        right = scene.only(correct)  # an image that is wrong already is no attacker's merit, and needs no query
        attacks = []
        for attack in plan.attacks:
            held = correct.copy()
            held[correct] = PROBES["transfer"](right, attack, endpoint.ask) == right.labels
            attacks.append(AttackResult(attack.name, tuple(held.tolist())))
    except ServingError as error:
        message, seconds = " ".join(str(error).split()), clock.monotonic() - begun
        return RoundFailure(number, plan.model, reason_of(error), message, started, seconds, tuple(endpoint.queries))
    return RoundResult(
        number=number,
        model=plan.model,
        version=endpoint.version,
        norm=plan.threat.norm,
        epsilon=plan.threat.label,
        started=started,
        seconds=clock.monotonic() - begun,
        correct=tuple(correct.tolist()),
        attacks=tuple(attacks),
        queries=tuple(endpoint.queries),
    )


def _bits(flags: tuple[bool, ...]) -> str:
    return "".join("01"[flag] for flag in flags)


def _flags(bits: str) -> tuple[bool, ...]:
    return tuple(bit == "1" for bit in bits)
