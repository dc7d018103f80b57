"""What an evaluation leaves behind: per image and attack whether it held, as versioned JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.suites import FROM
from dfmcl.robustness.statistics import Share
from dfmcl.robustness.threats.registry import threat_from_json
from dfmcl.robustness.threats.threat import Threat

FORMAT = "dfmcl.evaluation/1"
T = TypeVar("T")


@dataclass(frozen=True)
class AttackRecord:
    """One attack on one set of images.

    held[i]: image i is classified correctly and this attack did not flip it. An attack that saw only the images that
    earlier ones left (`tried[i]` false elsewhere) cannot say more about the others than they did.
    outside: images whose last result lay outside the ball, and did not count. unconfirmed: images on which the model
    that gave gradients erred at some point although the answer that counts never did. forward, backward: passes spent
    on each image, until it fell if it did. None and empty where nobody counted.
    """

    name: str
    parameters: Mapping[str, Any]
    held: tuple[bool, ...]
    tried: tuple[bool, ...]
    outside: int
    seconds: float
    unconfirmed: int | None = None
    forward: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()

    @property
    def transferred(self) -> bool:
        """Whether another network than the judged one gave the gradients."""
        return FROM in self.name

    @property
    def accuracy(self) -> Share:
        """Robust accuracy under this attack (in a cascade: under it and those before it)."""
        return Share(sum(self.held), len(self.held))

    @property
    def flipped(self) -> int:
        """Images that this attack tried and flipped."""
        return sum(tried and not held for tried, held in zip(self.tried, self.held, strict=True))


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one model under one threat. `grid`: adversarial images were counted as uint8.

    not_finite: clean images whose logits are not finite; each counts as wrong.
    """

    threat: Threat
    grid: bool
    seed: int
    correct: tuple[bool, ...]
    attacks: tuple[AttackRecord, ...]
    seconds: float
    about: Mapping[str, Any] = field(default_factory=dict)
    not_finite: int = 0

    @property
    def clean(self) -> Share:
        """Clean accuracy."""
        return Share(sum(self.correct), len(self.correct))

    @property
    def robust_images(self) -> tuple[bool, ...]:
        """Per image: right, and flipped by no attack of the suite."""
        columns = [self.correct, *(record.held for record in self.attacks)]
        return tuple(all(column) for column in zip(*columns, strict=True))

    @property
    def robust(self) -> Share:
        """Robust accuracy: worst case per image over all attacks."""
        return Share(sum(self.robust_images), len(self.correct))

    def part(self, rows: Sequence[int]) -> Evaluation:
        """Of some of the images; what stands for all of them, such as the time, stays."""

        def of(column: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(column[row] for row in rows) if column else ()

        attacks = [
            replace(one, held=of(one.held), tried=of(one.tried), forward=of(one.forward), backward=of(one.backward))
            for one in self.attacks
        ]
        return replace(self, correct=of(self.correct), attacks=tuple(attacks))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "about": dict(self.about),
            "threat": self.threat.to_json(),
            "grid": "uint8" if self.grid else "float",
            "seed": self.seed,
            "images": len(self.correct),
            **({"not_finite": self.not_finite} if self.not_finite else {}),
            "clean": _share(self.clean),
            "robust": _share(self.robust),
            "attacks": [
                {
                    "name": record.name,
                    "parameters": dict(record.parameters),
                    "accuracy": _share(record.accuracy),
                    "tried": sum(record.tried),
                    "flipped": record.flipped,
                    "outside": record.outside,
                    **({} if record.unconfirmed is None else {"unconfirmed": record.unconfirmed}),
                    "seconds": record.seconds,
                    "per_image": {
                        "tried": bits(record.tried),
                        "held": bits(record.held),
                        **(
                            {"forward": list(record.forward), "backward": list(record.backward)}
                            if record.forward
                            else {}
                        ),
                    },
                }
                for record in self.attacks
            ],
            "per_image": {"correct": bits(self.correct), "robust": bits(self.robust_images)},
            "seconds": self.seconds,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Evaluation:
        if value.get("format") != FORMAT:
            raise BadInput(f"evaluation: format is {value.get('format')!r}; expected {FORMAT!r}")
        try:
            return Evaluation(
                threat=threat_from_json(value["threat"]),
                grid=value["grid"] == "uint8",
                seed=value["seed"],
                correct=from_bits(value["per_image"]["correct"]),
                attacks=tuple(
                    AttackRecord(
                        name=record["name"],
                        parameters=dict(record["parameters"]),
                        held=from_bits(record["per_image"]["held"]),
                        tried=from_bits(record["per_image"]["tried"]),
                        outside=record["outside"],
                        seconds=record["seconds"],
                        unconfirmed=record.get("unconfirmed"),
                        forward=tuple(record["per_image"].get("forward", ())),
                        backward=tuple(record["per_image"].get("backward", ())),
                    )
                    for record in value["attacks"]
                ),
                seconds=value["seconds"],
                about=dict(value["about"]),
                not_finite=value.get("not_finite", 0),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"evaluation: malformed record: {error!r}") from None


def _share(share: Share) -> dict[str, Any]:
    lower, upper = share.bounds
    return {"k": share.k, "n": share.n, "value": share.value, "lower_95": lower, "upper_95": upper}


def bits(flags: tuple[bool, ...]) -> str:
    """Flags as they lie in our JSON: `0110`."""
    return "".join("01"[flag] for flag in flags)


def from_bits(bits: str) -> tuple[bool, ...]:
    """The inverse of `bits`."""
    return tuple(bit == "1" for bit in bits)


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of one model by the same attacks on different images as one, in the order given."""
    first = parts[0]
    columns = zip(*(part.attacks for part in parts), strict=True)
    return replace(
        first,
        correct=_chained(part.correct for part in parts),
        attacks=tuple(
            replace(
                records[0],
                held=_chained(record.held for record in records),
                tried=_chained(record.tried for record in records),
                outside=sum(record.outside for record in records),
                seconds=sum(record.seconds for record in records),
                unconfirmed=sum(record.unconfirmed or 0 for record in records),
                forward=_chained(record.forward for record in records),
                backward=_chained(record.backward for record in records),
            )
            for records in columns
        ),
        seconds=sum(part.seconds for part in parts),
        not_finite=sum(part.not_finite for part in parts),
    )


def worst_of(threat: Threat, parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of one model on the same images under the parts of a union as one: per image the worst of them.

    Each attack is named with its part, `apgd-ce in Linf 4/255`. Of one part it is that part's own.
    """
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        threat=threat,
        grid=all(part.grid for part in parts),
        attacks=tuple(
            replace(record, name=f"{record.name} in {part.threat}") for part in parts for record in part.attacks
        ),
        seconds=sum(part.seconds for part in parts),
    )


def _chained(columns: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(chain.from_iterable(columns))
