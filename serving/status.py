"""What a repository serves and may serve: a model's roles, versions, verdict, and how long that holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gating.attestation import BadEvidence, NotAttested, Trust, inspect, read_attestation
from serving import ledger
from serving import repository as layout
from serving.errors import ServingError
from serving.promotion import require_repository, verify_release


@dataclass(frozen=True)
class Standing:
    """One model. champion, previous, candidate: versions, as in aliases.json; versions: on disk; sha256: champion's.

    criteria: of the policy it passed, with what was measured; expires: of its attestation, ISO 8601, None without a
    trust file; trouble: why it would not be served, empty where it would be.
    """

    model: str
    champion: int | None
    previous: int | None
    candidate: int | None
    versions: Sequence[int]
    sha256: str
    criteria: Sequence[str]
    expires: str | None
    trouble: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def standings(repository: Path, trust: Trust | None = None, now: datetime | None = None) -> list[Standing]:
    """Every model of a repository, by name. trust: whose signatures count; None: digests and verdicts only."""
    require_repository(repository)
    aliases = ledger.aliases(repository)
    names = layout.model_names(repository)
    return [_standing(repository, name, aliases.get(name, ledger.Aliases()), trust, now) for name in names]


def _standing(
    repository: Path, name: str, aliases: ledger.Aliases, trust: Trust | None, now: datetime | None
) -> Standing:
    criteria: list[str] = []
    sha256, expires, trouble = "", None, ""
    try:
        release = verify_release(repository, name, trust, now)
        sha256, directory = release.sha256, release.path
        criteria = [_criterion(row) for row in inspect(directory, directory)["criteria"]]
        if trust is not None:
            expires = read_attestation(directory, trust).expires.isoformat()
        if aliases.champion is None:
            trouble = f"version {release.version} is not served: {ledger.failure(repository, name)}"
    except (ServingError, NotAttested, BadEvidence) as error:
        trouble = str(error)
    versions = layout.version_numbers(repository / name)
    return Standing(name, **asdict(aliases), versions=versions, sha256=sha256, criteria=criteria, expires=expires,
                    trouble=trouble)  # fmt: skip


def _criterion(row: dict[str, Any]) -> str:
    value = row.get("value")
    return str(row["criterion"]) if value is None else f"{row['criterion']}: {100 * float(value):.1f} %"
