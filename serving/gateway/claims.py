"""The gate's findings about the served version, for the page and /v1/model: read from the release, never guessed.

The version is Triton's word; the report that lies in the repository under that number is the record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmcl.common.errors import DfmclError
from dfmcl.release.stores.registry import store_of

if TYPE_CHECKING:
    from dfmcl.gating.signing.evaluation import ShareEntry
    from dfmcl.gating.signing.report import Report

REPORT = "report.json"
FRESH_SECONDS = 30.0  # after which the record is read again: a signature expires, storage comes back


@dataclass(frozen=True)
class Fraction:
    """value: in [0, 1]; images: it is a share of so many; lower, upper: its exact 95 % interval, or, of a gate that
    stopped by itself, the gate's own bounds, None where its policy has no criterion for it."""

    value: float
    images: int
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class Claims:
    """What the gate recorded.

    verdict: the gate's, or "not recorded", "not believed" (the record is there, and is none that is trusted).
    signature: "verified" by a trusted key, or "not checked", where the gateway was told of none.
    meaning: of the robust accuracy, in one plain sentence; "" where there is none.
    why: the reason where verdict is none of the gate's.
    until: the day on which the signature expires, as YYYY-MM-DD; "" where no signature was checked.
    """

    verdict: str
    signature: str = "not checked"
    meaning: str = ""
    threat: str = ""
    data: str = ""
    attacks: tuple[str, ...] = ()
    clean: Fraction | None = None
    robust: Fraction | None = None
    until: str = ""
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


UNTOLD = Claims("not recorded", why="this gateway was not told where the gate's record is (release.repository)")
Read = Callable[[str], Claims]


def reader(repository: str, model: str, trust: str) -> Read:
    """The claims of a version, by its number. trust: a TOML file of keys that must have signed, "" for none.

    BadInput where the trust file cannot be used; ModuleNotFoundError where what it needs is not installed.
    """
    if not repository:
        return lambda version: UNTOLD
    store = store_of(repository)
    if trust:
        from dfmcl.gating.signing.trust import load_trust  # here: without a trust file no signature is looked at

        load_trust(Path(trust))

    def read(version: str) -> Claims:
        try:
            return _read(store.local(f"{model}/{version}"), trust)
        except OSError as error:
            return Claims("not recorded", why=f"the repository cannot be read: {error.strerror or error}")
        except DfmclError as error:
            return Claims("not believed", why=_reason(error))

    return read


class Record:
    """The claims of the version that is served now; read in a thread, and kept for FRESH_SECONDS."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock, self._lock = read, clock, asyncio.Lock()
        self._known: tuple[str, float, Claims] | None = None

    async def of(self, version: str) -> Claims:
        async with self._lock:
            known = self._known
            if known is None or known[0] != version or self._clock() - known[1] > FRESH_SECONDS:
                known = self._known = version, self._clock(), await asyncio.to_thread(self._read, version)
            return known[2]


def _read(directory: Path, trust: str) -> Claims:
    from dfmcl.gating.signing.evidence import read_report  # here: it loads pydantic's records

    if not (directory / REPORT).is_file():
        return Claims("not recorded", why="there is no report of the gate about this version")
    if not trust:
        return of_report(read_report(directory / REPORT)[0])
    from dfmcl.gating.signing.attestation import read_attestation, verify
    from dfmcl.gating.signing.trust import load_trust

    trusted = load_trust(Path(trust))
    report, signed = verify(directory, directory, trusted), read_attestation(directory, trusted)
    expires = signed.expires if trusted.max_age is None else min(signed.expires, signed.created + trusted.max_age)
    return of_report(report, signature="verified", until=f"{expires:%Y-%m-%d}")


def of_report(report: Report, *, signature: str = "not checked", until: str = "") -> Claims:
    """What a report says, at the policy's own radius."""
    found = report.evaluation
    threat, robust = found.threat.parsed, found.robust
    attacks = tuple(attack.name for attack in found.attacks)
    allowed = f"change no colour value by more than {threat.label.removesuffix('/255')} of 255"
    if threat.kind != "linf" or not threat.label.endswith("/255"):
        allowed = f"stay within {threat.kind} {threat.label}"
    meaning = (
        f"{robust.k:,} of {robust.n:,} test images of {report.data.name} were recognised and stayed so under every"
        f" attack that was tried, all of which {allowed}; a stronger or another attack may break more of them."
    )
    return Claims(
        verdict=report.verdict,
        signature=signature,
        meaning=meaning,
        threat=f"{threat.kind} {threat.label}",
        data=report.data.name,
        attacks=attacks,
        clean=_fraction(report, "clean_accuracy", found.clean),
        robust=_fraction(report, "robust_accuracy", robust),
        until=until,
    )


def _fraction(report: Report, metric: str, share: ShareEntry) -> Fraction:
    """An interval for a fixed number of images would be too narrow where the gate stopped at a lucky moment."""
    low: float | None = share.lower_95
    high: float | None = share.upper_95
    if report.statistics.kind == "sequential":
        rows = [row for row in report.criteria if (row.metric, row.eps, row.class_name) == (metric, None, None)]
        low, high = (rows[0].lower, rows[0].upper) if rows else (None, None)
    return Fraction(share.value, share.n, low, high)


def _reason(error: DfmclError) -> str:
    """Without a path, which is nobody's business outside."""
    from dfmcl.gating.signing.faults import FAULTS, EvidenceError

    return (
        FAULTS[error.fault].about
        if isinstance(error, EvidenceError)
        else "the record or the trust file is not readable"
    )
