"""What a repository serves and may serve: a model's roles, versions, verdict, and how long that holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dfmcl.common.errors import BadInput, Refused
from dfmcl.gating.signing.attestation import Trust, read_attestation
from dfmcl.gating.signing.evidence import inspect
from dfmcl.release import layout, ledger, verification
from dfmcl.release.repair import UNFIT, mendable, models
from dfmcl.release.stores.store import Store

if TYPE_CHECKING:
    from dfmcl.gating.signing.report import CriterionEntry


@dataclass(frozen=True)
class ModelStatus:
    """One model. champion, previous, candidate: versions, as in aliases.json; versions: on disk; sha256: champion's.

    criteria: of the policy it passed, with what was measured; expires: of its attestation, ISO 8601, None without a
    trust file; trouble: why it would not be served, empty where it would be. A model in trouble has no champion,
    whatever version its config.pbtxt names (configured). doubt: what the history says otherwise.
    """

    model: str
    champion: int | None
    previous: int | None
    candidate: int | None
    configured: int | None
    versions: Sequence[int]
    sha256: str
    criteria: Sequence[str]
    expires: str | None
    trouble: str
    doubt: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def standings(store: Store, trust: Trust | None = None, now: datetime | None = None) -> list[ModelStatus]:
    """Every model of a repository, by name. trust: whose signatures count; None: digests and verdicts only."""
    verification.require_repository(store)
    aliases = ledger.aliases(store)
    return [_standing(store, name, aliases.get(name, ledger.Aliases()), trust, now) for name in models(store)]


def _standing(
    store: Store, name: str, aliases: ledger.Aliases, trust: Trust | None, now: datetime | None
) -> ModelStatus:
    criteria: list[str] = []
    sha256, expires, trouble, configured = "", None, "", None
    with suppress(BadInput):  # its fault is the trouble below
        configured = layout.served_version(store, name)
    try:
        if not layout.entry_at(store, name).folder:
            raise Refused(f"{store.where(name)}: is gone, and nobody retired it; promote a candidate")
        release = verification.verify_release(store, name, trust, now)
        _require_not_given_up(store, name, release.version)
        sha256 = release.sha256
        path = release.path
        criteria = [_criterion(row) for row in inspect(path, path).criteria]
        if trust is not None:
            expires = read_attestation(path, trust).expires.isoformat()
    except UNFIT as error:
        trouble = str(error)
        if trouble.endswith(layout.MEND) and not mendable(store, name, trust, now):
            trouble = f"{trouble.removesuffix(layout.MEND)}no version there may be served; promote a candidate"
    return ModelStatus(
        name,
        champion=None if trouble else aliases.champion,
        previous=aliases.previous,
        candidate=aliases.candidate,
        configured=configured,
        versions=layout.version_numbers(store, name),
        sha256=sha256,
        criteria=criteria,
        expires=expires,
        trouble=trouble,
        doubt=_doubt(store, name, configured),
    )


def _require_not_given_up(store: Store, name: str, version: int) -> None:
    given_up = ledger.given_up(ledger.events_of(store, name))
    if version in given_up:
        raise Refused(
            f"version {version} was given up: {given_up[version]}; promote another,"
            f" or `dfmcl rollback --version {version}` tries it again"
        )


def _doubt(store: Store, name: str, configured: int | None) -> str:
    """Where the history, by which people decide, says otherwise than config.pbtxt, which decides; empty otherwise."""
    last = ledger.last_served(ledger.events_of(store, name))
    if configured is None or last == configured:
        return ""
    told = "nothing is" if last is None else f"version {last} is"
    return f"{layout.HISTORY} says that {told} served; {layout.MEND}"


def _criterion(row: CriterionEntry) -> str:
    return row.criterion if row.value is None else f"{row.criterion}: {100 * row.value:.1f} %"
