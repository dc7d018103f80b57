"""The worst case over several threats: the attacker may do any one of them to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.threat import Threat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Union(Threat):
    """members: the threats, at least two, each once. title: a spelling that stands for all of them, such as `fog`."""

    kind, name, heads = "union", "", ()
    examples = ("linf:4/255|patch:5x5|rotation:30",)
    members: tuple[Threat, ...]
    title: str = ""

    @staticmethod
    def of(members: Sequence[Threat], title: str = "") -> Threat:
        """A member that is alone is no union; BadInput where a part comes twice."""
        if len(members) == 1:
            return members[0]
        union = Union(tuple(members), title)
        if len(set(union.parts)) < len(union.parts):
            raise BadInput(f"threat {union.spelling}: a part comes twice; name each once")
        return union

    @classmethod
    def parse(cls, text: str) -> Threat:
        raise BadInput(f"threat {text}: a union has no word of its own; join spellings by |")

    @property
    def spelling(self) -> str:
        return self.title or "|".join(member.spelling for member in self.members)

    @property
    def label(self) -> str:
        return self.title or " | ".join(map(str, self.members))

    @property
    def parts(self) -> tuple[Threat, ...]:
        return tuple(part for member in self.members for part in member.parts)

    def on_grid(self) -> Union:
        return replace(self, members=tuple(member.on_grid() for member in self.members))

    def fits(self, shape: tuple[int, ...]) -> None:
        for member in self.members:
            member.fits(shape)

    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        inside = self.members[0].contains_uint8(adversarial, images)
        for member in self.members[1:]:
            inside = inside | member.contains_uint8(adversarial, images)
        return inside

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        inside = self.members[0].contains(x_adv, x)
        for member in self.members[1:]:
            inside = inside | member.contains(x_adv, x)
        return inside

    def to_json(self) -> dict[str, Any]:
        named = {} if self.title else {"members": [member.to_json() for member in self.members]}
        return {**super().to_json(), **named}

    def __str__(self) -> str:
        return self.label
