"""Whose answers count: the execution provider that a policy names, because it will serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import FULL, Decider
from dfmcl.common.toml import Section

if TYPE_CHECKING:
    from dfmcl.gating.subject import Subject


class DecideSection(Section):
    """Whose answers count: the execution provider that will serve, its precision, and whether TF32 may round there."""

    provider: str = "cpu"
    precision: str = FULL
    tf32: bool = False

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if trouble := self.decider.trouble:
            raise ValueError(trouble)
        return self

    @property
    def decider(self) -> Decider:
        return Decider(self.provider, self.precision, self.tf32)


def require_decider(subject: Subject, decide: DecideSection) -> None:
    """BadInput where another provider computes the subject than the one that the policy names."""
    decider = Decider() if subject.provider is None else subject.provider.decider
    if decider != decide.decider:
        found = decider or subject.provider
        raise BadInput(f"{subject.name}: is computed by {found}, and the policy names {decide.decider} (decide)")
